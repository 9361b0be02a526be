"""The queue in memory: per backend one queue (however many shards it is to have) and one for jobs, with priorities, a length limit,
prefetch and dead letters, on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ..dead_letters import DeadLetter, Death, dead_letter_to_amqp, read_properties
from ..envelope import Envelope, persistent
from ..errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded, QueueMismatch, UnknownBackend
from ..overload import HeldBytes
from ..queue import Delivery, Settled
from ..queue_names import DEAD_LETTER_LIMIT, MAX_PRIORITY
from .dead_letters import EmbeddedDeadLetters
from .later import EmbeddedLater
from .webhooks import EmbeddedWebhooks

MAX_WAITING_BYTES = 256 * 1024 * 1024  # for all queues together, because they use this process's memory


class EmbeddedDelivery:
    """Implements `Delivery`."""

    __slots__ = ("_consumption", "_envelope", "_lane", "redelivered")

    def __init__(self, envelope: Envelope, lane: _Lane, consumption: EmbeddedConsumption, redelivered: bool) -> None:
        self._envelope = envelope
        self._lane = lane
        self._consumption = consumption
        self.redelivered = redelivered

    @property
    def wants_events(self) -> bool:
        return False  # there are no AMQP reply queues

    @property
    def is_job(self) -> bool:
        """Whether it came from the queue for jobs."""
        return self._lane.is_for_jobs

    def envelope(self) -> Envelope:
        return self._envelope

    def ack(self) -> None:
        self._consumption._settle()

    def requeue(self) -> None:
        self._lane.put_back(self._envelope)
        self._consumption._settle()


class EmbeddedConsumption:
    """Implements `Consumption`."""

    def __init__(self, lane: _Lane, prefetch: int, on_delivery: Callable[[Delivery], None]) -> None:
        self._lane = lane
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._unsettled = 0
        self._active = True

    def __repr__(self) -> str:
        return f"<EmbeddedConsumption of {self._lane!r}, {self._unsettled} of {self._prefetch} unsettled>"

    def set_prefetch(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._lane.wake()

    async def cancel(self) -> None:
        self._active = False
        if self in self._lane.consumers:
            self._lane.consumers.remove(self)

    @property
    def wants_more(self) -> bool:
        return self.room > 0

    @property
    def room(self) -> int:
        """Free prefetch: the number of deliveries it takes before it must settle one. Messages beyond that count against the queue's
        limit."""
        return max(0, self._prefetch - self._unsettled) if self._active else 0

    def take(self, envelope: Envelope, redelivered: bool) -> None:
        self._unsettled += 1
        self._on_delivery(EmbeddedDelivery(envelope, self._lane, self, redelivered))

    def _settle(self) -> None:
        self._unsettled -= 1
        self._lane.wake()


class _Waiting(NamedTuple):
    """`expires` is monotonic. A redelivered message has no expiry here: the replica checks its deadline."""

    envelope: Envelope
    redelivered: bool
    expires: float


@dataclass(eq=False)
class _Lane:
    """One queue of a generation of a backend. A priority above MAX_PRIORITY counts as that."""

    name: str
    max_length: int | None
    held: HeldBytes
    is_for_jobs: bool = False
    levels: list[deque[_Waiting]] = field(default_factory=lambda: [deque() for _ in range(MAX_PRIORITY + 1)])
    consumers: list[EmbeddedConsumption] = field(default_factory=list)
    _turns: itertools.count[int] = field(default_factory=itertools.count)
    _waking: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    is_gone: bool = False

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} waiting>"

    def __len__(self) -> int:
        return sum(map(len, self.levels))

    def put(self, envelope: Envelope) -> MQServeError | None:
        self._drop_late()
        if self.max_length is not None and len(self) >= self.max_length + sum(consumer.room for consumer in self.consumers):
            return Overloaded(f"{self.name} holds {self.max_length} waiting requests, its limit (max_queued_requests): try again later")
        try:
            self.held.take(len(envelope.body))
        except Overloaded as error:
            return error
        expires = time.monotonic() + envelope.expiration_ms / 1000 if envelope.expiration_ms else math.inf
        self.levels[min(envelope.priority, MAX_PRIORITY)].append(_Waiting(envelope, False, expires))
        self.wake()
        return None

    def put_accepted(self, envelope: Envelope) -> None:
        """Takes a message that was accepted before, and has waited elsewhere since."""
        self.held.take_back(len(envelope.body))
        self.levels[min(envelope.priority, MAX_PRIORITY)].append(_Waiting(envelope, False, math.inf))
        self.wake()

    def _drop_late(self) -> None:
        """Drops expired messages from the heads, as RabbitMQ does, so that they take no place from others."""
        now = time.monotonic()
        for level in self.levels:
            while level and level[0].expires <= now:
                self.held.give(len(level.popleft().envelope.body))

    def put_back(self, envelope: Envelope) -> None:
        if self.is_gone:  # a message that comes back after its queue was deleted is dropped, as on RabbitMQ
            return
        self.held.take_back(len(envelope.body))
        self.levels[min(envelope.priority, MAX_PRIORITY)].appendleft(_Waiting(envelope, True, math.inf))
        self.wake()

    def drop(self) -> None:
        """Drops all waiting messages, and from now on also those that are given back."""
        self.is_gone = True
        self.held.give(sum(len(envelope.body) for level in self.levels for envelope, _, _ in level))
        for level in self.levels:
            level.clear()

    def wake(self) -> None:
        """Schedules one delivery round for this loop turn, however often it is called."""
        if not self._waking:
            self._waking = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._waking = False
        for level in reversed(self.levels):
            # each message once per round: a draining consumer requeues at once, and would keep this loop going for ever
            for _ in range(len(level)):
                ready = [consumer for consumer in self.consumers if consumer.wants_more]
                if not ready:
                    return
                envelope, redelivered, _ = level.popleft()
                self.held.give(len(envelope.body))
                ready[next(self._turns) % len(ready)].take(envelope, redelivered)


class _Generation(NamedTuple):
    """The two queues of one generation of a backend."""

    waits: _Lane
    jobs: _Lane

    def is_idle(self) -> bool:
        """Whether nothing waits in them, and nobody consumes them."""
        return not any(len(lane) or lane.consumers for lane in self)


class EmbeddedQueue:
    """Implements `Queue`."""

    def __init__(self) -> None:
        self._generations: dict[tuple[str, int], _Generation] = {}
        self._bindings: dict[str, list[_Generation]] = {}
        self._held = HeldBytes(MAX_WAITING_BYTES)
        self._dead: dict[str, deque[DeadLetter]] = {}
        self.later = EmbeddedLater(self._held, self._forward, partial(self._bury, is_job=True))
        self.webhooks = EmbeddedWebhooks()

    def __repr__(self) -> str:
        return f"<EmbeddedQueue {list(self._generations.values())}>"

    @property
    def broker_version(self) -> str:
        return ""

    @property
    def down_s(self) -> float:
        return 0.0

    @property
    def why_down(self) -> str:
        return ""

    @property
    def trouble(self) -> str:
        return ""

    def publish(self, backend: str, envelope: Envelope, settled: Settled, shard: int = 0) -> None:
        envelope.check_head()
        bound = self._bindings.get(backend)
        if not bound:
            return settled(_not_routed(backend))
        refusals = [generation.waits.put(envelope) for generation in bound]
        settled(next((refusal for refusal in refusals if refusal), None))

    def publish_job(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        envelope.check_head()
        job = persistent(envelope)
        refusals = [generation.jobs.put(job) for generation in self._bindings.get(backend, ())]
        settled(next((refusal for refusal in refusals if refusal), None) if refusals else _not_routed(backend))

    def publish_later(self, backend: str, envelope: Envelope, delay_s: float, settled: Settled) -> None:
        envelope.check_head()
        self.later.put(backend, persistent(envelope), delay_s, settled)

    def _forward(self, backend: str, job: Envelope) -> NotRouted | None:
        """Puts a job whose time has come among the others, however many bytes these have: it was accepted before."""
        bound = self._bindings.get(backend)
        if not bound:
            return _not_routed(backend)
        for generation in bound:
            generation.jobs.put_accepted(job)
        return None

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        settled(None)  # the embedded form has no AMQP reply queues

    def dead_letter(self, backend: str, delivery: Delivery, death: Death, settled: Settled) -> None:
        assert isinstance(delivery, EmbeddedDelivery)
        self._bury(backend, delivery.envelope(), death, is_job=delivery.is_job)
        settled(None)

    def _bury(self, backend: str, envelope: Envelope, death: Death, *, is_job: bool) -> None:
        packed = dead_letter_to_amqp(backend, read_properties(envelope.to_amqp()), death, is_job=is_job)
        letters = self._dead.setdefault(backend, deque(maxlen=DEAD_LETTER_LIMIT))
        letters.append(DeadLetter.from_amqp(backend, read_properties(packed), envelope.body))

    @asynccontextmanager
    async def dead_letters(self, backend: str, at_most: int | None = None) -> AsyncIterator[EmbeddedDeadLetters]:
        letters = self._dead.get(backend)
        if letters is None:
            raise UnknownBackend(f"there is no backend {backend!r}, and there are no dead letters of one")
        taken = EmbeddedDeadLetters(letters, at_most)
        try:
            yield taken
        finally:
            taken.put_back()
            if letters:
                self._dead[backend] = letters  # an empty deque may have been deleted meanwhile

    def republish(self, letter: DeadLetter, settled: Settled) -> None:
        publish = self.publish_job if letter.is_job else self.publish
        publish(letter.backend, letter.envelope(), settled)

    async def consume(
        self,
        backend: str,
        generation: int,
        prefetch: int,
        on_delivery: Callable[[Delivery], None],
        shards: int = 1,
        *,
        jobs: bool = False,
    ) -> EmbeddedConsumption:
        found = self._generations.get((backend, generation))
        if found is None:
            raise BrokerUnavailable(f"there is no generation {generation} of the queue of {backend!r}")
        lane = found.jobs if jobs else found.waits
        consumption = EmbeddedConsumption(lane, prefetch, on_delivery)
        lane.consumers.append(consumption)
        lane.wake()
        return consumption

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int = 1) -> None:
        name = f"{backend}.{generation}"
        lanes = _Lane(name, max_length, self._held), _Lane(f"{name}, for jobs", None, self._held, is_for_jobs=True)
        found = self._generations.setdefault((backend, generation), _Generation(*lanes))
        if found.waits.max_length != max_length:
            raise QueueMismatch(f"generation {generation} of the queue of {backend!r} exists with other arguments")
        self._dead.setdefault(backend, deque(maxlen=DEAD_LETTER_LIMIT))
        bound = self._bindings.setdefault(backend, [])
        if found not in bound:
            bound.append(found)

    async def count_shards(self, backend: str, generation: int, known: int = 0) -> int:
        return known or int((backend, generation) in self._generations)

    async def unbind(self, backend: str, generation: int, shards: int = 1) -> None:
        found = self._generations.get((backend, generation))
        if found is not None and found in (bound := self._bindings.get(backend, [])):
            bound.remove(found)
            if not bound:
                del self._bindings[backend]

    async def depth(self, backend: str, generation: int, shards: int = 1) -> int | None:
        found = self._generations.get((backend, generation))
        return None if found is None else sum(map(len, found))

    async def count_jobs(self, backend: str, generation: int) -> int | None:
        found = self._generations.get((backend, generation))
        return None if found is None else len(found.jobs)

    async def count_dead(self, backend: str) -> int | None:
        letters = self._dead.get(backend)
        return None if letters is None else len(letters)

    async def delete(self, backend: str, generation: int, shards: int = 1, *, only_if_empty: bool) -> bool:
        found = self._generations.get((backend, generation))
        if found is not None and only_if_empty and not found.is_idle():
            return False
        await self.unbind(backend, generation)
        for lane in self._generations.pop((backend, generation), ()):
            lane.drop()
        if not only_if_empty and not self._dead.get(backend):
            self._dead.pop(backend, None)
        return True

    async def close(self) -> None:
        self.later.close()
        self.webhooks.close()
        self._generations.clear()
        self._bindings.clear()


def _not_routed(backend: str) -> NotRouted:
    return NotRouted(f"no queue is bound to {backend!r}: is the backend deployed?")
