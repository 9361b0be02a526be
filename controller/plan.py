"""Placement of replicas and proxies: pure functions from the desired and the observed state to assignments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .restarts import ENDED_WELL
from .state.beats import Beat, MemberState, NodeBeat, ProxyBeat, ReplicaBeat, living
from .state.documents import Assignment, Backend, Desired, Observed
from .state.resources import Room

Replicas = dict[str, Assignment]


class Placement(NamedTuple):
    """Which node runs what from now on, and which backends find no room, with the reason."""

    replicas: Replicas
    unplaced: dict[str, str]


def without_seals(beats: Mapping[str, Beat]) -> list[str]:
    """Names the proxies and replicas that send requests without a seal. A dead one counts until its beat is dropped, since it may be
    started again."""
    return sorted(beat.id for beat in _senders(beats) if not beat.seal_key and beat.state is not MemberState.FAILED)


def _senders(beats: Mapping[str, Beat]) -> list[ProxyBeat | ReplicaBeat]:
    return [beat for beat in beats.values() if isinstance(beat, ProxyBeat | ReplicaBeat)]


def seal_problem(beats: Mapping[str, Beat], *, has_key: bool) -> str:
    """A sentence for operators if some members have the key and others do not, or are of an earlier version. `has_key` is the
    controller's own."""
    without = [*([] if has_key else ["the controller"]), *without_seals(beats)]
    if not without or not (has_key or any(beat.seal_key for beat in _senders(beats))):
        return ""
    return f"replicas accept mq headers without a seal until these are updated and have MQSERVE_SECRET_KEY: {', '.join(without)}"


def key_problem(beats: Mapping[str, Beat], key_ids: Sequence[str]) -> str:
    """A sentence for operators if some members seal with a key that is none of these, which are the controller's."""
    senders = [beat for beat in _senders(beats) if beat.seal_key and beat.state is not MemberState.FAILED]
    others = sorted(beat.id for beat in senders if beat.seal_key not in key_ids)
    if not (others and key_ids):
        return ""
    return f"what these send becomes dead letters until they have the MQSERVE_SECRET_KEY of the controller: {', '.join(others)}"


def somebody_is_missed(observed: Observed, beats: Mapping[str, Beat], now_ms: int) -> bool:
    """Whether a member that should be there does not beat, or one that was there no longer does."""
    assigned = {**observed.replicas, **observed.draining}
    nodes = {*observed.proxies, *(assignment.node for assignment in observed.replicas.values())}
    expected = {*(f"replica:{replica_id}" for replica_id in assigned), *(f"node:{node}" for node in nodes)}
    members = [beat for beat in beats.values() if isinstance(beat, NodeBeat | ProxyBeat | ReplicaBeat)]
    expected |= {beat.field for beat in members if beat.state is not MemberState.FAILED}
    return any(field not in beats or not beats[field].is_recent(now_ms) for field in expected)


def takers(beats: Mapping[str, Beat], now_ms: int) -> dict[str, NodeBeat]:
    """The nodes that accept new work: those that do not drain."""
    return {node: beat for node, beat in living(beats, NodeBeat, now_ms).items() if beat.state is not MemberState.DRAINING}


def ended_replicas(assigned: Mapping[str, Assignment], beats: Mapping[str, Beat], now_ms: int) -> dict[str, str]:
    """Returns assigned replicas that have ended, or are about to end with their node -> how they ended, as their node reports or because
    it is gone."""
    nodes = living(beats, NodeBeat, now_ms)
    ended: dict[str, str] = {}
    for replica_id, assignment in assigned.items():
        node = nodes.get(assignment.node)
        if f"node:{assignment.node}" not in beats:  # a node that drained removed its beat; a node that died leaves its last one
            ended[replica_id] = ENDED_WELL
        elif node is None:
            ended[replica_id] = f"its node {assignment.node} is gone"
        elif replica_id in node.ended:
            ended[replica_id] = node.ended[replica_id]
        elif node.state is MemberState.DRAINING:
            ended[replica_id] = ENDED_WELL
    return ended


def place_replicas(
    desired: Desired,
    assigned: Mapping[str, Assignment],
    draining: Mapping[str, Assignment],
    ready: Iterable[str],
    nodes: Mapping[str, NodeBeat],
    may_start: Callable[[str], bool],
    new_id: Callable[[str], str],
) -> Placement:
    """Returns the new assignment. `draining` replicas still take their room. Replicas of backends that are gone from `desired` are kept:
    see `of_backends`."""
    board = _Board(assigned, draining, nodes, frozenset(ready), new_id)
    unplaced: dict[str, str] = {}
    for backend in desired.backends.values():
        reason = _place_backend(backend, board, may_start(backend.name))
        if reason:
            unplaced[backend.name] = reason
    return Placement(board.replicas, unplaced)


