"""What the members say of a change, read from the observed state and the beats: whether it is in effect, or why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..broker.errors import BackendFailed
from ..controller.state.beats import Beat, MemberState, ProxyBeat, ReplicaBeat, beats_of, living
from ..controller.state.documents import Backend, Desired, Observed

ROUTE_BUDGET_S = 30.0
DELETE_BUDGET_S = 60.0
READY_MARGIN_S = 15.0
START_SHARE_S = 1.0  # replicas that start together share the cores, so each of them gives all the others this much more time
NAMED_AT_MOST = 5

PROXIES_ARE_BEHIND = "not all proxies follow it"

Version = tuple[int, int]  # (epoch, version) of a desired document


class Refusal(NamedTuple):
    """A member that cannot follow a change."""

    member: str
    words: str


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of the members at one moment."""

    observed: Observed
    beats: Mapping[str, Beat]
    now_ms: int

    def refusal(self, version: Version, *, of_convertors: bool) -> Refusal | None:
        """Returns why a live proxy cannot follow this version, or, with `of_convertors`, a replica its convertors."""
        for proxy in self._proxies():
            if proxy.refuses >= version:
                return Refusal("a proxy", proxy.refused)
        for replica in self._replicas_with_convertors() if of_convertors else ():
            if replica.convertor_error and _convertors_of(replica) >= version:
                return Refusal(f"replica {replica.id}", replica.convertor_error)
        return None

    def behind(self, version: Version, *, of_convertors: bool) -> list[str]:
        """Returns as clauses what live proxies, and with `of_convertors` replicas, do not follow yet."""
        clauses = [] if all(proxy.follows >= version for proxy in self._proxies()) else [PROXIES_ARE_BEHIND]
        if of_convertors:
            late = [replica.id for replica in self._replicas_with_convertors() if _convertors_of(replica) < version]
            clauses += [f"replica {name} has not learned its convertors" for name in late]
        return clauses

    def _proxies(self) -> list[ProxyBeat]:
        return [beat for beat in living(self.beats, ProxyBeat, self.now_ms).values() if beat.state is MemberState.READY]

    def _replicas_with_convertors(self) -> list[ReplicaBeat]:
        """The replicas that follow the convertors of the document. Those that do not say so are of an earlier version, or start and read
        the document before their first request; those that drain follow nothing, and their last requests were sent before."""
        replicas = living(self.beats, ReplicaBeat, self.now_ms).values()
        return [beat for beat in replicas if beat.convertors is not None and beat.state is not MemberState.DRAINING]

    def replicas(self) -> dict[str, list[ReplicaBeat]]:
        """Returns the beats of all replicas, by backend."""
        found: dict[str, list[ReplicaBeat]] = {}
        for beat in beats_of(self.beats, ReplicaBeat):
            found.setdefault(beat.backend, []).append(beat)
        return found

    def is_ready(self, backend: Backend, version: Version, since_ms: int, replicas: list[ReplicaBeat]) -> bool:
        """Whether the backend, of whose replicas these are the beats, has as many assigned ones of this version as are wanted, and its
        queue. Raises BackendFailed with the first failure's own words."""
        observed = self.observed
        mine = [beat for beat in replicas if beat.version == backend.version]
        for beat in mine:
            if beat.state is MemberState.FAILED and beat.at >= since_ms:
                raise BackendFailed(beat.error)
        if observed.seen >= version and (problem := observed.problems.get(backend.name)):
            raise BackendFailed(f"backend {backend.name!r} does not get ready: {problem}")
        for beat in mine:
            if beat.refused and beat.follows[1] >= backend.config_version:
                raise BackendFailed(beat.refused)
        ready = [
            beat
            for beat in mine
            if beat.state is MemberState.READY and beat.id in observed.replicas and beat.follows[1] >= backend.config_version
        ]
        has_its_queue = backend.generation <= max(observed.queues.get(backend.name, (0,)))  # the old one is unbound with that
        return has_its_queue and len(ready) >= backend.config.num_replicas and not self._is_served_by_older_ones(backend, replicas)

    def _is_served_by_older_ones(self, backend: Backend, replicas: list[ReplicaBeat]) -> bool:
        """Whether a replica of an earlier version or config may take a request that is sent now."""
        if any(other.backend == backend.name and other.version < backend.version for other in self.observed.replicas.values()):
            return True
        return any(beat.follows[1] < backend.config_version for beat in self._taking(replicas)) or bool(self.unaware(backend, replicas))

    def unaware(self, backend: Backend, replicas: list[ReplicaBeat]) -> list[str]:
        """Returns as clauses which replicas of earlier versions are not assigned any more and have not heard of it: such a one takes
        requests until it says that it drains."""
        old = [beat.id for beat in self._taking(replicas) if beat.version < backend.version and beat.id not in self.observed.replicas]
        return [f"replica {name} has not heard yet that it is replaced" for name in old]

    def _taking(self, replicas: list[ReplicaBeat]) -> list[ReplicaBeat]:
        """Those that take requests, except for external ones: whoever started them ends them."""
        return [beat for beat in replicas if beat.state is MemberState.READY and not beat.external and beat.is_alive(self.now_ms)]

    def is_gone(self, backend: str) -> bool:
        """Whether neither a queue nor a replica of the backend is left."""
        observed = self.observed
        held = {*observed.queues, *observed.retiring, *(assignment.backend for assignment in observed.replicas.values())}
        return backend not in held

    def reasons(self) -> str:
        """All that members and the controller report as wrong, as one line."""
        told = {beat.id: beat.error for beat in beats_of(self.beats, ReplicaBeat) if beat.error}
        return "; ".join(f"{name}: {problem}" for name, problem in {**told, **self.observed.problems}.items())


