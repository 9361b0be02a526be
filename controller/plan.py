"""Where replicas and proxies are to run: pure functions from what is wanted and what is seen to what is assigned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from .state import SILENT_AFTER_S, Assignment, Beat, Desired

Replicas = dict[str, Assignment]


def living(beats: Mapping[str, Beat], kind: str, now_ms: int) -> dict[str, Beat]:
    """Members of a kind that beat lately, by id."""
    return {
        beat.id: beat
        for beat in beats.values()
        if beat.kind == kind and (now_ms - beat.at) < SILENT_AFTER_S * 1000 and beat.state != "failed"
    }


def ended_replicas(assigned: Mapping[str, Assignment], beats: Mapping[str, Beat], now_ms: int) -> dict[str, str]:
    """Assigned replicas that are no more -> how they ended: as their node says, or with their node."""
    nodes = living(beats, "node", now_ms)
    ended: dict[str, str] = {}
    for replica_id, assignment in assigned.items():
        node = nodes.get(assignment.node)
        if node is None:
            ended[replica_id] = f"its node {assignment.node} is gone"
        elif replica_id in node.ended:
            ended[replica_id] = node.ended[replica_id]
    return ended


def place_replicas(
    desired: Desired,
    assigned: Mapping[str, Assignment],
    ready: Iterable[str],
    nodes: Iterable[str],
    may_start: Callable[[str], bool],
    new_id: Callable[[str], str],
) -> Replicas:
    """The assignment from now on.

    New versions start beside old ones and an old one goes for each new one that is ready, so a version that does not get
    ready stops there and the old ones serve on. Backends that are gone from `desired` keep theirs: see `of_backends`.
    """
    replicas = dict(assigned)
    ready = set(ready)
    load = Counter({node: 0 for node in nodes})
    load.update(assignment.node for assignment in replicas.values() if assignment.node in load)
    for name, backend in desired.backends.items():
        wanted = backend.config.num_replicas
        mine = [replica_id for replica_id, assignment in replicas.items() if assignment.backend == name]
        current = [replica_id for replica_id in mine if replicas[replica_id].version == backend.version]
        old = [replica_id for replica_id in mine if replica_id not in current]
        while len(current) < wanted and load and may_start(name):
            node = min(load, key=lambda node: (load[node], node))
            load[node] += 1
            replica_id = new_id(name)
            replicas[replica_id] = Assignment(name, node, backend.version)
            current.append(replica_id)
        surplus = sorted(current, key=lambda replica_id: replica_id not in ready)[wanted:]
        replaced = sorted(old, key=lambda replica_id: replica_id in ready)
        still_needed = max(0, wanted - len([replica_id for replica_id in current if replica_id in ready]))
        for replica_id in [*surplus, *replaced[: max(0, len(old) - still_needed)]]:
            del replicas[replica_id]
    return replicas


def of_backends(replicas: Replicas, names: Iterable[str]) -> Replicas:
    """Those of `names`: a backend that was deleted keeps its replicas until its queue is drained."""
    kept = set(names)
    return {replica_id: assignment for replica_id, assignment in replicas.items() if assignment.backend in kept}


def place_proxies(desired: Desired, nodes: Mapping[str, Beat]) -> tuple[str, ...]:
    """The nodes that are to run a proxy, by the instance's location."""
    takers = sorted(node for node, beat in nodes.items() if beat.takes_proxy)
    match desired.http.location:
        case "EveryNode":
            return tuple(takers)
        case "HeadOnly":
            return tuple(node for node in takers if node == desired.head_node)
        case _:
            return ()
