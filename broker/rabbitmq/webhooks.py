"""The queues of webhooks on RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from pamqp.commands import Basic

from .. import queue_names
from ..dead_letters import pack_properties
from ..queue import Consumption, fate_of
from ..webhooks import WAITS_S, Webhook, WebhookDelivery
from .connection import OPERATION_BUDGET_S, Link
from .consumer import RabbitDelivery
from .dead_letters import RabbitDeadLetters, open_dead_letters
from .later import ConsumeQueue, Publish
from .topology import RabbitTopology
from .waits import RabbitWaits


class RabbitWebhookDelivery:
    """Implements `WebhookDelivery`."""

    __slots__ = ("_delivery",)

    def __init__(self, delivery: RabbitDelivery) -> None:
        self._delivery = delivery

    def __repr__(self) -> str:
        return f"<RabbitWebhookDelivery {self._delivery.properties.message_id}>"

    @property
    def is_lost(self) -> bool:
        return self._delivery.is_lost

    def webhook(self) -> Webhook:
        return Webhook.from_bytes(self._delivery.body)

    def ack(self) -> None:
        self._delivery.ack()

    def requeue(self) -> None:
        self._delivery.requeue()


class RabbitWebhooks:
    """Implements `Webhooks`. `publish` and `consume_queue` are those of the process's queue."""

    def __init__(self, namespace: str, topology: RabbitTopology, publish: Publish, consume_queue: ConsumeQueue, consuming: Link) -> None:
        self._namespace = namespace
        self._topology = topology
        self._publish = publish
        self._consume_queue = consume_queue
        self._consuming = consuming
        exchange, target = queue_names.webhooks_exchange(namespace), queue_names.webhooks_queue(namespace)
        self._waits = RabbitWaits(topology, exchange, target, partial(queue_names.webhooks_wait_queue, namespace), WAITS_S)

    def __repr__(self) -> str:
        return f"<RabbitWebhooks of {self._namespace!r}>"

    async def declare(self) -> int:
        return await self._topology.declare_webhooks()

    async def delete_if_empty(self) -> None:
        await self._topology.delete_empty([queue_names.dead_webhooks_queue(self._namespace)])
        await self._waits.delete_if_empty()

    async def consume(self, prefetch: int, on_delivery: Callable[[WebhookDelivery], None]) -> Consumption:
        def hand_over(delivery: RabbitDelivery) -> None:
            on_delivery(RabbitWebhookDelivery(delivery))

        return await self._consume_queue(queue_names.webhooks_queue(self._namespace), prefetch, hand_over)

    async def send(self, webhook: Webhook) -> None:
        await self._publish_now(queue_names.DUE_KEY, webhook)

    async def wait(self, webhook: Webhook, wait_s: int) -> None:
        await self._waits.put(wait_s, lambda key: self._publish_now(key, webhook))

    async def set_aside(self, webhook: Webhook) -> None:
        await self._publish_now(queue_names.DEAD_KEY, webhook)

    def dead(self, at_most: int | None = None) -> AbstractAsyncContextManager[RabbitDeadLetters]:
        return open_dead_letters(self._consuming, queue_names.dead_webhooks_queue(self._namespace), queue_names.DEAD_KEY, at_most)

    async def _publish_now(self, key: str, webhook: Webhook) -> None:
        properties = pack_properties(Basic.Properties(content_type="application/json", delivery_mode=2, message_id=webhook.id))
        exchange = queue_names.webhooks_exchange(self._namespace)
        if error := await fate_of(partial(self._publish, exchange, key, properties, webhook.to_bytes(), webhook.id), OPERATION_BUDGET_S):
            raise error
