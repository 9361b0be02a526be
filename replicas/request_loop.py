"""The requests of one replica: it consumes messages, decides which of them run, and gives up late and cancelled ones. `settlement.py`
settles each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ..broker.backoff import delays
from ..broker.calls.cancellations import CANCELLED
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, MQServeError
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.queue import Delivery, Queue
from ..broker.results import Outcome, Phase, Result, gone_result, late_result
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.streams import lost_result
from ..controller.state.config import MAX_REQUEST_TIMEOUT_S, BackendConfig
from ..controller.state.documents import Backend
from .admission import Admission
from .backend_end import BackendEnd
from .consumers import Consumers, Lane
from .feed import Feed
from .flows import Flows
from .giving_up import GivingUp
from .handler import Handler
from .job_ends import JobEnds
from .job_runs import JobRuns
from .metrics import ReplicaMetrics
from .places import Places
from .reading import Reading
from .register import Register
from .rhythm import Rhythm
from .sessions import Sessions
from .settlement import Settlement
from .stages import NOTHING, Job, KeptJob, Stage
from .start_marks import StartMarks
from .stuck import check_calls, check_silence
from .turns import Turns
from .window import Window
from .worker import Worker

logger = logging.getLogger(__name__)

_REASONS = {Outcome.CANCELLED: "cancelled", Outcome.GONE: "gone", Outcome.LATE: "late"}  # labels of the metric of dropped requests
_TUNE_EVERY_S = 0.25
_ASK_EVERY_S = 0.95  # once a second; a little less, since a slow turn may end a millisecond early
_REFUSAL_BUDGET_S = 1.5  # for storing 503 as the result of the requests that are left


class RequestLoop:
    """The consumers of one replica, the requests that it holds, and its worker. Lives on one I/O loop."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        queue: Queue,
        store: Store,
        worker: Worker,
        handler: Handler,
        metrics: ReplicaMetrics,
        replica_id: str,
    ) -> None:
        self._backend = backend.name
        self._store = store
        keys = StoreKeys(settings.namespace)
        self._admission = Admission(settings.namespace, backend.name, store, replica_id)
        self._register = Register()
        ends = JobEnds(backend.name, store, queue, backend.config)
        self._settlement = Settlement(backend.name, queue, store, keys, self._admission, metrics, self._register, ends)
        self._marks = StartMarks(self._admission, self._settlement, self._register)
        self._worker = worker
        self._metrics = metrics
        self._reading = Reading(settings, self._admission)
        self._read = self._reading.read
        self._giving_up = GivingUp(backend.name, store, keys, self._register, worker)
        self._draining = False
        self._unasked = RateLimitedLog(logger)
        self._end: BackendEnd | None = None
        self._refuses = False  # whether the time of `_end` has come: requests are answered with its result
        self._window = Window(backend.config, handler, worker)
        places = Places(self._window.places, self._register.count_with_worker, worker.submit, lambda job: self._jobs.begin(job))
        self._turns = Turns(self._window, places, self._register, self._settlement, worker)
        self._jobs = JobRuns(
            backend.name, replica_id, store, self._register, self._settlement, self._admission, ends, self._reading, self, places,
            settings.signer, worker.submit,
        )  # fmt: skip
        self._is_cancelled = self._giving_up.is_cancelled
        lanes = (Lane(self._window.size, self._on_delivery), Lane(self._window.job_slots, self._on_job, jobs=True))
        self._consumers = Consumers(backend.name, queue, store, lanes, self._settle_unstored, self._turns.give_back_waiting)
        self._turns.consumers, self._turns.jobs = self._consumers, self._jobs
        self._feed = Feed(store, keys.feed(replica_id))
        give_up = self._giving_up.give_up
        self._flows = Flows(store, queue, keys, self._feed, worker, self._settlement, self.on_done, self._on_streamed, give_up)
        worker.flowing.on_touched = self._flows.on_touched
        self._sessions = Sessions(store, keys, self._feed, worker.sockets, self._on_streamed)
        self._giving_up.flows, self._giving_up.sessions = self._flows, self._sessions
        self._rhythm = Rhythm(self._is_idle)
        self.served = 0
        self._config = backend.config
        self._settlement.configure(backend.config)
        self._flows.grace_s = backend.config.resume_grace_s

    def __repr__(self) -> str:
        return f"<RequestLoop of {self._backend}, generations {self.generations}, {self.running} in hand>"

    @property
    def running(self) -> int:
        """The number of deliveries that are neither acked nor requeued."""
        return self._register.unsettled

    @property
    def generations(self) -> tuple[int, ...]:
        """The generations that it consumes or still holds messages of."""
        return tuple(sorted({*self._consumers.generations, *self._register.generations}))

    def configure(self, config: BackendConfig) -> None:
        """Applies the configuration from the next request on."""
        self._config = self._window.config = config
        self._settlement.configure(config)
        self._flows.grace_s = config.resume_grace_s
        self._worker.configure(config)
        self._rhythm.wake()

    @property
    def _checks_all(self) -> bool:
        return self._settlement.at_most_once or self._may_be_copies

    @property
    def _may_be_copies(self) -> bool:
        """Whether messages may be in two queues: one sent while the binding moved to a later generation can be, until it times out."""
        return time.monotonic() < self._consumers.moved_at + self._config.request_timeout_s

    def limit_jobs(self, limit_s: int) -> None:
        """Sets how long a job may run on this broker, 0 for any time."""
        self._jobs.limit_s = limit_s

    def demand_seals(self, demanded: bool) -> None:
        """Sets whether a header without a seal is refused. Has no effect without a key to check seals with."""
        self._reading.demand_seals(demanded)

    def want(self, generations: Mapping[int, int]) -> None:
        """Consumes exactly these generations from now on, each with its number of queues."""
        self._consumers.want({} if self._keeps_rest else generations)

    def will_end(self, why: str, *, keeps_queue: bool, at_once: bool = False) -> None:
        """Announces the end of the backend: requests without a result after the graceful shutdown timeout (or now, with `at_once`) are
        answered 503 with `why`."""
        if self._end is None or at_once:
            at = time.monotonic() + (0 if at_once else self._config.graceful_shutdown_timeout_s)
            self._end = BackendEnd(at, gone_result(self._backend, why), keeps_queue)
            self._rhythm.wake()

    def goes_on(self) -> None:
        """Takes back `will_end`, since the backend is wanted."""
        self._end, self._refuses = None, False

    @property
    def _keeps_rest(self) -> bool:
        return self._refuses and self._end is not None and self._end.keeps_queue

    async def keep_taking_forever(self, on_taken: Callable[[], None]) -> None:
        """See `Consumers.keep_forever`."""
        await self._consumers.keep_forever(on_taken)

    async def tune_forever(self) -> None:
        """Runs until cancelled: gives up late requests, stores start marks of long runs, checks the worker, gives back what waits behind
        slow calls, and adjusts the prefetch to the measured run time. A start mark makes a timeout say `run`, and a replica's death count
        as an attempt of the request."""
        ask_at = tune_at = time.monotonic()
        while True:
            await self._rhythm.next()
            self._giving_up.give_up_late()
            if self._end is not None and not self._refuses and time.monotonic() >= self._end.at:
                self._refuse_the_rest(self._end)
            check_calls(self._backend, self._register, self._config.request_timeout_s)
            self._marks.mark_long_runs()
            if self._turns.has_jobs:
                self._turns.check_jobs()
            if not self._draining:
                self._turns.check()
            if self._flows.needs_time:
                self._flows.check()
            if (now := time.monotonic()) >= ask_at:
                ask_at = now + _ASK_EVERY_S
                check_silence(self._backend, self._register, self._worker)
            if now >= tune_at:
                tune_at = now + _TUNE_EVERY_S
                self._consumers.tune()
                processing = len(self._register.at(Stage.RUNNING))
                self._metrics.hand_over(self.running - processing, processing)

    def _is_idle(self) -> bool:
        """Whether there is nothing to time: no request, no end of the backend, no slow call."""
        return self._register.is_empty and self._end is None and not self._consumers.held_off and not self._flows.needs_time

    def _settle_unstored(self) -> bool:
        """Requeues, while the store is away, the requests that have not started and those whose results cannot be stored; returns whether
        no result is left to store. With at-most-once delivery it requeues none, since NOT_STARTED cannot be stored for them."""
        if not self._settlement.at_most_once:
            self._turns.give_back_waiting()
        return self._settlement.give_back_unstored()

    async def listen(self) -> None:
        """Follows the log of cancelled requests until cancelled itself."""
        await self._giving_up.listen()

    async def drain(self, at_most_s: float) -> None:
        """Stops consuming, requeues requests that have not started, and finishes the rest within the graceful shutdown timeout or
        `at_most_s`.

        If the backend ends and does not keep its queue, no replica would run requeued requests, so they run here in the time left.
        """
        self._draining = True
        until = time.monotonic() + min(at_most_s, self._config.graceful_shutdown_timeout_s)
        if self._end is None or self._end.keeps_queue:
            self._turns.give_back_waiting()
        if self._end is not None:
            until = min(until, self._end.at)
        await self._consumers.stop()
        await self._until(until, lambda: not (self.running or self._worker.responding or self._sessions))
        await self._sessions.close()
        if self._end is not None:
            self._refuse_the_rest(self._end)
            await self._until(time.monotonic() + _REFUSAL_BUDGET_S, lambda: not self.running)
        elif cut := self._cut_streams():
            await self._until(time.monotonic() + _REFUSAL_BUDGET_S, lambda: all(job.stage is Stage.SETTLED for job in cut))
        for job in self._register.with_worker():
            logger.warning(
                "request %s of %s still runs at the end of its replica's drain: %s", printable(job.envelope.id) or "without an id",
                self._backend, "another one answers it 502" if self._settlement.at_most_once else "it runs again elsewhere",
            )  # fmt: skip
            # with at-most-once delivery its mark stays, since it may still start in a batch that gathers
            self._settlement.give_back(job, mark_stays=self._settlement.at_most_once)
        self._flows.close()
        self._feed.close()
        await self._settlement.last_steps()
        self._metrics.hand_over(0, 0)

    async def _until(self, ends: float, condition: Callable[[], bool]) -> None:
        while not condition() and time.monotonic() < ends:
            await asyncio.sleep(0.01)

    def _cut_streams(self) -> list[Job]:
        """Ends the streams that still run at the end of the drain, unless another replica is to replay them; returns their jobs."""
        cut = [job for job in self._flows if job.flow is not None and job.flow.is_shown and self._config.on_death != "replay"]
        for job in cut:
            self.drop(job, self._giving_up.with_frames(job, lost_result(self._backend)))
            self._worker.give_up(job, CANCELLED)
        return cut

    def _refuse_the_rest(self, end: BackendEnd) -> None:
        """Answers 503 to the requests that it holds and, from now on, to those that still come out of the queue. If the queue is kept,
        jobs, and requests that have not started, are requeued instead."""
        self._refuses = True
        if end.keeps_queue:
            self._consumers.want({})
        for job in self._jobs.withdraw():
            self.ends_here(job)
        for job in self._register.with_worker():
            if end.keeps_queue and (isinstance(job, KeptJob) or not job.started):
                self._settlement.give_back(job)
            else:
                self.drop(job, job.given_up or self._giving_up.with_frames(job, end.result))
            self._worker.give_up(job, end.result)

    async def abandon(self) -> None:
        """Stops consuming and requeues all messages, as if the process had died. Does nothing after a `drain`."""
        self._draining = True
        self._worker.withdraw()
        await self._consumers.stop()
        self._jobs.close()
        self._flows.close()
        await self._sessions.close(0)
        self._feed.close()
        self._settlement.abandon()

    async def before_suspects(self, jobs: Sequence[Job]) -> None:
        """See `StartMarks.before_suspects`."""
        await self._marks.before_suspects(jobs)

    def _on_streamed(self, job: Job, result: Result) -> None:
        """Settles a job whose result is not to be stored: the store has it, behind the chunks of its answer, or a session has begun."""
        self.served += 1
        self._metrics.done(job.envelope, result, self._store.now_ms(), job.run_s, len(job.batch) or 1)
        self._settlement.streamed(job)

    # Taking.

    def _on_delivery(self, generation: int, delivery: Delivery) -> None:
        if (self._draining or self._consumers.paused or self._consumers.held_off) and self._is_for_others():
            return delivery.requeue()
        job = Job(NOTHING, generation, delivery)
        self._register.hold(job)
        if self._rhythm.rests:
            self._rhythm.wake()
        try:
            self._look_at(job, delivery)
        except BadEnvelope as error:
            self._settlement.start(job, self._settlement.refuse(job, error))
        except Exception as error:
            self._settlement.fail(job, error)

    def _on_job(self, generation: int, delivery: Delivery) -> None:
        if (self._draining or self._consumers.paused or self._consumers.held_off) and self._is_for_others():
            return delivery.requeue()
        self._turns.job_came()
        self._rhythm.wake()
        self._jobs.take(generation, delivery)

    def _is_for_others(self) -> bool:
        """Whether a message that arrives while this replica takes none is requeued at once, for other replicas. A deleted backend has no
        other replica, and with at-most-once delivery NOT_STARTED must be stored first."""
        is_last = self._draining and self._end is not None and not self._end.keeps_queue
        return not is_last and not self._settlement.at_most_once

    def _look_at(self, job: Job, delivery: Delivery) -> None:
        """Runs, answers or requeues a delivery, at once or after its admission. Raises BadEnvelope for a message to refuse."""
        self._read(job, delivery)
        envelope, header = job.envelope, job.envelope.header
        left_s = float(MAX_REQUEST_TIMEOUT_S)
        if header.deadline:
            now_ms = self._store.now_ms()
            left_s = (header.deadline - now_ms) / 1000
            if left_s > MAX_REQUEST_TIMEOUT_S:  # RabbitMQ does not wait so long for an ack, and marks would stand as long as a sender says
                left_s = MAX_REQUEST_TIMEOUT_S
                job.envelope = envelope = envelope.due_at(now_ms + MAX_REQUEST_TIMEOUT_S * 1000)
        job.deadline = time.monotonic() + left_s
        if (self._end is not None or self._draining) and self._is_over(job):
            return
        if left_s <= 0 and not delivery.redelivered:
            self.drop(job, late_result(Phase.QUEUE))
        elif self._is_cancelled(job):
            self.drop(job, CANCELLED)
        elif (delivery.redelivered or header.again) and self._register.has_copy(job, self._backend):
            self._settlement.give_back(job, later=True, mark_stays=True)  # its run here goes on; requeue until its result is stored
        elif delivery.redelivered or header.again or header.ref or not envelope.minted or self._checks_all:
            self._settlement.start(job, self.admit(job))
        else:
            self.run(job)  # the first delivery of a minted id cannot have run before, so the store is not asked

    def _is_over(self, job: Job) -> bool:
        """Answers or requeues a request at the end of the backend or of this replica; returns whether it did."""
        if self._end is not None and (self._refuses or self._draining) and not self._end.keeps_queue:
            self.drop(job, self._end.result)
        elif self._draining or self._keeps_rest:
            self._settlement.give_back(job)
        else:
            return False
        return True

    # For requests and jobs.

    def ends_here(self, job: Job) -> bool:
        """See `job_runs.Host`."""
        if (self._end is not None or self._draining) and self._is_over(job):
            return True
        if not self._is_cancelled(job):
            return False
        self.drop(job, CANCELLED)
        return True

    async def admit(self, job: Job) -> None:
        """Asks the store about the request, then runs, answers or requeues it."""
        if self._settlement.at_most_once:
            job.mark = self._admission.new_mark()
        for pause_s in delays():
            try:
                if job.unwanted and not await self._admission.is_shown(job.envelope):
                    return self.drop(job, job.unwanted_result)
                return self._admitted(job, await self._ask(job))
            except BadEnvelope as error:
                return await self._settlement.refuse(job, error)
            except MQServeError as error:
                if not self._settlement.at_most_once or self._draining:
                    self._unasked.say(f"giving back redelivered requests of {self._backend} until the store can be asked for them: {error}")
                    return self._settlement.give_back(job, later=True)
            if job.unwanted:
                return self.drop(job, job.unwanted_result)
            await asyncio.sleep(pause_s)  # hold it: no replica would run it again, since NOT_STARTED cannot be stored now

    async def _ask(self, job: Job) -> Envelope | Result | None:
        return await self._admission.admit(job, self._config, is_alone=self._register.has_one, check_copies=self._may_be_copies)

    def _admitted(self, job: Job, admitted: Envelope | Result | None) -> None:
        if admitted is None:
            self._settlement.ack(job, body_stays=True)  # the other copy needs the body
        elif isinstance(admitted, Result):
            self._settlement.answer(job, admitted)
        elif self._end is not None and self._refuses and not self._end.keeps_queue:
            self.drop(job, self._end.result)
        elif self._draining or self._keeps_rest:
            self._settlement.give_back(job)
        elif self._is_cancelled(job):  # while the store was asked
            self.drop(job, CANCELLED)
        else:
            job.envelope = admitted
            if job.flow is not None:
                self._flows.give_time(job)
            self.run(job)

    def run(self, job: Job) -> None:
        job.move(Stage.ADMITTED)
        self._turns.submit(job)

    def drop(self, job: Job, result: Result) -> None:
        """Answers the request with `result`, not with one of user code, and counts it as dropped."""
        if result.outcome is not None:
            self._metrics.dropped[_REASONS[result.outcome]] += 1
        self._settlement.answer(job, result)

    def on_done(self, job: Job, result: Result) -> None:
        """Answers a job that the worker has finished, unless it was requeued or answered meanwhile."""
        if self._turns.awaits_ends:
            self._turns.call_ended()
        if not job.with_worker:
            return
        try:
            is_unwanted = job.unwanted
            if is_unwanted and not job.started:
                return self.drop(job, job.unwanted_result)
            self.served += 1
            if is_unwanted:  # its caller was told this before, and must read the same from the store
                result = job.unwanted_result
            self._metrics.done(job.envelope, result, self._store.now_ms(), job.run_s, len(job.batch) or 1)
            self._settlement.answer(job, result)
        except Exception as error:
            self._settlement.fail(job, error)
