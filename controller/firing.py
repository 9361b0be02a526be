"""Fires the schedules: at each of its times the leader sends a job, and notes that once the broker has confirmed it.

The job's id follows from the schedule and the time. So a leader that dies between the two costs nothing: the next one sends the same job
again, which replicas recognize by its record.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

import msgspec

from ..broker.backoff import keep_running
from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.scheduled_calls import ScheduledCall
from ..broker.errors import BadEnvelope, BadValue, MQServeError
from ..broker.jobs import UNENDED_TTL_S
from ..broker.pipelines import message_id
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.signing import Signer
from .cron import LATE_MS, cron_of, due
from .lease import Leader, NotLeading
from .state.documents import Backend, Desired, Observed, Schedule
from .state.firings import Firing, firings_to_bytes, problem_of, read_firings
from .state.traffic import choose, entry_of, stages_of

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0  # store time may be set anew
TRY_AGAIN_S = 1.0


class Firings:
    """The schedules of one instance. Those of the document that `go_on` got last fire until `stop`."""

    def __init__(self, jobs: JobSender, store: Store, keys: StoreKeys, signer: Signer, leader: Leader) -> None:
        self._jobs = jobs
        self._store = store
        self._keys = keys
        self._signer = signer
        self._leader = leader
        self._desired = Desired()
        self._refusal = ""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trouble, self._unsent = RateLimitedLog(logger), RateLimitedLog(logger)
        self.problems: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        """Forgets what another leader may have changed."""
        self._known: dict[str, Firing] | None = None  # None until it was read
        self._written: dict[str, Firing] = {}
        self._raw: bytes | None = None  # as it stands in the store
        self._next: dict[Schedule, int | None] = {}  # the next time of each
        self._passed: dict[Schedule, int] = {}  # until when the times of each are settled; what the document of firings does not say

    def __repr__(self) -> str:
        return f"<Firings of {len(self._desired.schedules)} schedules{', stopped' if self._task is None else ''}>"

    def go_on(self, desired: Desired, observed: Observed) -> None:
        """Fires from now on."""
        self._refusal = observed.store_is_full
        if desired is not self._desired:
            self._desired = desired
            self._changed.set()
        if self._task is None and desired.schedules:
            self._task = asyncio.create_task(keep_running("the firing of schedules", self._fire_forever), name="fire schedules")

    async def stop(self) -> None:
        """Fires no more. A job that is on its way may be sent once more by the next leader."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        self.problems = {}
        self._begin()

    async def _fire_forever(self) -> None:
        while True:
            self._changed.clear()
            pause_s = TRY_AGAIN_S
            try:
                pause_s = await self._fire_all()
                self._trouble.over()
            except MQServeError as error:
                self._trouble.say(f"schedules wait: {error}")
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _fire_all(self) -> float:
        """Fires what is due, and returns how long nothing else is. Raises StoreUnavailable, and NotLeading."""
        if self._known is None:
            await self._read()
            self._known = dict(self._written)
        schedules = self._desired.schedules
        self._forget_but({schedule for schedule in schedules.values() if not schedule.paused})
        now_ms = self._store.now_ms()
        if firing := [schedule for schedule in schedules.values() if self._is_due(schedule, now_ms)]:
            self._check_leads()
            async with asyncio.TaskGroup() as tasks:
                for schedule in firing:
                    tasks.create_task(self._fire(schedule, now_ms))
        self._known = {name: fired for name, fired in self._known.items() if name in schedules}
        if self._known != self._written:
            await self._write()
        if self.problems:
            return TRY_AGAIN_S
        now_ms = self._store.now_ms()
        return max(0.0, min([LOOK_EVERY_S, *((at - now_ms) / 1000 for at in self._next.values() if at is not None)]))

    def _forget_but(self, schedules: set[Schedule]) -> None:
        self._next = {schedule: at for schedule, at in self._next.items() if schedule in schedules}
        self._passed = {schedule: at for schedule, at in self._passed.items() if schedule in schedules}
        names = {problem_of(schedule.name) for schedule in schedules}
        self.problems = {name: problem for name, problem in self.problems.items() if name in names}

    def _is_due(self, schedule: Schedule, now_ms: int) -> bool:
        if schedule.paused:
            return False
        if schedule not in self._next:
            try:
                self._next[schedule] = cron_of(schedule.cron, schedule.timezone).next_after(self._after(schedule))
            except BadValue as error:  # another machine, or another version, could read it
                self.problems[problem_of(schedule.name)] = str(error)
                return False
        at = self._next[schedule]
        return at is not None and at <= now_ms

    def _after(self, schedule: Schedule) -> int:
        """Returns the moment behind which its times are not settled yet."""
        assert self._known is not None
        fired = self._known.get(schedule.name)
        return max(schedule.since_ms, self._passed.get(schedule, 0), fired.at if fired is not None else 0)

    async def _fire(self, schedule: Schedule, now_ms: int) -> None:
        """Sends the jobs that are due, in order, up to the first one that is not taken. That one is tried again for a minute."""
        assert self._known is not None
        cron = cron_of(schedule.cron, schedule.timezone)
        times = due(cron, self._after(schedule), now_ms, once=schedule.catch_up == "once")
        if not times:
            logger.warning("schedule %s has missed its time, by more than %d s", schedule.name, LATE_MS // 1000)
        try:
            for at_ms in times:
                self._check_leads()
                self._known[schedule.name] = Firing(at_ms, await self._send(schedule, at_ms))
            self._passed[schedule] = now_ms - LATE_MS
            self.problems.pop(problem_of(schedule.name), None)
        except MQServeError as error:
            self.problems[problem_of(schedule.name)] = f"it is due and was not sent: {error}"
            self._unsent.say(f"schedule {schedule.name} is due and was not sent: {error}")
        except Exception as error:  # the others fire all the same
            self.problems[problem_of(schedule.name)] = f"it is due and was not sent, by a bug in mqserve: {error!r}"
            logger.exception("schedule %s is due and was not sent: that is a bug in mqserve, please report it", schedule.name)
        self._next[schedule] = cron.next_after(self._after(schedule))

    def _check_leads(self) -> None:
        if not self._leader.still_leads():
            raise NotLeading("another controller took over, or may do so now")

    async def _send(self, schedule: Schedule, at_ms: int) -> str:
        """Returns the id of the job once the broker has it. Raises what `JobSender.submit` does, BadEnvelope for a call that is not ours,
        and BadValue without the endpoint."""
        endpoint = self._desired.endpoints.get(schedule.endpoint)
        if endpoint is None:
            raise BadValue(f"there is no endpoint {schedule.endpoint!r} any more: create it, or delete the schedule")
        try:
            call = ScheduledCall.opened(schedule.call, self._signer, schedule.endpoint, schedule.name)
        except BadEnvelope as error:
            raise BadEnvelope(f"its call was not made by a process with this instance's key ({error}): declare it again") from error
        job_id = self._signer.derived_id("firing", schedule.name, schedule.token, at_ms)
        stages = stages_of(endpoint, call.shard_key)
        # by the id, so that a second sending goes the same way
        backend, _ = choose(entry_of(endpoint, self._desired.endpoints), call.shard_key or job_id)
        sent_id = message_id(self._signer, job_id, stages)
        body = call.body_for(self._signer, schedule.endpoint, schedule.name, backend, sent_id, UNENDED_TTL_S * 1000)
        headers = (*call.head.headers, (b"x-schedule", schedule.name.encode()), (b"x-scheduled-for", _iso(at_ms).encode()))
        head = msgspec.structs.replace(call.head, headers=headers)
        terms = JobTerms(
            expires_ms=self._store.now_ms() + call.expires_ms if call.expires_ms else 0,
            result_ttl_s=call.result_ttl_s,
            priority=call.priority,
            tag=call.tag,
            once=_runs_once(self._desired.backends[backend]),
            stages=stages,
        )
        await self._jobs.submit(job_id, backend, body, call.content_type, head, origin="handle", terms=terms, refusal=self._refusal)
        return job_id

    # What is kept.

    async def _read(self) -> None:
        self._raw = await self._store.get(self._keys.firings)
        try:
            self._written = read_firings(self._raw)
        except BadEnvelope as error:
            logger.warning("%s; writing it anew", error)
            self._written = {}

    async def _write(self) -> None:
        """Raises NotLeading if another controller has taken over. What the store has lost is written again."""
        for _ in range(2):  # the first guard may be an old one: the lead is renewed meanwhile
            known = dict(self._known or {})
            raw = firings_to_bytes(known)
            if await self._store.replace(self._keys.firings, self._raw, raw, guard=self._leader.claim, quiet=True):
                self._raw, self._written = raw, known
                return
            await self._read()
        raise NotLeading("the firings of schedules were not noted: another controller leads")


def _runs_once(backend: Backend) -> bool:
    return backend.config.delivery == "at_most_once"


def _iso(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
