"""Where replicas and proxies go: plain values in, plain values out."""

from itertools import count

import msgspec
import pytest

from mqserve.controller.plan import (
    Placement,
    ended_replicas,
    of_backends,
    place_proxies,
    place_replicas,
    somebody_is_missed,
    takers,
)
from mqserve.controller.restarts import ENDED_WELL
from mqserve.controller.state.beats import SILENT_AFTER_S, Beat, MemberState, NodeBeat, ProxyBeat, ReplicaBeat, SupervisorBeat, living
from mqserve.controller.state.documents import Assignment, Backend, Desired, HttpOptions, Observed
from mqserve.controller.state.resources import Capacity, parse_actor_options
from mqserve.controller.state.traffic import choose_backend

NOW_MS = 1_000_000
SILENT_MS = NOW_MS - int(SILENT_AFTER_S * 1000)


def wanting(**replicas: int) -> Desired:
    return Desired(backends={name: Backend(name, "code", name, {"num_replicas": number}) for name, number in replicas.items()})


def updated(desired: Desired, name: str) -> Desired:
    backend = desired.backends[name]
    return msgspec.structs.replace(desired, backends={**desired.backends, name: msgspec.structs.replace(backend, version=2)})


def place(
    desired: Desired,
    assigned: dict[str, Assignment] | None = None,
    ready: set[str] | None = None,
    nodes: tuple[str, ...] = ("n1", "n2"),
    may_start: bool = True,
) -> dict[str, Assignment]:
    numbers = count(1)
    beats = {node: NodeBeat(node, NOW_MS, capacity=Capacity(num_cpus=4)) for node in nodes}
    new_id = lambda name: f"{name}-new{next(numbers)}"  # noqa: E731
    return place_replicas(desired, assigned or {}, {}, ready or set(), beats, lambda _: may_start, new_id).replicas


def test_missing_replicas_are_spread_over_the_nodes() -> None:
    placed = place(wanting(a=3, b=1))
    assert sorted(assignment.node for assignment in placed.values()) == ["n1", "n1", "n2", "n2"]
    assert sorted(assignment.backend for assignment in placed.values()) == ["a", "a", "a", "b"]


def test_what_is_as_wanted_stays_as_it_is() -> None:
    assigned = {"a1": Assignment("a", "n1", 1), "a2": Assignment("a", "n2", 1)}
    assert place(wanting(a=2), assigned) == assigned


def test_without_a_node_nothing_is_placed() -> None:
    assert place(wanting(a=2), nodes=()) == {}


def test_a_backend_in_its_pause_gets_no_replica() -> None:
    assert place(wanting(a=2), may_start=False) == {}


def test_the_surplus_goes_and_those_that_are_ready_stay() -> None:
    assigned = {name: Assignment("a", "n1", 1) for name in ("a1", "a2", "a3")}
    assert set(place(wanting(a=1), assigned, ready={"a2"})) == {"a2"}


def test_a_new_version_starts_beside_the_old_one() -> None:
    assigned = {"a1": Assignment("a", "n1", 1), "a2": Assignment("a", "n2", 1)}
    placed = place(updated(wanting(a=2), "a"), assigned, ready={"a1", "a2"})
    assert {"a1", "a2"} < set(placed) and [assignment.version for assignment in placed.values()] == [1, 1, 2]  # max_surge is 1


def test_an_old_replica_goes_for_each_new_one_that_is_ready() -> None:
    assigned = {
        "a1": Assignment("a", "n1", 1),
        "a2": Assignment("a", "n2", 1),
        "b1": Assignment("a", "n1", 2),
        "b2": Assignment("a", "n2", 2),
    }
    desired = updated(wanting(a=2), "a")
    assert len([name for name in place(desired, assigned, ready={"a1", "a2", "b1"}) if name.startswith("a")]) == 1
    assert set(place(desired, assigned, ready={"a1", "a2", "b1", "b2"})) == {"b1", "b2"}


def test_replicas_of_a_deleted_backend_stay_until_its_queue_is_drained() -> None:
    assigned = {"a1": Assignment("a", "n1", 1), "b1": Assignment("b", "n1", 1)}
    assert place(wanting(a=1), assigned) == assigned
    assert set(of_backends(assigned, ["a"])) == {"a1"}


def beats(*members: Beat) -> dict[str, Beat]:
    return {member.field: member for member in members}


def test_a_member_that_is_silent_or_failed_does_not_live() -> None:
    seen = beats(
        NodeBeat(id="n1", at=NOW_MS),
        NodeBeat(id="n2", at=SILENT_MS),
        NodeBeat(id="n3", at=NOW_MS, state=MemberState.FAILED),
        ProxyBeat(id="p1", at=NOW_MS),
    )
    assert set(living(seen, NodeBeat, NOW_MS)) == {"n1"}


def test_a_replica_ends_with_its_node_or_as_its_node_says() -> None:
    assigned = {name: Assignment("a", node, 1) for name, node in (("a1", "n1"), ("a2", "n1"), ("a3", "n2"))}
    seen = beats(
        NodeBeat(id="n1", at=NOW_MS, ended={"a2": "killed by SIGKILL"}),
        NodeBeat(id="n2", at=SILENT_MS),
    )
    assert ended_replicas(assigned, seen, NOW_MS) == {"a2": "killed by SIGKILL", "a3": "its node n2 is gone"}


