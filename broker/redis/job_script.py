"""Takes steps of jobs: one script call for all of a loop turn, over a connection of its own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redis.exceptions import InvalidResponse, NoScriptError

from ..errors import StoreUnavailable
from ..jobs import JOB_RESULT_TTL_S, KEPT_ATTEMPTS, KEPT_EVENTS, LEASE_MS, MESSAGE_TTL_S, UNENDED_TTL_S, WAIT_TTL_S
from ..store_keys import INBOX_TTL_S, StoreKeys
from .batch_sender import CALL_BUDGET_S, Batch, BatchSender
from .batch_writer import BatchWriter
from .client import FAILURES, naming_the_key
from .hot_wire import HotWire, packed
from .kept_wire import KeptWire

TEXT = (Path(__file__).parent / "jobs.lua").read_text()
_DIGEST = hashlib.sha1(TEXT.encode(), usedforsecurity=False).hexdigest()
_READS = frozenset(["read", "place", "group"])
_ANSWER_S = CALL_BUDGET_S + 0.5  # a batch that fails says why by then; a step that still waits for another batch is not taken any more

OnOutcome = Callable[[Any], None]
"""Called once with the outcome of a step, or with an exception."""

OnTaken = Callable[[Sequence[Any] | Exception], None]
"""Gets the outcome of each step of a batch, or an error."""


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
            if not outcome.done():
                self._buffer = [waiting for waiting in self._buffer if waiting[1] is not on_outcome]  # nobody wants it taken any more
        if isinstance(found, Exception):
            raise found
        return found

    def _send(self) -> None:
        self._take([step for step, _ in self._batch], self._written)

    def _size(self, entry: Step) -> int:
        return sum(len(value) for value in entry.arguments.values() if isinstance(value, bytes))


class _Call(Batch):
    """One batch on its way."""

    __slots__ = ("by_text", "on_taken", "script", "steps")

    def __init__(self, script: JobScript, steps: Sequence[Step], on_taken: OnTaken) -> None:
        super().__init__(1)
        self.script = script
        self.steps = steps
        self.on_taken = on_taken
        self.by_text = False

    def packed_for(self, wire: HotWire) -> bytes:
        how = ("EVAL", TEXT) if self.by_text else ("EVALSHA", _DIGEST)
        values: list[str | bytes | int] = []
        for step in self.steps:
            values += (step.name, len(step.arguments))
            for name, value in step.arguments.items():
                values += (name, value)
        return packed(*how, len(self.steps), *(step.record for step in self.steps), *self.script.constants, *values)

    def replied(self, replies: list[Any] | Exception) -> None:
        self.script.replied(self, replies)


class JobScript:
    """Takes one batch at a time over `wire`. Each call ends within CALL_BUDGET_S. If the connection ends under way, the batch is sent once
    more over another one: the script knows what it has written.

    `on_wrote`, `on_odd_key` and `on_failed` are called as those of `RecordScript` are.
    """

    def __init__(
        self,
        wire: KeptWire,
        keys: StoreKeys,
        on_wrote: Callable[[], None],
        on_odd_key: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        self._sender = BatchSender(wire)
        self._on_wrote = on_wrote
        self._on_odd_key = on_odd_key
        self._on_failed = on_failed
        ttls_s = (UNENDED_TTL_S, WAIT_TTL_S, MESSAGE_TTL_S, JOB_RESULT_TTL_S)
        times = (INBOX_TTL_S * 1000, LEASE_MS, *(ttl_s * 1000 for ttl_s in ttls_s))
        record = keys.job("").removesuffix("}")
        self.constants: tuple[str | int, ...] = (keys.jobs, keys.ends, record, *times, KEPT_EVENTS, KEPT_ATTEMPTS)

    def __repr__(self) -> str:
        return f"<JobScript by {self._sender!r}>"

    def close(self) -> None:
        """Closes the wire: calls under way are never told."""
        self._sender.close()

    def hang_up(self) -> None:
        self._sender.hang_up()

    def take(self, steps: Sequence[Step], on_taken: OnTaken) -> None:
        """`on_taken` is called once, later."""
        self._sender.send(_Call(self, steps, on_taken))

    def replied(self, call: _Call, replies: list[Any] | Exception) -> None:
        if isinstance(replies, Exception):
            return self._fail(call, replies)
        match replies[0]:
            case NoScriptError() if not call.by_text:  # the server was restarted
                call.by_text = True
                self._sender.send(call)
            case Exception() as error:
                self._fail(call, naming_the_key(error, ("EVALSHA", *(step.record for step in call.steps))))
            case [[*outcomes], [*odd]] if len(outcomes) == len(call.steps):
                self._taken(call, outcomes, odd)
            case _:
                self._sender.hang_up()
                self._fail(call, InvalidResponse("no reply to the script of jobs"))

    def _taken(self, call: _Call, outcomes: list[Any], odd: list[Any]) -> None:
        for key in odd:
            self._on_odd_key(key.decode(errors="replace") if isinstance(key, bytes) else str(key))
        for at, (step, outcome) in enumerate(zip(call.steps, outcomes, strict=True)):
            if isinstance(outcome, Exception):
                outcomes[at] = self._on_failed(naming_the_key(outcome, ("EVALSHA", step.record)), call.began, step.name not in _READS)
            elif step.name not in _READS:
                self._on_wrote()
        call.on_taken(outcomes)

    def _fail(self, call: _Call, error: Exception) -> None:
        """An error that no server causes is passed on as it is."""
        call.on_taken(self._on_failed(error, call.began, True) if isinstance(error, FAILURES) else error)
