"""All streamed answers of a replica, on its I/O loop: what is appended to them, the credit of their readers, and their time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from ..broker.backoff import delays
from ..broker.calls.cancellations import CANCELLED
from ..broker.errors import StoreUnavailable
from ..broker.process.printable import printable
from ..broker.queue import Queue
from ..broker.results import Outcome, Result, entry_of
from ..broker.store import Append, Refusal, Store, StoreClosed
from ..broker.store_keys import STREAM_TTL_S, StoreKeys
from ..broker.streams import IDLE_TIMEOUT_S, RESUME_GRACE_S, Credit
from ..controller.state.config import MAX_REQUEST_TIMEOUT_S
from .amqp_streams import Replies, quiet_result
from .feed import Feed
from .outgoing import Kept, Outgoing, State
from .settlement import Settlement
from .stages import Job, Stage
from .takeover import behind_shown
from .worker import Worker

logger = logging.getLogger(__name__)

HEAD_AFTER_S = 15.0  # of server-sent events: until then the request can run again unseen


class Flows:
    """The streams of one replica that have begun and whose jobs are not settled.

    `on_streamed` gets a job whose result the store has, behind the frames of its answer; `on_done` one whose chunks went to the queue of a
    direct publisher (`Replies`).
    """

    def __init__(
        self,
        store: Store,
        queue: Queue,
        keys: StoreKeys,
        feed: Feed,
        worker: Worker,
        settlement: Settlement,
        on_done: Callable[[Job, Result], None],
        on_streamed: Callable[[Job, Result], None],
        give_up: Callable[[Job, Result], None],
    ) -> None:
        self._store = store
        self._keys = keys
        self._worker = worker
        self._settlement = settlement
        self._on_streamed = on_streamed
        self._give_up = give_up
        self._replies = Replies(queue, worker, on_done, give_up)
        self._feed = feed
        feed.on_credit = self._on_credit_of
        self._inboxes = keys.inbox("")
        self._jobs: dict[str, Job] = {}  # by future id
        self.grace_s = RESUME_GRACE_S

    def __repr__(self) -> str:
        return f"<Flows, {len(self._jobs)} under way>"

    def __len__(self) -> int:
        return len(self._jobs)

    # From the worker's thread.

    def on_touched(self, job: Job) -> None:
        """Takes what the worker's thread has offered, and the end once there is one."""
        flow = job.flow
        if flow is None or not job.with_worker:  # it was settled meanwhile
            return
        try:
            if flow.is_reply:
                self._replies.on_touched(job, flow)
            else:
                self._take(job, flow)
        except Exception as error:  # the other streams of the turn are looked at all the same
            self._failed(job, flow, error)

    def _take(self, job: Job, flow: Outgoing) -> None:
        if self._jobs.get(flow.future_id) is not job:
            self._begin(job, flow)
        result = flow.result  # read first: if there is one, all frames have been offered
        if flow.gather():
            flow.quiet_since = time.monotonic()
            self._resume(job, flow)  # there is room, if chunks were joined
        if result is not None:
            if flow.refused is not None:
                return self._refused(job, flow.refused)
            if job.given_up is not None:
                return self._given_up(job, flow, job.given_up)
            if flow.state is State.RUNNING:
                flow.state = State.ENDED
        self._append(job, flow)

    def _begin(self, job: Job, flow: Outgoing) -> None:
        self._jobs[flow.future_id] = job
        if flow.is_shown:  # by an earlier run
            self.give_time(job)
        self._feed.need(self)

    # Appending.

    def _append(self, job: Job, flow: Outgoing) -> None:
        """Appends what the reader's window takes, if nothing is under way."""
        if flow.under_way is not None or flow.state is State.STOPPED:
            return
        frames = flow.next_frames()
        ends = b""
        if flow.state is State.ENDED and flow.is_all(frames):
            ends = self._end_of(job, flow)
        if frames or ends:
            flow.under_way = append = self._append_of(flow, frames, ends)
            self._store.append_then(append, partial(self._appended, job, flow, append))

    def _append_of(self, flow: Outgoing, frames: list[Kept], ends: bytes) -> Append:
        future_id = flow.future_id
        return Append(
            id=future_id, stream=self._keys.stream(future_id), owner=self._keys.owner(future_id), future=self._keys.future(future_id),
            claim=flow.claim, attempt=flow.owner.attempt, first=flow.sent + 1, frames=tuple([kept.raw for kept in frames]),
            inboxes=(flow.inbox,) if flow.inbox else (), trim_to=flow.trim_to(), ends=ends,
            end_note=entry_of(future_id, ends) if ends else b"", ttl_ms=self._ttl_ms(flow),
        )  # fmt: skip

    def _ttl_ms(self, flow: Outgoing) -> int:
        """Longer than any wait between two appends."""
        return int(max(STREAM_TTL_S, flow.idle_s + IDLE_TIMEOUT_S, self.grace_s + IDLE_TIMEOUT_S) * 1000)

    def _end_of(self, job: Job, flow: Outgoing) -> bytes:
        assert flow.result is not None
        result = behind_shown(flow.result)
        flow.result = Result(
            status=result.status, backend=result.backend, attempt=job.envelope.attempt, error=result.error, frames=flow.sent + flow.unsent
        )
        return flow.result.to_bytes()

    def _appended(self, job: Job, flow: Outgoing, append: Append, outcome: int | Refusal | Exception) -> None:
        try:
            self._on_outcome(job, flow, append, outcome)
        except Exception as error:
            self._failed(job, flow, error)

    def _on_outcome(self, job: Job, flow: Outgoing, append: Append, outcome: int | Refusal | Exception) -> None:
        if flow.state is State.STOPPED or isinstance(outcome, StoreClosed):
            return
        if isinstance(outcome, StoreUnavailable):
            flow.retry = asyncio.get_running_loop().call_later(next(flow.pauses), self._try_again, job, flow)
        elif isinstance(outcome, Exception):
            self._failed(job, flow, outcome)
        elif isinstance(outcome, Refusal):
            self._on_refusal(job, flow, outcome)
        else:
            self._took(job, flow, append, outcome)

    def _try_again(self, job: Job, flow: Outgoing) -> None:
        flow.under_way = None
        self._append(job, flow)

    def _took(self, job: Job, flow: Outgoing, append: Append, last: int) -> None:
        flow.under_way = None
        if flow.retry is not None:
            flow.retry, flow.pauses = None, delays()
        if last < append.first - 1:
            flow.go_back(last)
            return self._append(job, flow)
        flow.was_sent(append.first - 1 + len(append.frames))
        if not flow.is_shown:
            flow.is_shown = True
            self.give_time(job)
        if append.ends:
            assert flow.result is not None
            self._forget(job, flow)
            return self._on_streamed(job, flow.result)
        self._append(job, flow)
        self._resume(job, flow)

    def give_time(self, job: Job) -> None:
        """Gives a stream whose head is shown the time that a run has at most, from its beginning or, if it has not begun, from now."""
        job.deadline = (job.started or time.monotonic()) + MAX_REQUEST_TIMEOUT_S
        job.envelope = job.envelope.due_at(self._store.now_ms() + int((job.deadline - time.monotonic()) * 1000))

    def _on_refusal(self, job: Job, flow: Outgoing, refusal: Refusal) -> None:
        """Stops the generator, since nobody will read what it makes; the message is settled when it has ended."""
        flow.halt()
        flow.refused = refusal
        if flow.result is not None:
            self._refused(job, refusal)
        else:
            self._worker.give_up(job, CANCELLED)

    def _refused(self, job: Job, refusal: Refusal) -> None:
        assert job.flow is not None
        self._forget(job, job.flow)
        if refusal is Refusal.ENDED:
            self._drop_keys(job.flow)  # the request was ended by somebody else, as by a cancellation, and nobody reads the stream
            self._settlement.streamed(job)
        else:
            self._settlement.ack(job, body_stays=True)  # another run writes the stream, and needs the body

    def _drop_keys(self, flow: Outgoing) -> None:
        if not flow.owner.resumable:
            self._store.drop_soon(self._keys.stream(flow.future_id))
            self._store.drop_soon(self._keys.owner(flow.future_id))

    def _failed(self, job: Job, flow: Outgoing, error: Exception) -> None:
        self._forget(job, flow)
        self._worker.give_up(job, CANCELLED)
        self._settlement.fail(job, error)

    # Given up.

    def give_up(self, flow: Outgoing, result: Result) -> Result:
        """Stops appending for a job that is given up, and returns the result that its reader gets, which says how many frames there are."""
        flow.halt()
        return result if flow.is_reply else msgspec.structs.replace(result, frames=flow.sent)

    def record_early(self, job: Job, result: Result) -> None:
        """See `Settlement.record_early`. Nothing is recorded of a stream that another run has taken over."""
        flow = job.flow
        if flow is None or not flow.is_fenced:
            return self._settlement.record_early(job, result)
        self._store.append_then(self._end_alone(job, flow, result), lambda outcome: None)

    def settle_given_up(self, job: Job, flow: Outgoing) -> None:
        """Settles a job that was given up, if its generator has ended before; else that is done when it ends."""
        if flow.is_reply:
            self._replies.settle_given_up(job, flow)
        elif flow.result is not None and job.given_up is not None and job.with_worker:
            self._given_up(job, flow, job.given_up)

    def _given_up(self, job: Job, flow: Outgoing, result: Result) -> None:
        self._forget(job, flow)
        job.move(Stage.RECORDING)
        self._record_given_up(job, flow, result)

    def _record_given_up(self, job: Job, flow: Outgoing, result: Result) -> None:
        self._store.append_then(self._end_alone(job, flow, result), partial(self._given_up_recorded, job, flow, result))

    def _end_alone(self, job: Job, flow: Outgoing, result: Result) -> Append:
        """The end of an answer that is given up, without what was not appended. It begins at 1, since no gap before it matters."""
        future_id, attempt = flow.future_id, job.envelope.attempt
        ends = (result if attempt == 1 else msgspec.structs.replace(result, attempt=attempt)).to_bytes()
        return Append(
            id=future_id, stream=self._keys.stream(future_id), owner=self._keys.owner(future_id), future=self._keys.future(future_id),
            claim=flow.claim, attempt=flow.owner.attempt, first=1, inboxes=tuple({job.envelope.header.inbox, flow.inbox} - {""}),
            ends=ends, end_note=entry_of(future_id, ends), ttl_ms=self._ttl_ms(flow),
        )  # fmt: skip

    def _given_up_recorded(self, job: Job, flow: Outgoing, result: Result, outcome: int | Refusal | Exception) -> None:
        try:
            self._settle_recorded(job, flow, result, outcome)
        except Exception as error:
            self._settlement.fail(job, error)

    def _settle_recorded(self, job: Job, flow: Outgoing, result: Result, outcome: int | Refusal | Exception) -> None:
        if isinstance(outcome, StoreClosed):
            return
        if isinstance(outcome, StoreUnavailable) and time.monotonic() < job.deadline:
            asyncio.get_running_loop().call_later(next(flow.pauses), self._record_given_up, job, flow, result)
        elif isinstance(outcome, StoreUnavailable):
            self._settlement.give_back(job, later=True)
        elif isinstance(outcome, Exception):
            self._settlement.fail(job, outcome)
        elif outcome is Refusal.TAKEN:
            self._settlement.ack(job, body_stays=True)  # as in `_refused`
        else:
            if result.outcome is Outcome.CANCELLED:  # nobody reads it
                self._drop_keys(flow)
            self._on_streamed(job, result)

    def _forget(self, job: Job, flow: Outgoing) -> None:
        flow.stop()
        if self._jobs.get(flow.future_id) is job:
            del self._jobs[flow.future_id]
        if not self._jobs:
            self._feed.leave(self)

    # Credit.

    def _on_credit_of(self, credit: Credit) -> None:
        job = self._jobs.get(credit.id)
        if job is not None and job.flow is not None and credit.inbox.startswith(self._inboxes):
            self._on_credit(job, job.flow, credit)

    def _on_credit(self, job: Job, flow: Outgoing, credit: Credit) -> None:
        if credit.left:
            if credit.inbox == flow.inbox:
                self._reader_is_gone(job, flow)
            return
        if credit.inbox != flow.inbox:  # the newest reader owns the credit
            if credit.renews and flow.inbox:
                return
            flow.begin_reading(credit.inbox, credit.seq)
        flow.was_taken(credit.seq)
        self._append(job, flow)
        self._resume(job, flow)

    def _resume(self, job: Job, flow: Outgoing) -> None:
        if flow.is_parked and flow.has_room:
            self._worker.resume(job)

    def sender_is_gone(self, job: Job, flow: Outgoing) -> None:
        """Notes that the process is gone that has sent the request. It may not be the one any more that reads the answer."""
        if flow.inbox == job.envelope.header.inbox:
            self._reader_is_gone(job, flow)

    def _reader_is_gone(self, job: Job, flow: Outgoing) -> None:
        if flow.can_wait:
            flow.pause()
        elif job.given_up is None:
            self._give_up(job, CANCELLED)

    # Time.

    def check(self) -> None:
        """Ends what waits for too long, and stops reading credit when there is no stream. Called in the rhythm of the requests."""
        now = time.monotonic()
        for job in tuple(self._jobs.values()):
            flow = job.flow
            if flow is not None and not job.with_worker:  # it was settled by the end of the backend or of this replica
                self._forget(job, flow)
            elif flow is not None and job.given_up is None:
                self._check(job, flow, now)
        self._replies.check(now)

    def _check(self, job: Job, flow: Outgoing, now: float) -> None:
        flow.forget()
        if flow.early_head is not None and flow.has_made_nothing and now - job.started > HEAD_AFTER_S:
            flow.show_head_alone(flow.early_head)
            self._append(job, flow)
        if flow.paused:
            if now - flow.left_at > self.grace_s:
                self._give_up(job, CANCELLED)
        elif flow.sent > flow.taken and now - flow.waits_since > IDLE_TIMEOUT_S:
            told = printable(job.envelope.id)
            logger.warning("the reader of the streamed answer to %s has taken nothing for %g s, and counts as gone", told, IDLE_TIMEOUT_S)
            self._reader_is_gone(job, flow)
        elif not flow.has_room or flow.state is not State.RUNNING or not flow.is_shown:
            flow.quiet_since = now
        elif now - flow.quiet_since > flow.idle_s:
            self._give_up(job, quiet_result(flow.idle_s))

    @property
    def needs_time(self) -> bool:
        """Whether there is anything for `check` to do."""
        return bool(self._jobs) or len(self._replies) > 0

    def close(self) -> None:
        """Stops reading credit, at the end of the replica."""
        for job in tuple(self._jobs.values()):
            if job.flow is not None:
                job.flow.stop()
        self._jobs.clear()

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._jobs.values()))
