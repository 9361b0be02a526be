"""Fires the schedules: at each of its times the leader sends a job, and notes that once the broker has confirmed it.

The job's id follows from the schedule and the time. So a leader that dies between the two costs nothing: the next one sends the same job
again, which replicas recognize by its record.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from ..broker.backoff import keep_running
from ..broker.calls.job_sending import JobSender
from ..broker.errors import BadEnvelope, BadValue, MQServeError
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.signing import Signer
from .cron import LATE_MS, cron_of, due
from .lease import Leader, NotLeading
from .scheduled_jobs import send_scheduled
from .state.documents import Desired, Observed, Schedule
from .state.firings import Firing, firings_to_bytes, problem_of, read_firings, times_of

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0  # store time may be set anew
TRY_AGAIN_S = 1.0
NOTHING_NOTED = Firing()


class _Course:
    """How far one schedule is: its times until `settled_ms` have their jobs, or were missed.

    It goes on where the schedule of the same name and times was in an instance that has ended: what was due between the two belongs to that
    one, whose token it has. So a job that was sent and not noted there has the same id here.
    """

    def __init__(self, schedule: Schedule, noted: Firing) -> None:
        """Raises BadValue for times that this machine cannot read."""
        self.cron = cron_of(schedule.cron, schedule.timezone)
        self.unsent = RateLimitedLog(logger)
        self._schedule = schedule
        is_its_own = noted.token == schedule.token
        self._before = noted.token if not is_its_own and noted.times == times_of(schedule) else ""
        self.settle(noted.until if self._before else max(schedule.since_ms, noted.at, noted.until if is_its_own else 0))

    def __repr__(self) -> str:
        return f"<_Course of {self._schedule.name} until {self.settled_ms}>"

    def token_at(self, ms: int) -> str:
        return self._before if self._before and ms <= self._schedule.since_ms else self._schedule.token

    def noted(self, last: Firing) -> Firing:
        """Returns what the next leader has to know."""
        return Firing(last.at, last.job, self.settled_ms, times_of(self._schedule), self.token_at(self.settled_ms))

    def settle(self, until_ms: int) -> None:
        self.settled_ms = until_ms
        self.next_ms = self.cron.next_after(until_ms)

    def is_due(self, now_ms: int) -> bool:
        if self.settled_ms > now_ms + LATE_MS:  # store time was set back, and must not keep it from firing until it is there again
            self.settle(now_ms)
        return self.next_ms is not None and self.next_ms <= now_ms


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
        self._trouble = RateLimitedLog(logger)
        self.problems: dict[str, str] = {}
        self._sent: dict[str, Firing] = {}  # what this process knew when it last led, or what the leader has noted since
        self._begin()

    def _begin(self) -> None:
        """Forgets what another leader may have changed."""
        self._known: dict[str, Firing] | None = None  # None until it was read
        self._written: dict[str, Firing] = {}
        self._raw: bytes | None = None  # as it stands in the store
        self._courses: dict[Schedule, _Course] = {}

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

    async def follow(self) -> None:
        """Keeps a copy of what the leader notes: if the store loses it, this process may be the one that leads next."""
        with suppress(BadEnvelope):
            self._sent = read_firings(await self._store.get(self._keys.firings)) or self._sent

    async def stop(self) -> None:
        """Fires no more. A job that is on its way may be sent once more by the next leader."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        self.problems = {}
        self._sent = self._known or self._sent
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
            self._known = self._written | self._lost()
        desired, schedules = self._desired, self._desired.schedules
        self._forget_but({schedule for schedule in schedules.values() if not schedule.paused})
        now_ms = self._store.now_ms()
        if firing := [schedule for schedule in schedules.values() if not schedule.paused and self._is_due(schedule, now_ms)]:
            self._check_leads()
            async with asyncio.TaskGroup() as tasks:
                for schedule in firing:
                    tasks.create_task(self._fire(schedule, now_ms))
        for schedule in schedules.values():
            self._note(schedule)
        if not desired.incomplete:  # its starter may yet declare those of the instance before
            self._known = {name: fired for name, fired in self._known.items() if name in schedules}
        if self._known != self._written:
            await self._write()
        return self._pause_s()

    def _lost(self) -> dict[str, Firing]:
        """Returns what this process knows better than the store, which has lost what was noted."""
        return {
            schedule.name: sent
            for schedule in self._desired.schedules.values()
            if (sent := self._sent.get(schedule.name)) is not None
            and sent.token == schedule.token
            and sent.until > self._written.get(schedule.name, NOTHING_NOTED).until
        }

    def _pause_s(self) -> float:
        """Returns for how long nothing is due: one that could not be sent, and is tried again, makes no other late."""
        sound = [course for schedule, course in self._courses.items() if problem_of(schedule.name) not in self.problems]
        now_ms = self._store.now_ms()
        until_due_s = [(course.next_ms - now_ms) / 1000 for course in sound if course.next_ms is not None]
        return max(0.0, min([TRY_AGAIN_S if self.problems else LOOK_EVERY_S, *until_due_s]))

    def _forget_but(self, schedules: set[Schedule]) -> None:
        self._courses = {schedule: course for schedule, course in self._courses.items() if schedule in schedules}
        names = {problem_of(schedule.name) for schedule in schedules}
        self.problems = {name: problem for name, problem in self.problems.items() if name in names}

    def _is_due(self, schedule: Schedule, now_ms: int) -> bool:
        assert self._known is not None
        if schedule not in self._courses:
            try:
                self._courses[schedule] = _Course(schedule, self._known.get(schedule.name, NOTHING_NOTED))
            except BadValue as error:  # another machine, or another version, could read it
                self.problems[problem_of(schedule.name)] = str(error)
                return False
        return self._courses[schedule].is_due(now_ms)

    async def _fire(self, schedule: Schedule, now_ms: int) -> None:
        """Sends the jobs that are due, in order, up to the first one that is not taken. That one is tried again for a minute."""
        assert self._known is not None
        course = self._courses[schedule]
        times = due(course.cron, course.settled_ms, now_ms, once=schedule.catch_up == "once")
        if not times:
            logger.warning("schedule %s has missed its time, by more than %d s", schedule.name, LATE_MS // 1000)
        try:
            for at_ms in times:
                self._check_leads()
                job_id = self._signer.derived_id("firing", schedule.name, course.token_at(at_ms), at_ms)
                await send_scheduled(self._jobs, self._signer, self._desired, schedule, job_id, at_ms, refusal=self._refusal)
                course.settle(at_ms)
                self._known[schedule.name] = course.noted(Firing(at_ms, job_id))
            course.settle(max(course.settled_ms, now_ms - LATE_MS))
            self.problems.pop(problem_of(schedule.name), None)
            course.unsent.over()
        except MQServeError as error:
            self.problems[problem_of(schedule.name)] = f"it is due and was not sent: {error}"
            course.unsent.say(f"schedule {schedule.name} is due and was not sent: {error}")
        except Exception as error:  # the others fire all the same
            self.problems[problem_of(schedule.name)] = f"it is due and was not sent, by a bug in mqserve: {error!r}"
            logger.exception("schedule %s is due and was not sent: that is a bug in mqserve, please report it", schedule.name)

    def _note(self, schedule: Schedule) -> None:
        """A time that is made up for must not be one at which it was paused, so the next instance does not go on with one that is."""
        assert self._known is not None
        last = self._known.get(schedule.name, NOTHING_NOTED)
        if schedule.paused:
            self._known[schedule.name] = Firing(last.at, last.job, token=schedule.token)
        elif (course := self._courses.get(schedule)) is not None and (last.token, last.times) != (schedule.token, times_of(schedule)):
            self._known[schedule.name] = course.noted(last)

    def _check_leads(self) -> None:
        if not self._leader.still_leads():
            raise NotLeading("another controller took over, or may do so now")

    # What is kept.

    async def _read(self) -> None:
        self._raw = await self._store.get(self._keys.firings)
        if self._known is None:
            await self._store.expire([self._keys.firings], None)  # an instance that has ended left it
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
