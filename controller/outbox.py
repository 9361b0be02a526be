"""The outbox: what follows from the ends of jobs. The leading controller sends it, and then removes the entry, so it is sent again where
the leader dies in between, under the same id."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

from ..broker.callbacks import CallbackRules
from ..broker.errors import BadEnvelope, MQServeError
from ..broker.jobs import EndNote
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.ticks import next_tick_s
from ..broker.store import Store
from ..broker.values.webhook_signing import WebhookSigner
from ..broker.webhooks import VERSION, Webhook, Webhooks
from .chords import Chords

logger = logging.getLogger(__name__)

SENT_AT_ONCE = 100
LOOK_EVERY_S = 1.0


class Outbox:
    """Sends while it is told to (`go_on`, `stop`)."""

    def __init__(self, store: Store, webhooks: Webhooks, signer: WebhookSigner, rules: CallbackRules, chords: Chords) -> None:
        self._store = store
        self._chords = chords
        self._webhooks = webhooks
        self._signer = signer
        self._rules = rules
        self._futures_path = ""
        self._is_declared = False
        self._task: asyncio.Task[None] | None = None
        self._trouble, self._odd = RateLimitedLog(logger), RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Outbox{', stopped' if self._task is None else ''}>"

    def go_on(self, futures_path: str) -> None:
        """Sends from now on. `futures_path` is where proxies answer about jobs."""
        self._futures_path = futures_path
        if self._task is None:
            self._task = asyncio.create_task(self._send_forever(), name="send what follows from the ends of jobs")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _send_forever(self) -> None:
        while True:
            try:
                is_empty = await self.send_some() < SENT_AT_ONCE
                self._trouble.over()
            except MQServeError as error:
                self._is_declared = False  # the broker may come back empty
                self._trouble.say(f"what follows from the ends of jobs waits: {error}")
                is_empty = True
            except Exception:
                logger.exception("what follows from the ends of jobs waits: that is a bug in mqserve, please report it")
                is_empty = True
            if is_empty:
                await asyncio.sleep(next_tick_s(LOOK_EVERY_S))

    async def send_some(self) -> int:
        """Sends the first entries, and returns how many there were. Raises the errors of broker and store."""
        entries = await self._store.jobs.ends(SENT_AT_ONCE)
        if entries:
            for entry in entries:
                with suppress(BadEnvelope):
                    if group_id := EndNote.from_bytes(entry.note).group:
                        await self._chords.follow(group_id)
            found = [webhook for entry in entries if (webhook := self._webhook_of(entry.note)) is not None]
            if found and not self._is_declared:
                await self._webhooks.declare()
                self._is_declared = True
            await asyncio.gather(*map(self._webhooks.send, found))
            await self._store.jobs.drop_ends(entries[-1].place)
        return len(entries)

    def _webhook_of(self, raw: bytes) -> Webhook | None:
        try:
            end = EndNote.from_bytes(raw)
            if end.group:
                return None
            self._rules.check(end.callback)
            at = datetime.fromtimestamp(end.ended_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        except (BadEnvelope, ValueError, OverflowError) as error:  # the last two are of a time that is none: all senders may write here
            self._odd.say(f"the end of a job is told to nobody: {error}")
            return None
        event = f"job.{end.state}"
        data = {
            "id": end.id,
            "status": end.state,
            "endpoint": end.endpoint,
            "result_url": f"{self._futures_path}/{quote(end.id, safe='')}/result",
        }
        body = msgspec.json.encode({"type": event, "timestamp": at, "data": data}).decode()
        return Webhook(VERSION, self._signer.id_of(end.id, event), end.callback, body, self._store.now_ms())
