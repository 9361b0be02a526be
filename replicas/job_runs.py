"""The jobs of a replica, from their delivery to the beginning of their runs: they wait for a place, take a lease, and keep it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..broker.backoff import delays
from ..broker.errors import BadEnvelope, MQServeError, StoreUnavailable
from ..broker.jobs import RENEW_EVERY_S, Done, Held, JobFacts, Leased, Run, facts_of
from ..broker.pipelines import place_of
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.tasks import Tasks
from ..broker.queue import Delivery
from ..broker.results import Result, expired_result
from ..broker.sessions import is_handshake
from ..broker.store import Store
from ..broker.values.signing import Signer
from ..controller.state.config import BackendConfig
from .admission import Admission, Poison, replica_lost
from .job_ends import JobEnds, history
from .job_words import TAKEN_EVERY_S
from .places import Places
from .reading import Reading
from .register import Register
from .settlement import Settlement
from .stages import NOTHING, Job, KeptJob, Stage

logger = logging.getLogger(__name__)

_BEHIND_LEASE_S = 0.05  # after another run's lease has lapsed by the store's clock
TOKEN_BYTES = 16


class Host(Protocol):
    """What the requests of a replica and its jobs have in common."""

    def ends_here(self, job: Job) -> bool:
        """Answers or requeues what is not to run here (any more); returns whether it did."""
        ...

    def drop(self, job: Job, result: Result) -> None:
        """Answers with `result`, and counts it as dropped."""
        ...

    async def admit(self, job: Job) -> None:
        """Asks the store about a job without a record, then runs, answers or requeues it."""
        ...


class JobRuns:
    """The jobs of one replica. `places` is shared with the requests that somebody waits for; `submit` is the worker's."""

    def __init__(
        self,
        backend: str,
        replica_id: str,
        store: Store,
        register: Register,
        settlement: Settlement,
        admission: Admission,
        ends: JobEnds,
        reading: Reading,
        host: Host,
        places: Places,
        signer: Signer,
        submit: Callable[[Job], None],
    ) -> None:
        self._backend = backend
        self._replica_id = replica_id
        self._store = store
        self._register = register
        self._settlement = settlement
        self._admission = admission
        self._ends = ends
        self._reading = reading
        self._host = host
        self._places = places
        self._signer = signer
        self._submit = submit
        self._lapsing: dict[KeptJob, asyncio.TimerHandle] = {}  # jobs of which another run has the lease
        self._renewing = Tasks()
        self._renew_at = self._tell_at = 0.0  # monotonic
        self._unasked, self._lost = RateLimitedLog(logger), RateLimitedLog(logger)
        self.limit_s = 0  # of a run, by what the broker allows; 0: none

    def __repr__(self) -> str:
        return f"<JobRuns of {self._backend}, {len(self._lapsing)} wait for a lease, {self._places!r}>"

    @property
    def _config(self) -> BackendConfig:
        return self._ends.config

    def __bool__(self) -> bool:
        return any(isinstance(job, KeptJob) for job in self._register)

    @property
    def in_hand(self) -> int:
        """The number of jobs that have a place, or wait for one."""
        return sum(isinstance(job, KeptJob) and job.stage in _IN_HAND for job in self._register) - len(self._lapsing)

    @property
    def lapsing(self) -> int:
        """The number of jobs that wait for the lease of another run to lapse."""
        return len(self._lapsing)

    # Taking.

    def take(self, generation: int, delivery: Delivery) -> None:
        job = KeptJob(NOTHING, generation, delivery)
        self._register.hold(job)
        try:
            self._look_at(job, delivery)
        except BadEnvelope as error:
            self._settlement.start(job, self._settlement.refuse(job, error))
        except Exception as error:
            self._settlement.fail(job, error)

    def _look_at(self, job: KeptJob, delivery: Delivery) -> None:
        """Has the job wait for a place, or settles it. Raises BadEnvelope for a message to refuse."""
        self._reading.read(job, delivery)
        if is_handshake(job.envelope):
            raise BadEnvelope("a WebSocket cannot be opened by a job, which nobody waits for: connect to its route")
        head = job.envelope.header.job
        asks = delivery.wants_events or (head is not None and head.tells)
        job.tells_caller = asks and bool(job.envelope.reply_to)
        if job.is_recorded:
            job.mark = secrets.token_bytes(TOKEN_BYTES)
        if not self._host.ends_here(job):
            self._places.add_job(job)

    def begin(self, job: KeptJob) -> None:
        """Begins a job that has a place: takes its lease, then runs it."""
        self._settlement.start(job, self._begin(job))

    async def _begin(self, job: KeptJob) -> None:
        try:
            if job.stage is not Stage.HELD or self._host.ends_here(job):  # settled, or to be settled, since it was delivered
                return
            job.timeout_s = self._config.longest_job_s(self.limit_s)
            if not job.is_recorded:
                await self._admit_unrecorded(job)
            elif await self._is_leased(job):
                self._run(job)
        except BadEnvelope as error:
            await self._settlement.refuse(job, error)
        finally:
            self._places.begun(job)
            self._places.share()

    def _run(self, job: KeptJob) -> None:
        if not self._host.ends_here(job):
            job.deadline = time.monotonic() + job.timeout_s
            job.move(Stage.ADMITTED)
            self._submit(job)

    async def _admit_unrecorded(self, job: KeptJob) -> None:
        """A message without an id: its runs are counted as those of a request without one."""
        job.deadline = time.monotonic() + job.timeout_s
        if job.delivery.redelivered:
            await self._host.admit(job)
        else:
            self._run(job)

    # The lease.

    async def _is_leased(self, job: KeptJob) -> bool:
        """Whether the job has the lease, so that it may run. If not, it has been settled, or waits for the lease of another run to lapse.
        While the store is away it is requeued; with at-most-once delivery, which could not tell then whether it ran, it is held."""
        for pause_s in delays():
            try:
                return await self._ask(job)
            except StoreUnavailable as error:
                if not self._settlement.at_most_once or self._host.ends_here(job):
                    self._unasked.say(f"giving back jobs of {self._backend} until the store can be asked for their leases: {error}")
                    if job.stage is Stage.HELD:
                        self._settlement.give_back(job, later=True)
                    return False
            await asyncio.sleep(pause_s)
        raise AssertionError("the pauses never end")

    async def _ask(self, job: KeptJob) -> bool:
        """Raises StoreUnavailable, and BadEnvelope for a job to refuse."""
        if await self._is_late_or_lost(job):
            return False
        future_id, now_ms = job.envelope.future_id(self._backend), self._store.now_ms()
        facts = facts_of(self._backend, job.envelope, now_ms)
        pipeline = None if facts.stage is None else place_of(facts.stage, self._signer)
        job.begun = True  # it may have the lease from now on
        kept_s = self._ends.result_ttl_ms(job.envelope) // 1000
        run = Run(future_id, job.mark, self._replica_id, facts, now_ms, result_ttl_s=kept_s, pipeline=pipeline)
        match await self._store.jobs.begin(run):
            case Done(raw):
                await self._is_done(job, future_id, raw)
            case Held(left_ms):
                job.begun = False
                if self._host.ends_here(job):
                    return False
                self._lapsing[job] = asyncio.get_running_loop().call_later(left_ms / 1000 + _BEHIND_LEASE_S, self._ask_again, job)
            case Leased(attempt):
                return await self._may_run(job, future_id, attempt, facts)
        return False

    def _ask_again(self, job: KeptJob) -> None:
        del self._lapsing[job]
        if job.stage is Stage.HELD:
            self._places.add_job(job)

    async def _is_late_or_lost(self, job: KeptJob) -> bool:
        """Whether the job is not to begin: its time for that is over, or it may have run before and must not run twice. Then it is
        answered. What has begun in time may run again."""
        header, redelivered = job.envelope.header, job.delivery.redelivered
        is_late = 0 < header.deadline <= self._store.now_ms() and not (header.job is not None and header.job.tries)
        needs_proof = self._settlement.at_most_once and redelivered
        if not (needs_proof or is_late):
            return False
        record = await self._store.jobs.read(job.envelope.future_id(self._backend))  # of a first delivery, too: another copy may run
        if needs_proof and record is None:  # a missing record proves nothing, since the store may have lost its data
            self._host.drop(job, replica_lost(self._backend))
        elif is_late and not (record is not None and record.has_begun):
            self._host.drop(job, expired_result())
        else:
            return False
        return True

    async def _is_done(self, job: KeptJob, future_id: str, raw: bytes) -> None:
        """Acks a job that has a result, which whoever waits at a queue gets."""
        if raw and job.envelope.reply_to:
            self._settlement.answer(job, await self._admission.result_in(future_id, raw))
        else:
            self._settlement.ack(job)

    async def _may_run(self, job: KeptJob, future_id: str, attempt: int, facts: JobFacts) -> bool:
        """Whether a leased job is to run, which has its body then: not if that would be a run too many. Raises Poison then."""
        tries = job.envelope.header.job.tries if job.envelope.header.job is not None else 0
        if attempt > 1 + tries:  # not all of its earlier runs have ended in order
            record = await self._store.jobs.read(future_id)
            lost = [earlier for earlier in (record.attempts[:-1] if record is not None else ()) if not earlier.ended_ms]
            if lost and self._settlement.at_most_once:
                self._host.drop(job, replica_lost(self._backend))
                return False
            if len(lost) >= self._config.max_attempts:
                await self._store.jobs.give_back(future_id, job.mark, facts)
                job.begun = False  # this is no run
                why = f"{len(lost)} runs of it were started and left no result (max_attempts): the replicas that ran it died"
                raise Poison(why, history(record)[:-1])
        job.envelope = await self._admission.ready(msgspec.structs.replace(job.envelope, attempt=attempt))
        return True

    # In the rhythm of the replica.

    def check(self) -> None:
        """Gives away places, renews the leases, and passes on what handlers say. Called every 50 ms while the replica holds anything."""
        self._places.share()
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + RENEW_EVERY_S
            if not len(self._renewing):
                for job in self._leased():
                    self._renewing.start(self._renew(job))
        if now >= self._tell_at:
            self._tell_at = now + TAKEN_EVERY_S
            for held in self._register:
                if isinstance(held, KeptJob) and held.words and held.stage in _LEASED:
                    self._ends.tell(held, is_last=False)

    def _leased(self) -> list[KeptJob]:
        return [job for job in self._register if isinstance(job, KeptJob) and job.begun and job.stage in _LEASED]

    async def _renew(self, job: KeptJob) -> None:
        try:
            is_ours = await self._store.jobs.renew(job.envelope.future_id(self._backend), job.mark)
        except MQServeError as error:
            return self._lost.say(f"the leases of jobs of {self._backend} cannot be renewed: {error}")
        job.is_stale = not is_ours
        if not is_ours and job.stage in _WITH_WORKER:  # its run has not ended meanwhile
            told = printable(job.envelope.id)
            self._lost.say(f"job {told} of {self._backend} runs elsewhere, too, since its lease had lapsed: the first result counts")

    # Giving back.

    def withdraw(self) -> list[Job]:
        """Removes and returns what waits for a place or a lease."""
        lapsing, self._lapsing = self._lapsing, {}
        for timer in lapsing.values():
            timer.cancel()
        return [job for job in (*lapsing, *self._places.withdraw_jobs()) if job.stage is Stage.HELD]

    def close(self) -> None:
        """Renews no leases any more, at the end of the replica."""
        for timer in self._lapsing.values():
            timer.cancel()
        self._renewing.cancel()


_IN_HAND = (Stage.HELD, Stage.ADMITTED, Stage.RUNNING)
_WITH_WORKER = (Stage.ADMITTED, Stage.RUNNING)
_LEASED = (Stage.HELD, Stage.ADMITTED, Stage.RUNNING, Stage.RECORDING)
