"""The queues on RabbitMQ in which jobs wait for their time."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from functools import partial

from pamqp.commands import Basic

from .. import queue_names
from ..dead_letters import Death, dead_letter_to_amqp, pack_properties
from ..envelope import Envelope
from ..errors import BadValue
from ..later import WAITS_S, DueJob, longest_wait_s
from ..queue import Consumption, Settled, fate_of
from ..values.header_seals import HeaderSeals
from .connection import OPERATION_BUDGET_S
from .consumer import AddressedDelivery, RabbitDelivery
from .topology import RabbitTopology
from .waits import RabbitWaits

Publish = Callable[[str, str, bytes, bytes, str, Settled], None]
"""Publishes to an exchange: its name, routing key, packed properties, body, message id, and whom to tell."""

ConsumeQueue = Callable[[str, int, Callable[[RabbitDelivery], None]], Awaitable[Consumption]]


class RabbitDueJob:
    """Implements `DueJob`."""

    __slots__ = ("_seals", "backend", "delivery", "endpoint")

    def __init__(self, delivery: RabbitDelivery, seals: HeaderSeals, endpoint: str | None) -> None:
        self.delivery = delivery
        self.endpoint = endpoint
        self.backend = _name((delivery.properties.headers or {}).get("mq-to")) if endpoint is None else ""
        self._seals = seals

    def __repr__(self) -> str:
        target = repr(self.backend) if self.endpoint is None else f"endpoint {self.endpoint!r}"
        return f"<RabbitDueJob {self.delivery.properties.message_id} for {target}>"

    @property
    def wants_events(self) -> bool:
        return self.delivery.wants_events

    def envelope(self) -> Envelope:
        seals = self._seals.of(self.backend) if self.endpoint is None else None
        return Envelope.from_amqp(self.delivery.properties, self.delivery.body, seals)

    def ack(self) -> None:
        self.delivery.ack()

    def requeue(self) -> None:
        self.delivery.requeue()


class RabbitLater:
    """Implements `Later`. `publish` and `consume_queue` are those of the process's queue, `user` its AMQP user."""

    def __init__(
        self, namespace: str, topology: RabbitTopology, seals: HeaderSeals, user: str, publish: Publish, consume_queue: ConsumeQueue
    ) -> None:
        self._namespace = namespace
        self._topology = topology
        self._seals = seals
        self._user = user
        self._publish = publish
        self._consume_queue = consume_queue
        exchange, target = queue_names.later_exchange(namespace), queue_names.due_queue(namespace)
        self._waits = RabbitWaits(topology, exchange, target, partial(queue_names.later_queue, namespace), WAITS_S)

    def __repr__(self) -> str:
        return f"<RabbitLater of {self._namespace!r}>"

    async def declare(self) -> int:
        await self._topology.declare_due()
        return await self._topology.count_dead(queue_names.ENDPOINTS) or 0

    async def delete_if_empty(self) -> None:
        await self._waits.delete_if_empty()
        await self._topology.delete_empty([queue_names.dead_queue(self._namespace, queue_names.ENDPOINTS)])

    async def consume(self, prefetch: int, on_due: Callable[[DueJob], None]) -> Consumption:
        endpoints = queue_names.endpoints_exchange(self._namespace)

        def hand_over(delivery: RabbitDelivery) -> None:
            assert isinstance(delivery, AddressedDelivery)
            endpoint = delivery.routing_key if delivery.exchange == endpoints else None
            on_due(RabbitDueJob(delivery, self._seals, endpoint))

        return await self._consume_queue(queue_names.due_queue(self._namespace), prefetch, hand_over)

    async def forward(self, job: DueJob) -> None:
        await self._publish_now(queue_names.jobs_exchange(self._namespace), job.backend, job, self._properties(job))

    async def wait(self, job: DueJob, left_ms: int) -> bool:
        wait_s, exchange = longest_wait_s(left_ms), queue_names.later_exchange(self._namespace)
        if fresh_s := await self._waits.fresh_s(wait_s):
            await asyncio.sleep(min(fresh_s, left_ms / 1000))
            return False
        properties = self._properties(job, to=job.backend)
        await self._waits.put(wait_s, lambda key: self._publish_now(exchange, key, job, properties))
        return True

    async def set_aside(self, job: DueJob, death: Death) -> None:
        backend, properties = job.backend, _cleared(job)
        if job.endpoint is None:
            await self._topology.declare_dead_letters(backend)
        else:  # anybody may send many of them, so their queue is declared once
            backend, properties = queue_names.ENDPOINTS, _delivery(job).properties
        packed = dead_letter_to_amqp(backend, properties, death, is_job=True, endpoint=job.endpoint)
        await self._publish_now(queue_names.dead_exchange(self._namespace), backend, job, packed)

    def _properties(self, job: DueJob, *, to: str = "") -> bytes:
        """Packs the properties of the message, to be published by this process's user, without what RabbitMQ noted when it moved it."""
        properties = _cleared(job)
        if to:
            properties.headers = {**(properties.headers or {}), "mq-to": to}
        properties.user_id = self._user or None
        properties.delivery_mode = 2
        return pack_properties(properties)

    async def _publish_now(self, exchange: str, key: str, job: DueJob, properties: bytes) -> None:
        delivery = _delivery(job)
        publish = partial(self._publish, exchange, key, properties, delivery.body, delivery.properties.message_id or "")
        if error := await fate_of(publish, OPERATION_BUDGET_S):
            raise error


def _delivery(job: DueJob) -> RabbitDelivery:
    assert isinstance(job, RabbitDueJob)
    return job.delivery


def _cleared(job: DueJob) -> Basic.Properties:
    """Returns a copy of the properties with our own headers only, and without an expiration."""
    properties = _delivery(job).properties
    cleared = copy.copy(properties)
    cleared.headers = {name: value for name, value in (properties.headers or {}).items() if name in ("mq", "mq-seal")}
    cleared.expiration = None
    return cleared


def _name(value: object) -> str:
    try:
        return queue_names.check_name(value, "a backend") if isinstance(value, str) else ""
    except BadValue:
        return ""
