"""One request in a replica, from its delivery to its settlement: the stages that it goes through, and the moves between them.

Here every request is a `Job` of the worker. One that came from the backend's queue for jobs is a `KeptJob`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from ..broker.envelope import Envelope
from ..broker.queue import Delivery
from ..broker.results import ErrorInfo, Outcome, Phase, Result, late_result
from .job_chunks import JobChunks
from .job_words import JobWords
from .outgoing import Outgoing

NOTHING = Envelope("", b"", "")  # stands in for the envelope of a message that could not be read


class Stage(Enum):
    """How far a request has come. docs/design.md draws the moves."""

    __hash__ = object.__hash__  # by identity: Enum's own is a Python function, called several times for each request

    HELD = "held"  # it was delivered, and is being checked
    ADMITTED = "admitted"  # it waits at the worker
    RUNNING = "running"  # user code has begun with it
    RECORDING = "recording"  # it has its result, which is being stored or sent
    LEAVING = "leaving"  # it does not run here: it is being requeued or dead-lettered
    RETURNED = "returned"  # it was requeued because its result cannot be stored; storing is still retried
    SETTLED = "settled"  # it was acked or requeued, and nothing is left to do


MOVES: Mapping[Stage, tuple[Stage, ...]] = {
    Stage.HELD: (Stage.ADMITTED, Stage.RECORDING, Stage.LEAVING, Stage.SETTLED),
    Stage.ADMITTED: (Stage.RUNNING, Stage.RECORDING, Stage.LEAVING, Stage.SETTLED),
    Stage.RUNNING: (Stage.RECORDING, Stage.LEAVING, Stage.SETTLED),
    Stage.RECORDING: (Stage.LEAVING, Stage.RETURNED, Stage.SETTLED),
    Stage.LEAVING: (Stage.SETTLED,),
    Stage.RETURNED: (Stage.SETTLED,),
    Stage.SETTLED: (),
}


class WrongMove(Exception):
    """A request was moved to a stage that MOVES does not allow: a bug in mqserve."""


class Job(msgspec.Struct, eq=False):
    """A request that this replica holds. The I/O loop writes the first group of fields, the worker's thread the second; both read all.

    A job begins to run when the worker writes `started`, so only the I/O loop ever writes the stage.
    """

    envelope: Envelope
    generation: int  # of the queue that it came from
    delivery: Delivery
    deadline: float = math.inf  # monotonic
    suspect: bool = False  # it was delivered before, and may have killed its replica: its start mark is stored before it runs
    mark: bytes = b""  # the start mark that is, or may be, in the store
    given_up: Result | None = None  # replaces its own result: it was cancelled, or its deadline has passed
    _stage: Stage = Stage.HELD

    started: float = 0.0  # monotonic; 0 until it runs
    run_s: float = 0.0
    batch: Sequence[Job] = ()  # all jobs of its call, if there are several
    task: asyncio.Task[None] | None = None  # the task of an async call
    request: object = None  # the object that the handler got
    flow: Outgoing | None = None  # its answer, if that is streamed

    @property
    def stage(self) -> Stage:
        return Stage.RUNNING if self._stage is Stage.ADMITTED and self.started else self._stage

    def move(self, stage: Stage) -> None:
        """Moves to `stage`. Raises WrongMove if MOVES does not allow that."""
        before = self._stage
        if before is Stage.ADMITTED and self.started:
            before = Stage.RUNNING
        if stage not in MOVES[before]:
            raise WrongMove(f"a request that is {before.value} cannot be {stage.value}")
        self._stage = stage

    @property
    def with_worker(self) -> bool:
        """Whether it waits for user code or runs."""
        return self._stage is Stage.ADMITTED

    @property
    def unwanted(self) -> bool:
        return self.given_up is not None or time.monotonic() >= self.deadline

    @property
    def unwanted_result(self) -> Result:
        """The result that its sender gets instead of the handler's."""
        return self.given_up or late_result(Phase.RUN if self.started else Phase.QUEUE)


class KeptJob(Job):
    """A request from the backend's queue for jobs (`broker/jobs.py`). If it has an id, the store has a record of it, each run takes a lease
    first, and `mark` is the token of that run. `deadline` is that of the run, once there is one."""

    timeout_s: float = 0.0  # of the run
    begun: bool = False  # the record has this run, or may have it
    words: JobWords = msgspec.field(default_factory=JobWords)
    tells_caller: bool = False  # whoever waits at a queue for the reply gets what the handler says, too
    is_stale: bool = False  # another run has taken over

    error_names: Sequence[str] = ()  # the handler has raised an exception of this type, by its name and those of its bases
    again_after_s: float | None = None  # the handler wants to be called again after that

    @property
    def chunks(self) -> JobChunks:
        """What those who follow it are told of what it yields. Only the worker's thread asks for it."""
        if self.words.chunks is None:
            self.words.chunks = JobChunks(self.envelope.attempt)
        return self.words.chunks

    @property
    def is_recorded(self) -> bool:
        return bool(self.envelope.id)

    @property
    def unwanted_result(self) -> Result:
        return self.given_up or spent_result(self.timeout_s, is_running=bool(self.started))


def spent_result(timeout_s: float, *, is_running: bool) -> Result:
    """Returns the result of a job whose run took too long, or did not begin though the job had its place."""
    if is_running:
        phase, where, mend = Phase.RUN, "was still running", "allow it more (the backend's job_timeout_s)"
    else:
        phase, where, mend = Phase.QUEUE, "still waited for the handler of its replica", "the calls before it take too long, or never end"
    return Result(
        status=504, error=ErrorInfo(type=Outcome.LATE, message=f"the job {where} after {timeout_s:g} s ({phase}): {mend}", phase=phase)
    )