def _place_backend(backend: Backend, board: _Board, may_start: bool) -> str:
    """Takes one backend's step; returns the reason if it finds no room.

    A new version starts beside the old one, with at most `max_surge` replicas beyond the wanted number, and one old replica is stopped
    for each new one that is ready. So a version that does not get ready stops there, and the old one serves on. If there is no room for a
    surge, one old replica drains first, if two or more serve.
    """
    wanted = backend.config.num_replicas
    current, old = board.versions(backend)
    surplus = sorted(current, key=lambda replica_id: replica_id not in board.ready)[wanted:]
    ready_now = [replica_id for replica_id in current if replica_id in board.ready]
    still_needed = max(0, wanted - len(ready_now))
    spare = sorted(old, key=lambda replica_id: replica_id in board.ready)[: max(0, len(old) - still_needed)]
    board.drop([*surplus, *spare])
    current, old = board.versions(backend)
    reason = ""
    while may_start and not reason and len(current) < wanted and (not old or len(current) + len(old) < wanted + backend.config.max_surge):
        reason = board.start(backend)
        current, old = board.versions(backend)
    if reason and (board.is_draining(backend) or (old and board.is_starting(current))):
        return ""  # a step of the roll-out is under way and will make room for the next, so there is nothing to report
    serving = [replica_id for replica_id in old if replica_id in board.ready]
    if reason and len(serving) + len(ready_now) >= 2 and serving:
        board.drop(serving[:1])  # the next comparison uses its room
        return ""
    return reason


class _Board:
    """The assignment in the making, with the room left on each node."""

    def __init__(
        self,
        assigned: Mapping[str, Assignment],
        draining: Mapping[str, Assignment],
        nodes: Mapping[str, NodeBeat],
        ready: frozenset[str],
        new_id: Callable[[str], str],
    ) -> None:
        self.replicas = dict(assigned)
        self.ready = ready
        self._draining = draining
        self._new_id = new_id
        self._rooms = {node: Room(beat.capacity) for node, beat in nodes.items()}
        self._load = Counter({node: 0 for node in nodes})
        for assignment in [*assigned.values(), *draining.values()]:
            if assignment.node in self._rooms:
                self._load[assignment.node] += 1
                self._rooms[assignment.node].take(assignment.demand, assignment.gpus)

    def versions(self, backend: Backend) -> tuple[list[str], list[str]]:
        """Returns the backend's replicas of the current version, and the older ones."""
        mine = [replica_id for replica_id, assignment in self.replicas.items() if assignment.backend == backend.name]
        current = [replica_id for replica_id in mine if self.replicas[replica_id].version == backend.version]
        return current, [replica_id for replica_id in mine if replica_id not in current]

    def is_starting(self, replica_ids: Iterable[str]) -> bool:
        return any(replica_id not in self.ready for replica_id in replica_ids)

    def is_draining(self, backend: Backend) -> bool:
        return any(assignment.backend == backend.name for assignment in self._draining.values())

    def start(self, backend: Backend) -> str:
        """Starts a replica on the node with the fewest replicas among those with room; a replica is never split. Returns the reason if no
        node has room."""
        demand = backend.options.demand
        fitting = {node: gpus for node, room in self._rooms.items() if (gpus := room.fit(demand)) is not None}
        if not fitting:
            if not self._rooms:
                return "there is no node to run it: start one with `mqserve node`"
            return f"Cannot scale backend {backend.name!r}: a replica needs {demand}, and no node has that much left"
        node = min(fitting, key=lambda node: (self._load[node], node))
        self._load[node] += 1
        self._rooms[node].take(demand, fitting[node])
        self.replicas[self._new_id(backend.name)] = Assignment(backend.name, node, backend.version, demand, fitting[node])
        return ""

    def drop(self, replica_ids: Iterable[str]) -> None:
        """Drops replicas. Their room is free only once they are gone, at a later comparison."""
        for replica_id in replica_ids:
            del self.replicas[replica_id]


def of_backends(replicas: Replicas, names: Iterable[str]) -> Replicas:
    """Returns the replicas of `names`: a deleted backend keeps its replicas until its queue is drained."""
    kept = set(names)
    return {replica_id: assignment for replica_id, assignment in replicas.items() if assignment.backend in kept}


def place_proxies(desired: Desired, nodes: Mapping[str, NodeBeat]) -> tuple[str, ...]:
    """Returns the nodes that are to run a proxy, by the instance's location option."""
    takers = sorted(node for node, beat in nodes.items() if beat.takes_proxy)
    match desired.http.location:
        case "EveryNode":
            return tuple(takers)
        case "HeadOnly":
            return tuple(node for node in takers if node == desired.head_node)
        case _:
            return ()