def _convertors_of(replica: ReplicaBeat) -> Version:
    return replica.convertors or (0, 0)


class Awaited:
    """What a change of many parts, from the document `before` to `made`, still waits for."""

    def __init__(self, before: Desired, made: Desired, version: Version, since_ms: int) -> None:
        self._version = version
        self._since_ms = since_ms
        self._starting = {name: backend for name, backend in made.backends.items() if before.backends.get(name) != backend}
        self._going = {name: backend for name, backend in before.backends.items() if name not in made.backends}
        self._has_convertors = made.convertors != before.convertors
        self._behind = [PROXIES_ARE_BEHIND]
        self.count = len(self._starting)

    def __repr__(self) -> str:
        return f"<Awaited {self.names()}>"

    @property
    def budget_s(self) -> float:
        """The time until all must be in effect."""
        configs = [backend.config for backend in self._starting.values()]
        start_s = max((config.start_timeout_s + READY_MARGIN_S for config in configs), default=0.0)
        start_s += START_SHARE_S * sum(config.num_replicas for config in configs[1:])
        drain_s = max((backend.config.graceful_shutdown_timeout_s + DELETE_BUDGET_S for backend in self._going.values()), default=0.0)
        return max(ROUTE_BUDGET_S, start_s, drain_s)

    def look(self, seen: Seen) -> list[str]:
        """Returns the backends that have got ready since the last look. Raises BackendFailed with the first failure's own words."""
        if refusal := seen.refusal(self._version, of_convertors=self._has_convertors):
            raise BackendFailed(f"{refusal.member} cannot follow the change: {refusal.words}")
        if self._behind:  # a member that joins later reads this version first
            self._behind = seen.behind(self._version, of_convertors=self._has_convertors)
        replicas = seen.replicas()
        ready = [
            name
            for name, backend in self._starting.items()
            if seen.is_ready(backend, self._version, self._since_ms, replicas.get(name, []))
        ]
        for name in ready:
            del self._starting[name]
        self._going = {name: backend for name, backend in self._going.items() if not seen.is_gone(name)}
        return ready

    @property
    def is_over(self) -> bool:
        return not self._behind and not self._starting and not self._going

    def names(self) -> str:
        """Names what is missing, as a clause."""
        missing = [f"backend {name!r} is not ready" for name in self._starting]
        missing += [f"backend {name!r} still drains" for name in self._going]
        missing += self._behind
        return listed(missing)


def listed(missing: Sequence[str]) -> str:
    """Returns them as one clause, of bounded length."""
    more = f" and {len(missing) - NAMED_AT_MOST} more" if len(missing) > NAMED_AT_MOST else ""
    return ", ".join(missing[:NAMED_AT_MOST]) + more
