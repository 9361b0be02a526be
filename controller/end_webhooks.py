"""The webhooks that tell of the ends of jobs: the leader puts them into their queue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

from ..broker.callbacks import CallbackRules, NotAllowed
from ..broker.errors import BadEnvelope, BadValue, MQServeError
from ..broker.jobs import EndNote
from ..broker.values.webhook_signing import WebhookSigner
from ..broker.webhooks import VERSION, Webhook, Webhooks


class EndWebhooks:
    """`futures_path` is where proxies answer about jobs."""

    def __init__(self, webhooks: Webhooks, signer: WebhookSigner, rules: CallbackRules, now_ms: Callable[[], int]) -> None:
        self._webhooks = webhooks
        self._signer = signer
        self._rules = rules
        self._now_ms = now_ms
        self._is_declared = False
        self.futures_path = ""

    def __repr__(self) -> str:
        return f"<EndWebhooks to {self._webhooks!r}>"

    async def send(self, end: EndNote) -> None:
        """Returns once the broker has the webhook. Raises the broker's errors, and BadEnvelope for an end that is told to nobody."""
        webhook = self._webhook_of(end)
        try:
            if not self._is_declared:
                await self._webhooks.declare()
                self._is_declared = True
            await self._webhooks.send(webhook)
        except MQServeError:
            self._is_declared = False  # the broker may come back empty
            raise

    def _webhook_of(self, end: EndNote) -> Webhook:
        try:
            with suppress(NotAllowed):  # those who send it may have other settings, and keep it until they have
                self._rules.check(end.callback)
            at = datetime.fromtimestamp(end.ended_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        except (BadValue, ValueError, OverflowError) as error:  # of a time that is none: all senders may write to the outbox
            raise BadEnvelope(f"it is told to nobody: {error}") from error
        event = f"job.{end.state}"
        data = {
            "id": end.id,
            "status": end.state,
            "endpoint": end.endpoint,
            "result_url": f"{self.futures_path}/{quote(end.id, safe='')}/result",
        }
        body = msgspec.json.encode({"type": event, "timestamp": at, "data": data}).decode()
        return Webhook(VERSION, self._signer.id_of(end.id, event), end.callback, body, self._now_ms())