def test_a_replica_whose_node_drains_or_has_left_ended_well_and_that_node_takes_nothing_more() -> None:
    assigned = {"a1": Assignment("a", "drains", 1), "a2": Assignment("a", "left", 1), "a3": Assignment("a", "stays", 1)}
    seen = beats(NodeBeat("drains", NOW_MS, state=MemberState.DRAINING), NodeBeat("stays", NOW_MS))
    assert ended_replicas(assigned, seen, NOW_MS) == {"a1": ENDED_WELL, "a2": ENDED_WELL}
    assert set(takers(seen, NOW_MS)) == {"stays"}


@pytest.mark.parametrize(
    ("location", "nodes"),
    [("EveryNode", ("head", "other")), ("HeadOnly", ("head",)), ("NoServer", ())],
)
def test_the_location_says_which_nodes_run_a_proxy(location: str, nodes: tuple[str, ...]) -> None:
    desired = Desired(head_node="head", http=HttpOptions(location=location))
    seen = {name: NodeBeat(id=name, at=NOW_MS, takes_proxy=takes) for name, takes in (("other", True), ("head", True), ("mute", False))}
    assert place_proxies(desired, seen) == nodes


@pytest.mark.parametrize(("value", "backend"), [(0.0, "a"), (0.29, "a"), (0.3, "b"), (0.999, "b")])
def test_a_backend_is_chosen_by_its_weight(value: float, backend: str) -> None:
    assert choose_backend({"b": 0.7, "a": 0.3, "off": 0.0}, value) == backend


def with_demand(desired: Desired, name: str, **demand: float) -> Desired:
    options = parse_actor_options(demand)
    return msgspec.structs.replace(
        desired, backends={**desired.backends, name: msgspec.structs.replace(desired.backends[name], options=options)}
    )


def put(
    desired: Desired, nodes: dict[str, Capacity], assigned: dict[str, Assignment] | None = None, ready: set[str] | None = None
) -> Placement:
    numbers = count(1)
    beats = {node: NodeBeat(node, NOW_MS, capacity=capacity) for node, capacity in nodes.items()}
    return place_replicas(desired, assigned or {}, {}, ready or set(), beats, lambda _: True, lambda name: f"{name}-new{next(numbers)}")


def test_a_replica_goes_where_it_fits_and_is_never_split() -> None:
    desired = with_demand(wanting(a=2), "a", num_cpus=3)
    placement = put(desired, {"small": Capacity(num_cpus=2), "large": Capacity(num_cpus=4)})
    assert [assignment.node for assignment in placement.replicas.values()] == ["large"]
    assert placement.unplaced["a"].startswith("Cannot scale backend 'a'") and "num_cpus 3" in placement.unplaced["a"]


def test_halves_of_a_gpu_share_a_device_and_whole_ones_stay_whole() -> None:
    desired = with_demand(with_demand(wanting(half=2, whole=1), "half", num_gpus=0.5), "whole", num_gpus=1)
    placement = put(desired, {"n": Capacity(num_cpus=1, gpus=("0", "1"))})
    gpus = sorted((assignment.backend, assignment.gpus) for assignment in placement.replicas.values())
    assert gpus == [("half", (0,)), ("half", (0,)), ("whole", (1,))]


def test_without_room_for_a_surge_one_old_replica_drains_first_if_two_serve() -> None:
    desired = updated(with_demand(wanting(a=2), "a", num_cpus=1), "a")
    full = {"n": Capacity(num_cpus=2)}
    demand = desired.backends["a"].options.demand
    assigned = {name: Assignment("a", "n", 1, demand) for name in ("a1", "a2")}
    placement = put(desired, full, assigned, ready={"a1", "a2"})
    assert (len(placement.replicas), placement.unplaced) == (1, {})


def test_without_room_for_a_surge_a_single_old_replica_serves_on() -> None:
    desired = updated(with_demand(wanting(a=1), "a", num_cpus=1), "a")
    assigned = {"a1": Assignment("a", "n", 1, desired.backends["a"].options.demand)}
    placement = put(desired, {"n": Capacity(num_cpus=1)}, assigned, ready={"a1"})
    assert set(placement.replicas) == {"a1"} and "Cannot scale backend 'a'" in placement.unplaced["a"]


OBSERVED = Observed(replicas={"a1": Assignment("a", "n1", 1)}, draining={"a0": Assignment("a", "n1", 1)}, proxies=("n1",))
ALL = (NodeBeat("n1", NOW_MS), ReplicaBeat("a0", NOW_MS), ReplicaBeat("a1", NOW_MS), ProxyBeat("p", NOW_MS))


def by_field(*beats: Beat) -> dict[str, Beat]:
    return {beat.field: beat for beat in beats}


def test_nobody_is_missed_while_all_that_are_known_beat() -> None:
    gone: list[Beat] = [ReplicaBeat("a9", SILENT_MS, state=MemberState.FAILED), SupervisorBeat("s", SILENT_MS)]
    assert not somebody_is_missed(OBSERVED, by_field(*ALL, *gone), NOW_MS)


@pytest.mark.parametrize("missing", ALL, ids=lambda beat: beat.field)
def test_one_that_was_there_and_is_silent_is_missed(missing: Beat) -> None:
    silent = msgspec.structs.replace(missing, at=SILENT_MS)
    assert somebody_is_missed(OBSERVED, by_field(*ALL) | by_field(silent), NOW_MS)


@pytest.mark.parametrize("missing", ALL[:3], ids=lambda beat: beat.field)
def test_one_that_ought_to_be_there_is_missed_without_any_beat(missing: Beat) -> None:
    assert somebody_is_missed(OBSERVED, by_field(*(beat for beat in ALL if beat is not missing)), NOW_MS)
