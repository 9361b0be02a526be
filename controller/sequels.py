"""What follows from the ends of jobs: the leader sees to it from the outbox, and each controller posts the webhooks."""

from __future__ import annotations

from ..broker.calls.job_sending import JobSender
from ..broker.jobs import Sequel
from ..broker.overload import HeldBytes
from ..broker.queue import Queue
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.webhook_signing import WebhookSigner
from .chords import Chords
from .end_webhooks import EndWebhooks
from .next_stages import NextStages
from .outbox import Outbox
from .receivers import Receivers
from .state.documents import Desired, Observed
from .webhooks import WebhookSending


class Sequels:
    """The part of one controller. Webhooks are posted where hosts are set that may be called."""

    def __init__(self, queue: Queue, store: Store, keys: StoreKeys, settings: Settings) -> None:
        signer = WebhookSigner(settings.webhook_secrets, settings.namespace)
        jobs = JobSender(queue, store, keys, HeldBytes(), settings.signer)
        self.rules = settings.callbacks.rules
        self._webhooks = queue.webhooks
        self._posting = WebhookSending(queue.webhooks, store, signer, self.rules, Receivers(settings.callbacks.networks))
        self._ends = EndWebhooks(queue.webhooks, signer, self.rules, store.now_ms)
        self._stages = NextStages(jobs, store, keys, settings.signer)
        self._chords = Chords(jobs, store, keys, settings.signer)
        sequels = {Sequel.WEBHOOK: self._ends.send, Sequel.STAGE: self._stages.send, Sequel.CHORD: self._chords.send}
        self._outbox = Outbox(store, keys, sequels)

    def __repr__(self) -> str:
        return f"<Sequels {self._outbox!r}, {self._posting!r}>"

    @property
    def problems(self) -> dict[str, str]:
        """What operators are told, for the observed document."""
        if not (count := self._posting.given_up):
            return {}
        return {"webhooks given up": f"{count}: `mqserve webhooks list` shows why, `mqserve webhooks retry` sends them again"}

    async def turn(self, desired: Desired, observed: Observed | None, *, leads: bool) -> None:
        """Looks after them, from the first backend on. When the instance closes the leader goes on until `tidy`. The leader sees to the
        outbox also where nobody may be called: a direct publisher may ask for it nevertheless."""
        self._ends.futures_path = desired.http.futures_path
        for sending in (self._stages, self._chords):
            sending.follow(desired, "" if observed is None else observed.store_is_full)
        if not leads:
            await self._outbox.stop()
        elif desired.backends:
            self._outbox.go_on()
        if desired.closing and not leads:
            await self._posting.stop()
        elif desired.backends and self.rules.hosts:
            self._posting.go_on()

    async def stop(self) -> None:
        await self._outbox.stop()
        await self._posting.stop()

    async def tidy(self) -> None:
        """Deletes the queues at the end of an instance, if no webhook waits in them. What cannot be sent any more stays in the outbox for
        the next instance of the namespace. Raises the errors of broker and store."""
        await self._outbox.stop()
        await self._outbox.send_all()
        await self._posting.stop()
        if self.rules.hosts:
            await self._webhooks.delete_if_empty()
