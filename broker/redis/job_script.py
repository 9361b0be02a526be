"""Takes steps of jobs: one script call for all of a loop turn, over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import StoreUnavailable
from ..jobs import JOB_RESULT_TTL_S, KEPT_ATTEMPTS, KEPT_EVENTS, LEASE_MS, MESSAGE_TTL_S, UNENDED_TTL_S, WAIT_TTL_S
from ..store_keys import INBOX_TTL_S, StoreKeys
from .batch_script import BatchScript, OnTaken, ScriptCall
from .batch_sender import CALL_BUDGET_S
from .batch_writer import BatchWriter
from .client import naming_the_key
from .hot_wire import HotWire, packed
from .kept_wire import KeptWire

_READS = frozenset(["read", "place", "group"])
_ANSWER_S = CALL_BUDGET_S + 0.5  # a batch that fails says why by then; a step that still waits for another batch is not taken any more

OnOutcome = Callable[[Any], None]
"""Called once with the outcome of a step, or with an exception."""


class Step(NamedTuple):
    """A step of one job: its name in the script, the key of the record, and the script's arguments by their names."""

    name: str
    record: str
    arguments: dict[str, str | bytes | int]


class JobSteps(BatchWriter[Step]):
    """Batches steps. A batch that fails is told so, and not taken again: its callers know what has changed meanwhile."""

    what = "steps of jobs"

    def __init__(self, take: Callable[[Sequence[Step], OnTaken], None]) -> None:
        super().__init__()
        self._take = take
        self._left: set[OnOutcome] = set()  # those of callers who do not wait any more

    def take_then(self, step: Step, on_outcome: OnOutcome) -> None:
        self._buffer.append((step, on_outcome))
        self._flush_soon()

    async def take(self, step: Step) -> Any:
        """Returns the outcome. Raises StoreUnavailable, at the latest after _ANSWER_S."""
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_outcome(found: Any) -> None:
            if not outcome.done():  # its reader was cancelled
                outcome.set_result(found)

        self.take_then(step, on_outcome)
        try:
            async with asyncio.timeout(_ANSWER_S):
                found = await outcome
        except TimeoutError:
            raise StoreUnavailable(f"Redis took no step of a job within {_ANSWER_S:g} s") from None
        finally:
            if outcome.cancelled():  # with its reader
                self._left.add(on_outcome)
        if isinstance(found, Exception):
            raise found
        return found

    def _flush(self) -> None:
        if self._left:  # nobody wants their steps taken any more
            left, self._left = self._left, set()
            self._buffer = [waiting for waiting in self._buffer if waiting[1] not in left]
        super()._flush()

    def _send(self) -> None:
        self._take([step for step, _ in self._batch], self._written)

    def _size(self, entry: Step) -> int:
        return sum(len(value) for value in entry.arguments.values() if isinstance(value, bytes))


class _Call(ScriptCall):
    __slots__ = ("script", "steps")

    def __init__(self, script: JobScript, steps: Sequence[Step], on_taken: OnTaken) -> None:
        super().__init__(on_taken)
        self.script = script
        self.steps = steps

    @property
    def keys(self) -> Sequence[str]:
        return [step.record for step in self.steps]

    def packed_for(self, wire: HotWire) -> bytes:
        values: list[str | bytes | int] = []
        for step in self.steps:
            values += (step.name, len(step.arguments))
            for name, value in step.arguments.items():
                values += (name, value)
        return packed(*self.script.command(self), len(self.steps), *self.keys, *self.script.constants, *values)

    def replied(self, replies: list[Any] | Exception) -> None:
        self.script.replied(self, replies)


class JobScript(BatchScript[_Call]):
    """Takes steps of jobs: an outcome may be an error, which is that step's alone."""

    def __init__(
        self,
        wire: KeptWire,
        keys: StoreKeys,
        on_wrote: Callable[[], None],
        on_odd_key: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        super().__init__("jobs", wire, on_wrote, on_odd_key, on_failed)
        ttls_s = (UNENDED_TTL_S, WAIT_TTL_S, MESSAGE_TTL_S, JOB_RESULT_TTL_S)
        times = (INBOX_TTL_S * 1000, LEASE_MS, *(ttl_s * 1000 for ttl_s in ttls_s))
        record = keys.job("").removesuffix("}")
        self.constants: tuple[str | int, ...] = (keys.jobs, keys.ends, record, *times, KEPT_EVENTS, KEPT_ATTEMPTS)

    def take(self, steps: Sequence[Step], on_taken: OnTaken) -> None:
        """`on_taken` is called once, later."""
        self._sender.send(_Call(self, steps, on_taken))

    def _taken(self, call: _Call, outcomes: list[Any]) -> None:
        for at, (step, outcome) in enumerate(zip(call.steps, outcomes, strict=True)):
            if isinstance(outcome, Exception):
                outcomes[at] = self._on_failed(naming_the_key(outcome, ("EVALSHA", step.record)), call.began, step.name not in _READS)
            elif step.name not in _READS:
                self._on_wrote()
        call.on_taken(outcomes)
