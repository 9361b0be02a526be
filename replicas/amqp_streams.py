"""Streamed answers that go to the queues of direct publishers, a message for each chunk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from ..broker.amqp_replies import reply_of_chunk
from ..broker.errors import MQServeError, Overloaded
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.queue import Queue
from ..broker.results import ErrorInfo, Outcome, Phase, Result
from ..broker.streams import IDLE_TIMEOUT_S, Frame
from .outgoing import Outgoing, State
from .stages import Job
from .worker import Worker

logger = logging.getLogger(__name__)


class Replies:
    """The streams of one replica that are replies. The broker's confirms are their credit: a window of messages is on its way at most.

    `on_done` gets a job when all of its chunks are confirmed, or when it was given up and its generator has ended; the end is then sent as
    any reply is.
    """

    def __init__(
        self, queue: Queue, worker: Worker, on_done: Callable[[Job, Result], None], give_up: Callable[[Job, Result], None]
    ) -> None:
        self._queue = queue
        self._worker = worker
        self._on_done = on_done
        self._give_up = give_up
        self._jobs: set[Job] = set()
        self._broken = RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Replies, {len(self)} under way>"

    def __len__(self) -> int:
        return len(self._jobs)

    def on_touched(self, job: Job, flow: Outgoing) -> None:
        """Takes what the worker's thread has offered, and the end once there is one."""
        self._jobs.add(job)
        has_ended = flow.result is not None  # read first: then all frames have been offered
        if flow.gather():
            flow.quiet_since = time.monotonic()
        if has_ended and flow.state is State.RUNNING:
            flow.state = State.ENDED
        self._go_on(job, flow)

    def settle_given_up(self, job: Job, flow: Outgoing) -> None:
        """Settles a job that was given up, if its generator has ended before; else that is done when it ends."""
        if job.with_worker:
            self._go_on(job, flow)

    def _go_on(self, job: Job, flow: Outgoing) -> None:
        for seq, kept in enumerate(flow.next_frames(), flow.sent + 1):
            if flow.state is State.STOPPED or seq <= flow.sent:  # perhaps since the last turn: a queue may tell the fate of a chunk at once
                break
            chunk = reply_of_chunk(job.envelope, seq, Frame.from_bytes(kept.raw))
            flow.was_sent(seq)
            self._queue.reply(chunk, job.envelope.reply_to, partial(self._confirmed, job, flow))
        is_complete = flow.state is State.ENDED and flow.taken == flow.sent and not flow.unsent
        if flow.result is not None and (is_complete or job.given_up is not None):
            self._jobs.discard(job)
            result = flow.result
            flow.stop()
            self._on_done(job, result)

    def _confirmed(self, job: Job, flow: Outgoing, error: MQServeError | None) -> None:
        if not job.with_worker or flow.state is State.STOPPED:
            return
        if error is not None:
            return self._break(job, error)
        flow.was_taken(flow.taken + 1)  # confirms come in any order, and only how many are missing counts
        self._go_on(job, flow)
        if flow.is_parked and flow.has_room:
            self._worker.resume(job)

    def _break(self, job: Job, error: MQServeError) -> None:
        """Ends a stream of which a message was lost: its reader could not tell that from a short answer."""
        why = "the caller's queue is full" if isinstance(error, Overloaded) else str(error)
        self._broken.say(f"a streamed reply ends before its end: a chunk of it was not delivered ({why})")
        self._give_up(job, _undelivered(type(error).__name__, why))

    def check(self, now: float) -> None:
        for job in tuple(self._jobs):
            flow = job.flow
            if flow is None or not job.with_worker:
                self._jobs.discard(job)
            elif job.given_up is None:
                self._check(job, flow, now)

    def _check(self, job: Job, flow: Outgoing, now: float) -> None:
        if flow.sent > flow.taken and now - flow.waits_since > IDLE_TIMEOUT_S:
            why = f"RabbitMQ has confirmed no chunk of this answer for {IDLE_TIMEOUT_S:g} s: send the request again when it works"
            self._give_up(job, Result(status=503, error=ErrorInfo("mqserve.BrokerUnavailable", why)))
        elif not flow.has_room or flow.state is not State.RUNNING or not flow.sent:
            flow.quiet_since = now
        elif now - flow.quiet_since > flow.idle_s:
            self._give_up(job, quiet_result(flow.idle_s))


def _undelivered(kind: str, why: str) -> Result:
    info = ErrorInfo(type=f"mqserve.{kind}", message=f"a chunk of this answer was not delivered: {why}")
    return Result(status=503, error=info)


def quiet_result(idle_s: float) -> Result:
    """The end of an answer whose handler has stopped making it."""
    message = f"no chunk came for {idle_s:g} s (stream_idle_timeout_s): yield more often, or allow more"
    return Result(status=504, error=ErrorInfo(type=Outcome.LATE, message=message, phase=Phase.RUN))
