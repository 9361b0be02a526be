"""Webhooks: every controller takes them from their queue and posts them. `end_webhooks.py` puts them there."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import NamedTuple

from msgspec.structs import replace

from ..broker.callbacks import CallbackRules, NotAllowed
from ..broker.errors import BadEnvelope, BadValue, MQServeError
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import AGAIN_AFTER_S, RateLimitedLog
from ..broker.process.tasks import Tasks
from ..broker.queue import Consumption
from ..broker.store import Store
from ..broker.values.webhook_signing import WebhookSigner
from ..broker.webhooks import Webhook, WebhookDelivery, Webhooks, next_wait_s
from .receivers import NotReceived, Receivers

logger = logging.getLogger(__name__)

HELD = 256  # webhooks that are on their way at once: a slow receiver holds up others only beyond that
DECLARE_AGAIN_S = 15.0  # a broker may come back empty
TRY_AGAIN_S = 1.0
MAX_ERROR = 500  # characters
_GONE = 410  # the receiver wants no more
_LAST_ANSWERS_S = 2.0


class Failure(NamedTuple):
    """Why a webhook was not delivered. A final one is not tried again."""

    error: str
    is_final: bool = False
    retry_after_s: float = 0.0  # what the receiver asks for


class WebhookSending:
    """Takes webhooks from their queue while it is told to (`go_on`, `stop`), and posts each to its receiver. A webhook is acked once it is
    delivered, or the broker has it elsewhere."""

    def __init__(self, webhooks: Webhooks, store: Store, signer: WebhookSigner, rules: CallbackRules, receivers: Receivers) -> None:
        self._webhooks = webhooks
        self._store = store
        self._signer = signer
        self._rules = rules
        self._receivers = receivers
        self._keeping: asyncio.Task[None] | None = None
        self._consumption: Consumption | None = None
        self._tasks = Tasks()
        self.given_up = 0  # how many are dead letters
        self._waits, self._trouble = RateLimitedLog(logger), RateLimitedLog(logger)
        self._warned_at: dict[str, float] = {}  # by receiver, within the last AGAIN_AFTER_S

    def __repr__(self) -> str:
        return f"<WebhookSending, {len(self._tasks)} on their way{', stopped' if self._keeping is None else ''}>"

    def go_on(self) -> None:
        """Takes webhooks from now on. The broker may be away."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="consume the webhooks")

    async def stop(self) -> None:
        """Takes no more. Those that are on their way are finished, or given back after a moment."""
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        consumption, self._consumption = self._consumption, None
        if consumption is not None:
            await consumption.cancel()
        await self._tasks.wait(_LAST_ANSWERS_S)
        self._tasks.cancel()

    async def _keep(self) -> None:
        while True:
            pause_s = DECLARE_AGAIN_S
            try:
                self.given_up = await self._webhooks.declare()
                if self._consumption is None:
                    self._consumption = await self._webhooks.consume(HELD, self._take)
                self._waits.over()
            except MQServeError as error:
                self._waits.say(f"webhooks wait: {error}")
                pause_s = TRY_AGAIN_S
            await asyncio.sleep(pause_s)

    def _take(self, delivery: WebhookDelivery) -> None:
        self._tasks.start(self._settle(delivery))

    async def _settle(self, delivery: WebhookDelivery) -> None:
        try:
            webhook = delivery.webhook()
        except BadEnvelope as error:
            logger.warning("a message among the webhooks is dropped: %s", error)
            return delivery.ack()
        try:
            failure = await self._post(webhook)
            if failure is not None:
                await self._put_off(delivery, webhook, failure)
        except asyncio.CancelledError:
            delivery.requeue()
            raise
        delivery.ack()

    async def _post(self, webhook: Webhook) -> Failure | None:
        """Returns None once the receiver has it."""
        body = webhook.body.encode()
        try:
            url = self._rules.check(webhook.url)
            headers = self._signer.headers(webhook.id, body, int(time.time()))
            answer = await self._receivers.post(url, {"Content-Type": "application/json", "User-Agent": "mqserve", **headers}, body)
        except (NotAllowed, NotReceived) as error:  # another controller may have other settings, or this one soon
            return Failure(str(error))
        except BadValue as error:
            return Failure(str(error), is_final=True)
        except Exception as error:
            logger.exception("webhook %s was not sent: that is a bug in mqserve, please report it", printable(webhook.id))
            return Failure(repr(error))
        if 200 <= answer.status < 300:
            return None
        return Failure(f"the receiver answered with status {answer.status}", answer.status == _GONE, answer.retry_after_s)

    async def _put_off(self, delivery: WebhookDelivery, webhook: Webhook, failure: Failure) -> None:
        """Returns once the broker has the webhook among those that wait, or among the dead ones; or delivers it again anyway."""
        wait_s = None if failure.is_final else next_wait_s(webhook, self._store.now_ms(), failure.retry_after_s)
        failed = replace(webhook, tries=webhook.tries + 1, error=failure.error[:MAX_ERROR])
        while not delivery.is_lost:
            try:
                if wait_s is None:
                    await self._webhooks.set_aside(failed)
                else:
                    await self._webhooks.wait(failed, wait_s)
                self._trouble.over()
                return self._tell(failed, wait_s)
            except MQServeError as error:
                self._trouble.say(f"a webhook that its receiver did not take stays where it is: {error}")
            except Exception:
                logger.exception("a webhook stays where it is: that is a bug in mqserve, please report it")
            await asyncio.sleep(TRY_AGAIN_S)

    def _tell(self, failed: Webhook, wait_s: int | None) -> None:
        name, receiver, why = printable(failed.id), printable(failed.receiver), printable(failed.error)
        if wait_s is None:
            logger.error("webhook %s to %s is given up, and is a dead letter now: %s", name, receiver, why)
        else:
            level = logging.WARNING if self._may_warn(receiver) else logging.INFO
            logger.log(level, "webhook %s to %s is sent again in %d s: %s", name, receiver, wait_s, why)

    def _may_warn(self, receiver: str) -> bool:
        """Whether nothing was said of that receiver for a while: one that is down is said once a minute, whatever waits for it."""
        now = time.monotonic()
        if now - self._warned_at.get(receiver, -math.inf) < AGAIN_AFTER_S:
            return False
        self._warned_at = {name: at for name, at in self._warned_at.items() if now - at < AGAIN_AFTER_S} | {receiver: now}
        return True
