"""Webhooks in memory: they end with the process, as the jobs of the embedded form do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pamqp.commands import Basic

from ..dead_letters import DeadLetter, Death
from ..queue_names import DEAD_LETTER_LIMIT
from ..webhooks import Webhook, WebhookDelivery
from .dead_letters import EmbeddedDeadLetters


class EmbeddedWebhookDelivery:
    """Implements `WebhookDelivery`."""

    __slots__ = ("_queue", "_webhook")

    def __init__(self, queue: EmbeddedWebhooks, webhook: Webhook) -> None:
        self._queue = queue
        self._webhook = webhook

    def __repr__(self) -> str:
        return f"<EmbeddedWebhookDelivery {self._webhook.id}>"

    @property
    def is_lost(self) -> bool:
        return False

    def webhook(self) -> Webhook:
        return self._webhook

    def ack(self) -> None:
        self._queue.settle()

    def requeue(self) -> None:
        self._queue.waiting.appendleft(self._webhook)
        self._queue.settle()


class EmbeddedWebhookTaking:
    """Implements `Consumption` of the webhooks. The latest one gets them."""

    def __init__(self, queue: EmbeddedWebhooks, prefetch: int, on_delivery: Callable[[WebhookDelivery], None]) -> None:
        self._queue = queue
        self.prefetch = prefetch
        self.on_delivery = on_delivery

    def __repr__(self) -> str:
        return f"<EmbeddedWebhookTaking of {self._queue!r}>"

    def set_prefetch(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self._queue.deliver()

    async def cancel(self) -> None:
        if self._queue.taking is self:
            self._queue.taking = None


class EmbeddedWebhooks:
    """Implements `Webhooks`: timers of the event loop stand for the queues in which webhooks wait."""

    def __init__(self) -> None:
        self.waiting: deque[Webhook] = deque()
        self.taking: EmbeddedWebhookTaking | None = None
        self._unsettled = 0
        self._timers: set[asyncio.TimerHandle] = set()
        self._dead: deque[DeadLetter] = deque(maxlen=DEAD_LETTER_LIMIT)

    def __repr__(self) -> str:
        return f"<EmbeddedWebhooks, {len(self.waiting) + len(self._timers)} waiting, {len(self._dead)} dead>"

    async def declare(self) -> int:
        """Only counts: there are no queues."""
        return len(self._dead)

    async def delete_if_empty(self) -> None:
        """Does nothing."""

    async def consume(self, prefetch: int, on_delivery: Callable[[WebhookDelivery], None]) -> EmbeddedWebhookTaking:
        self.taking = EmbeddedWebhookTaking(self, prefetch, on_delivery)
        self.deliver()
        return self.taking

    async def send(self, webhook: Webhook) -> None:
        self.waiting.append(webhook)
        self.deliver()

    async def wait(self, webhook: Webhook, wait_s: int) -> None:
        def come_due() -> None:
            self._timers.discard(timer)
            self.waiting.append(webhook)
            self.deliver()

        timer = asyncio.get_running_loop().call_later(wait_s, come_due)
        self._timers.add(timer)

    async def set_aside(self, webhook: Webhook) -> None:
        self._dead.append(DeadLetter("", Death(webhook.error), Basic.Properties(message_id=webhook.id), webhook.to_bytes()))

    @asynccontextmanager
    async def dead(self, at_most: int | None = None) -> AsyncIterator[EmbeddedDeadLetters]:
        taken = EmbeddedDeadLetters(self._dead, at_most)
        try:
            yield taken
        finally:
            taken.put_back()

    def deliver(self) -> None:
        """Hands over what the consumer has room for."""
        while self.waiting and self.taking is not None and self._unsettled < self.taking.prefetch:
            self._unsettled += 1
            self.taking.on_delivery(EmbeddedWebhookDelivery(self, self.waiting.popleft()))

    def settle(self) -> None:
        self._unsettled -= 1
        self.deliver()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self.waiting.clear()
