"""The reconcile loop: reads the desired and the observed state, decides in `plan`, declares queues, and writes the assignments.

Guarantees. What a client committed is durable in the store before anything acts on it. The loop is level-triggered: it may be killed
anywhere, and another controller goes on from the documents. Traffic does not pass through it and goes on without it; only replacing and
scaling wait. A controller that lost the lead writes nothing: the store refuses its writes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from ..broker.calls.cancellations import notice_of_proxy
from ..broker.errors import BrokerUnavailable, MQServeError, WrongType
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.stopping import first_of
from ..broker.queue import Queue
from ..broker.settings import DEFAULTS, Settings
from ..broker.store import Store
from ..broker.store_keys import CODE_TTL_S, StoreKeys
from . import lease, plan
from .absent_nodes import AbsentNodes
from .desired_writes import write_next
from .job_duties import JobDuties
from .job_ends import Senders
from .job_limits import job_limit_s, job_problems
from .known_documents import KnownDocuments
from .queues import REFUSAL_S, Queues
from .restarts import ENDED_WELL, Restarts
from .state.beats import Beat, MemberState, ProxyBeat, ReplicaBeat, beats_of, living, read_beats
from .state.documents import Assignment, Desired, Observed, deaths_of
from .state.reading import read_desired
from .store_checks import StoreChecks

logger = logging.getLogger(__name__)
T = TypeVar("T")

TICK_S = 1.0
FORGET_BEATS_AFTER_S = 60.0
LOST_PROXY_AFTER_S = 25.0  # without a beat for this long: its node, which kills it after 20 s, is gone too, or it has no node
SETTLE_S = 3.0  # after the store lost its data or was away, members get this long to beat again
AWAY_AFTER_S = 4.0  # if the last look at the store was longer ago, the store may have been away, and beats could not land either
NODE_GRACE_S = 20.0  # a node that starts beside its controller, or was late once, is no reason to fail a backend


class Controller:
    """One controller of an instance, of which only the leading one acts."""

    def __init__(
        self,
        store: Store,
        keys: StoreKeys,
        queue: Queue,
        controller_id: str,
        instance: str,
        *,
        kept_by: str = "",
        trouble: Callable[[], str] = lambda: "",
        senders: Senders | None = None,
        settings: Settings = DEFAULTS,
    ) -> None:
        self._store = store
        self._key_ids = settings.signer.key_ids
        self._keys = keys
        self._queue = queue
        self._instance = instance
        self._trouble = trouble  # what this process's keeper has to report to operators
        self._consumer_timeout_s = settings.consumer_timeout_s
        self._leader = lease.Leader(store, keys, controller_id, kept_by)
        self._job_duties = JobDuties(store, keys, queue, self._leader, self._while_leading, senders, settings)
        self._known = KnownDocuments(store, keys, instance)
        self._looked_at = -math.inf  # monotonic time of the last look at the store
        self._is_first_look = True
        self._settled_at = 0.0  # monotonic; until then missing members are ignored
        self._store_checks = StoreChecks(store)
        self._waiting, self._queues_wait = RateLimitedLog(logger), RateLimitedLog(logger)
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        """Resets a leader's memory between comparisons. It knows nothing of what happened while another controller led."""
        self._epoch = epoch
        self._restarts: dict[tuple[str, int], Restarts] = defaultdict(Restarts)  # by (backend, version)
        self._were_ready: set[str] = set()
        self._counted: set[str] = set()  # replicas whose death is counted already and that the observed document still names
        self._queues = Queues(self._queue, self._while_leading, self._next_generation, self._job_duties.leftovers)
        self._had_node_at = time.monotonic()
        self._closing_since = math.inf  # monotonic
        self._absent_nodes = AbsentNodes()
        self._renewed_at = -math.inf  # when the instance's lease was renewed, monotonic
        self._kept: frozenset[str] = frozenset()  # hashes of code whose TTL we removed
        self._kept_until = 0.0  # monotonic; then we remove them again, since what was lost and deployed anew has a TTL

    def __repr__(self) -> str:
        return f"<Controller {self._leader!r}>"

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set or the instance was shut down; then releases the lead, so that a standby leads at once."""
        changed = self._store.watch()
        try:
            while not stop.is_set():
                changed.clear()
                try:
                    if await self._turn():
                        return
                    self._waiting.over()
                except MQServeError as error:
                    self._waiting.say(f"the controller waits: {error}")
                await first_of(changed, stop, timeout_s=TICK_S)
        finally:
            self._store.unwatch(changed)
            await self._job_duties.stop()
            with suppress(MQServeError):
                await self._leader.release()

    async def _turn(self) -> bool:
        """One round; returns True when the instance is shut down and cleared, or another one has its place."""
        leads = await self._leader.lead()
        if leads and self._leader.epoch != self._epoch:
            logger.info("leading, under epoch %d", self._leader.epoch)
            await self._job_duties.step_down()  # it may have led before, and another controller since
            self._begin(self._leader.epoch)
        elif not leads and self._is_first_look:
            logger.info("another controller leads: waiting to take over")
        if not leads:
            await self._job_duties.step_down()
        self._is_first_look = False
        await self._known.read()
        self._note_look()
        known = self._known
        if known.is_anothers or (known.raw_desired is None and await lease.has_ended(self._store, self._keys, self._instance)):
            await self._leader.release(for_good=True)
            return True
        if known.observed is not None:
            self._leader.outrank(known.observed.epoch)
        if known.desired is None:
            if leads and known.raw_desired is not None:  # the document is broken, but the instance exists
                await self._renew_instance()
            return False
        if known.store_is_behind:
            if leads:
                await self._write_back()
            return False
        await self._job_duties.go_on(known.desired, known.observed, leads=leads)
        return leads and await self._tick(known.desired)

    def _note_look(self) -> None:
        """Ignores missing members for a while after the store was away. The first look of a process counts as such, too."""
        now = time.monotonic()
        is_late = now - self._looked_at > AWAY_AFTER_S
        observed = self._known.observed
        if is_late and observed is not None and (observed.replicas or observed.proxies):
            self._settled_at = now + SETTLE_S
        self._looked_at = now

    async def _tick(self, desired: Desired) -> bool:
        """One comparison; returns True when the instance is shut down and cleared."""
        await self._renew_instance()
        await self._keep_codes(desired)
        observed = self._known.observed or Observed()
        if observed.epoch > self._leader.epoch:
            return False  # the next claim will exceed that epoch
        beats = read_beats(await self._fields_of_beats())
        if time.monotonic() < self._settled_at and plan.somebody_is_missed(observed, beats, self._store.now_ms()):
            return False
        await self._store_checks.ask()
        beats = self._absent_nodes.added_to(beats)
        new = self._place(desired, observed, beats)
        try:
            new = await self._queues.keep(desired, new, beats, self._store.now_ms())
            self._queues_wait.over()
        except BrokerUnavailable as error:
            self._queues_wait.say(f"the queues wait: {error}")  # replicas and proxies go on without the broker
        await self._write(observed, new)
        await self._forget_silent(new, beats)
        await self._forget_forced(desired, new, beats)
        await self._job_duties.lead_on(desired, new)
        return desired.closing and await self._is_down(desired, new, beats)

    async def _fields_of_beats(self) -> dict[str, bytes]:
        try:
            return await self._store.fields(self._keys.beats)
        except WrongType:
            await self._leader.hold()
            await self._store.take_away(self._keys.beats)  # members beat again within a second
            raise

    async def _renew_instance(self) -> None:
        """Renews the instance's lease if that is due. A comparison may take longer than a lease lasts, so its long steps call this, too."""
        began = time.monotonic()
        if began - self._renewed_at < lease.RENEWED_EVERY_S:
            return
        if not await lease.renew_instance(self._store, self._keys, self._instance, self._leader.name, self._leader.claim):
            raise lease.NotLeading("the instance's lease was not renewed: another controller leads")
        self._renewed_at = began

    async def _write_back(self) -> None:
        """Restores the documents, assignments included, and gives members time to beat again: a loss of data must not stop running
        members."""
        self._kept = frozenset()  # the restored copy may be older than our record of kept code
        self._settled_at = time.monotonic() + SETTLE_S
        await self._known.write_back(self._leader.claim)

    async def _keep_codes(self, desired: Desired) -> None:
        """Removes the TTL of code that the document names, and sets one on code that it no longer names. The TTL gives a client time to
        commit a deployment, or to roll one back."""
        named = self._known.hashes_of(desired)
        if named == self._kept and time.monotonic() < self._kept_until:
            return
        for hashes, ttl_ms in ((named, None), (self._kept - named, CODE_TTL_S * 1000)):
            if hashes:
                await self._leader.hold()
                await self._store.expire([self._keys.code(sha256) for sha256 in hashes], ttl_ms)
        self._kept, self._kept_until = named, time.monotonic() + CODE_TTL_S / 6

    # Replicas and proxies.

    def _place(self, desired: Desired, observed: Observed, beats: dict[str, Beat]) -> Observed:
        now, now_ms = time.monotonic(), self._store.now_ms()
        nodes = plan.takers(beats, now_ms)
        replicas = living(beats, ReplicaBeat, now_ms)
        ready = {replica_id for replica_id, beat in replicas.items() if beat.state is MemberState.READY}
        if nodes or not desired.backends:
            self._had_node_at = now
        ended = plan.ended_replicas(observed.replicas, beats, now_ms)
        for replica_id, how in ended.items():
            is_wanted = observed.replicas[replica_id].backend in desired.backends and not desired.closing
            if is_wanted and replica_id not in self._counted:  # counted once: an assignment that could not be written is compared again
                was_ready = replica_id in self._were_ready
                self._count_death(
                    replica_id, observed.replicas[replica_id], beats.get(f"replica:{replica_id}"), how, now, was_ready=was_ready
                )
        self._counted = set(ended)
        assigned = {replica_id: assignment for replica_id, assignment in observed.replicas.items() if replica_id not in ended}
        for replica_id in ready & set(assigned) - self._were_ready:
            self._restarts[assigned[replica_id].backend, assigned[replica_id].version].got_ready()
        self._were_ready = (self._were_ready | ready) & set(assigned)
        self._forget_restarts(desired, assigned)
        if desired.closing:
            placement = plan.Placement(self._still_serving(desired, observed, assigned, beats, now), {})
        else:

            def may_start(name: str) -> bool:
                return self._restarts[name, desired.backends[name].version].not_before <= now

            still_draining = {replica_id: kept for replica_id, kept in observed.draining.items() if replica_id in replicas}
            placement = plan.place_replicas(desired, assigned, still_draining, ready - set(ended), nodes, may_start, _new_replica_id)
        placed = plan.of_backends(placement.replicas, {*desired.backends, *observed.queues})
        leaving = {**observed.draining, **assigned}
        version = self._queue.broker_version
        limit_s = job_limit_s(version, self._consumer_timeout_s) if version else observed.job_limit_s
        may_yet_come = not nodes and now - self._had_node_at < NODE_GRACE_S
        return msgspec.structs.replace(
            observed,
            epoch=self._leader.epoch,
            seen=(desired.epoch, desired.version),
            replicas=placed,
            draining={name: kept for name, kept in leaving.items() if name not in placed and name in replicas},
            proxies=() if desired.closing else plan.place_proxies(desired, nodes),
            problems=self._problems(desired, beats, {} if may_yet_come else placement.unplaced) | job_problems(desired, limit_s),
            down_since=self._down_since(desired, observed, placed, replicas, now_ms),
            job_limit_s=limit_s,
            store_is_full=self._store_checks.is_full,
            callbacks=self._job_duties.callbacks,
            sealed_by=() if plan.without_seals(beats) else self._key_ids,
            serving=tuple(sorted({replicas[name].backend for name in ready} & set(desired.backends))),
        )

    def _still_serving(
        self, desired: Desired, observed: Observed, assigned: plan.Replicas, beats: dict[str, Beat], now: float
    ) -> plan.Replicas:
        """Returns the replicas that a closing instance still needs: all while a proxy waits for answers, then those whose queue is not
        empty, for at most their backend's graceful_shutdown_timeout_s and the time that they need to answer the rest with 503."""
        self._closing_since = min(self._closing_since, now)
        if any(not beat.external for beat in living(beats, ProxyBeat, self._store.now_ms()).values()):
            return assigned
        drains_s = {
            name: backend.config.graceful_shutdown_timeout_s for name, backend in desired.backends.items() if name in observed.queues
        }
        in_time = {name for name, drain_s in drains_s.items() if now - self._closing_since < drain_s + REFUSAL_S}
        return plan.of_backends(assigned, in_time)

    def _forget_restarts(self, desired: Desired, assigned: plan.Replicas) -> None:
        """Forgets the restarts of versions that no backend has any more, once their last replica is gone."""
        wanted = {(name, backend.version) for name, backend in desired.backends.items()}
        wanted |= {(assignment.backend, assignment.version) for assignment in assigned.values()}
        self._restarts = defaultdict(Restarts, {key: kept for key, kept in self._restarts.items() if key in wanted})

    def _count_death(
        self, replica_id: str, assignment: Assignment, last_beat: Beat | None, how: str, now: float, *, was_ready: bool
    ) -> None:
        backend = assignment.backend
        restarts = self._restarts[backend, assignment.version]
        if how == ENDED_WELL:
            logger.warning("replica %s ended by itself, or with its node: starting another", replica_id)
            restarts.died_ready(now)
        elif was_ready or (isinstance(last_beat, ReplicaBeat) and last_beat.takes):
            # a failed health check gives the reason in its beat, and fails the change that may be its cause
            why = last_beat.error if last_beat is not None and last_beat.error else how
            logger.warning("replica %s died (%s): replacing it", replica_id, why)
            restarts.died_ready(now)
            restarts.reason = restarts.reason or (why if why != how else "")
        else:
            reason = last_beat.error if last_beat is not None and last_beat.error else how
            restarts.died_early(now, reason)
            logger.warning(
                "replica %s died before it was ready; the next try is in %.1f s: %s", replica_id, restarts.not_before - now, reason
            )

    def _problems(self, desired: Desired, beats: dict[str, Beat], unplaced: dict[str, str]) -> dict[str, str]:
        restarts = {name: self._restarts[name, backend.version] for name, backend in desired.backends.items()}
        problems = {name: kept.reason for name, kept in restarts.items() if kept.reason} | unplaced
        problems |= {deaths_of(name): kept.deaths for name, kept in restarts.items() if kept.deaths}
        for beat in beats_of(beats, ProxyBeat):
            if beat.state is MemberState.FAILED:
                problems[f"proxy on {beat.node or beat.host}"] = beat.error
        if problem := plan.seal_problem(beats, has_key=bool(self._key_ids)):
            problems["requests without a seal"] = problem
        if problem := plan.key_problem(beats, self._key_ids):
            problems["requests with another seal"] = problem
        problems |= self._store_checks.problems | self._job_duties.problems
        if noted := self._store.health.noted:
            problems["a key in the store"] = noted
        if trouble := self._trouble():
            problems["the instance"] = trouble
        return problems

    def _down_since(
        self, desired: Desired, observed: Observed, placed: plan.Replicas, replicas: dict[str, ReplicaBeat], now_ms: int
    ) -> dict[str, int]:
        """Returns the backends without a ready or starting replica, with the store time since when."""
        down: dict[str, int] = {}
        for name, backend in desired.backends.items():
            is_ready = any(beat.backend == name and beat.state is MemberState.READY for beat in replicas.values())
            is_placed = any(assignment.backend == name for assignment in placed.values())
            if not is_ready and not (is_placed and not self._restarts[name, backend.version].early_deaths):
                down[name] = observed.down_since.get(name, now_ms)
        return down

    # Queues.

    async def _next_generation(self, name: str, generation: int) -> None:
        raw = await self._store.get(self._keys.desired)
        desired = read_desired(raw)
        if (backend := desired.backends.get(name)) is not None and backend.generation == generation:
            newer = msgspec.structs.replace(backend, generation=generation + 1)
            updated = msgspec.structs.replace(desired, backends={**desired.backends, name: newer})
            await write_next(self._store, self._keys, raw, updated, guard=self._leader.claim)

    async def _while_leading(self, act: Callable[[], Awaitable[T]]) -> T:
        """Runs an operation that the broker cannot fence: only while we lead by our own clock, and no longer. Two leaders may both do
        such an operation, so it must be idempotent."""
        await self._leader.hold()
        await self._renew_instance()
        try:
            async with asyncio.timeout(self._leader.leads_for_s):
                return await act()
        except TimeoutError:
            raise BrokerUnavailable("RabbitMQ took longer than this controller's lease lasts") from None

    # Writing.

    async def _write(self, old: Observed, new: Observed) -> None:
        if msgspec.structs.replace(new, version=old.version) != old or self._known.observed_is_broken:
            await self._known.replace_observed(msgspec.structs.replace(new, version=old.version + 1), self._leader.claim)

    async def _forget_silent(self, observed: Observed, beats: dict[str, Beat]) -> None:
        """Drops the beats of members that are long gone. A failed replica's beat, which carries the reason, stays as long as its backend
        has the problem."""
        now_ms = self._store.now_ms()
        lost = {
            beat.id
            for beat in beats_of(beats, ProxyBeat)
            if beat.state is not MemberState.FAILED and now_ms - beat.at > LOST_PROXY_AFTER_S * 1000
        }
        old = [
            field
            for field, beat in beats.items()
            if (isinstance(beat, ProxyBeat) and beat.id in lost)
            or (isinstance(beat, ReplicaBeat) and not beat.external and beat.id not in observed.replicas and now_ms - beat.at > 10_000)
            or now_ms - beat.at > FORGET_BEATS_AFTER_S * 1000
        ]
        if old:
            await self._leader.hold()
            if lost:  # cancel the requests of dead proxies before dropping their beats: if the drop fails, the notice is sent again
                await self._store.append_log(self._keys.cancelled, *(notice_of_proxy(self._keys.inbox(name)) for name in lost))
            await self._store.drop_fields(self._keys.beats, *old)

    async def _forget_forced(self, desired: Desired, observed: Observed, beats: dict[str, Beat]) -> None:
        """Removes names of backends that were deleted by force, once nothing is left of them. Otherwise the document would keep them for
        ever."""
        alive = living(beats, ReplicaBeat, self._store.now_ms()).values()
        assigned = [*observed.replicas.values(), *observed.draining.values()]
        left = {*observed.queues, *observed.retiring, *(beat.backend for beat in alive), *(replica.backend for replica in assigned)}
        forced = tuple(name for name in desired.forced if name in left)
        if forced == desired.forced:
            return
        raw = await self._store.get(self._keys.desired)
        if raw == self._known.raw_desired and read_desired(raw) == desired:  # a broken document is left for its operator to mend
            newer = msgspec.structs.replace(desired, forced=forced)
            await write_next(self._store, self._keys, raw, newer, guard=self._leader.claim)

    async def _is_down(self, desired: Desired, observed: Observed, beats: dict[str, Beat]) -> bool:
        """Whether nothing of the closing instance is left; then deletes its documents, too."""
        now_ms = self._store.now_ms()
        children = [*living(beats, ReplicaBeat, now_ms).values(), *living(beats, ProxyBeat, now_ms).values()]
        if any(not child.external for child in children) or observed.queues or observed.retiring:
            return False
        if desired.backends:
            await self._job_duties.tidy()
        return await lease.forget(self._store, self._keys, self._instance, self._leader.claim)


def _new_replica_id(backend: str) -> str:
    return f"{backend}#{secrets.token_hex(3)}"
