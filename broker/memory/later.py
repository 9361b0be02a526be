"""Jobs in memory that wait for their time: timers of the event loop, and then the leading controller, as with RabbitMQ."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ..dead_letters import Death
from ..envelope import Envelope
from ..errors import MQServeError, Overloaded
from ..later import DueJob
from ..overload import HeldBytes
from ..queue import Settled

_MS = 0.001  # the clock of the store counts whole ones, and no job may come early by it


class EmbeddedDueJob:
    """Implements `DueJob`."""

    __slots__ = ("_envelope", "_later", "backend")
    endpoint: str | None = None  # nobody else can publish in memory
    wants_events = False

    def __init__(self, later: EmbeddedLater, backend: str, envelope: Envelope) -> None:
        self._later = later
        self._envelope = envelope
        self.backend = backend

    def __repr__(self) -> str:
        return f"<EmbeddedDueJob {self._envelope.id} for {self.backend!r}>"

    def envelope(self) -> Envelope:
        return self._envelope

    def ack(self) -> None:
        self._later.held.give(len(self._envelope.body))

    def requeue(self) -> None:
        self._later.come_due(self)


class EmbeddedTaking:
    """Implements `Consumption` of the jobs whose time has come. The latest one gets them."""

    def __init__(self, later: EmbeddedLater, on_due: Callable[[DueJob], None]) -> None:
        self._later = later
        self.on_due = on_due

    def __repr__(self) -> str:
        return f"<EmbeddedTaking of {self._later!r}>"

    def set_prefetch(self, prefetch: int) -> None:
        """Does nothing: a job is on its way for a loop turn."""

    async def cancel(self) -> None:
        if self._later.taking is self:
            self._later.taking = None


class EmbeddedLater:
    """Implements `Later`. `forward` puts a job among those of its backend, whatever room they
    leave, and returns NotRouted if there is none; `set_aside` makes it a dead letter."""

    def __init__(
        self,
        held: HeldBytes,
        forward: Callable[[str, Envelope], MQServeError | None],
        set_aside: Callable[[str, Envelope, Death], None],
    ) -> None:
        self.held = held
        self._forward = forward
        self._set_aside = set_aside
        self._timers: set[asyncio.TimerHandle] = set()
        self._due: deque[DueJob] = deque()
        self.taking: EmbeddedTaking | None = None

    def __repr__(self) -> str:
        return f"<EmbeddedLater, {len(self._timers)} waiting, {len(self._due)} due>"

    def put(self, backend: str, envelope: Envelope, delay_s: float, settled: Settled) -> None:
        try:
            self.held.take(len(envelope.body))
        except Overloaded as error:
            return settled(error)
        self._start_timer(EmbeddedDueJob(self, backend, envelope), delay_s)
        settled(None)

    def _start_timer(self, job: DueJob, delay_s: float) -> None:
        def come_due() -> None:
            self._timers.discard(timer)
            self.come_due(job)

        timer = asyncio.get_running_loop().call_later(delay_s + _MS, come_due)
        self._timers.add(timer)

    def come_due(self, job: DueJob) -> None:
        if self.taking is None:
            self._due.append(job)
        else:
            self.taking.on_due(job)

    async def declare(self) -> int:
        """Does nothing: there are no queues."""
        return 0

    async def delete_if_empty(self) -> None:
        """Does nothing."""

    async def consume(self, prefetch: int, on_due: Callable[[DueJob], None]) -> EmbeddedTaking:
        self.taking = EmbeddedTaking(self, on_due)
        while self._due:
            on_due(self._due.popleft())
        return self.taking

    async def forward(self, job: DueJob) -> None:
        if error := self._forward(job.backend, job.envelope()):
            raise error

    async def wait(self, job: DueJob, left_ms: int) -> bool:
        self.held.take_back(len(job.envelope().body))  # the message that is acked now gives as much
        self._start_timer(EmbeddedDueJob(self, job.backend, job.envelope()), left_ms / 1000)
        return True

    async def set_aside(self, job: DueJob, death: Death) -> None:
        self._set_aside(job.backend, job.envelope(), death)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._due.clear()
