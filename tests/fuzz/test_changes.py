"""Changes of the desired document, and what the controller makes of it: bad arguments are refused, and what is accepted stays valid."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mqserve.broker.errors import BadType, BadValue
from mqserve.controller import changes
from mqserve.controller.desired_writes import encode
from mqserve.controller.endpoint_parsing import parse_endpoint
from mqserve.controller.plan import place_replicas
from mqserve.controller.state.beats import NodeBeat
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.documents import Assignment, Backend, CodeKind, Desired, Endpoint, Observed
from mqserve.controller.state.reading import read_desired
from mqserve.controller.state.resources import Capacity, Demand, parse_actor_options
from mqserve.controller.state.traffic import choose
from mqserve.proxy.routes import RouteTable
from tests.fuzz.material import any_text, anything, cases

names = st.sampled_from(["a", "b", "c"])
any_name = names | any_text | anything
weights = st.sampled_from([0, 0.5, 1, 0.25, 0.75, -1, float("nan"), float("inf"), 10**400, True, "1"])
any_traffic = st.dictionaries(
    names | anything.filter(lambda key: key.__hash__ is not None and _hashes(key)), weights | anything, max_size=3
)
any_config = st.dictionaries(st.sampled_from([*BackendConfig.model_fields, "unknown"]), anything | st.integers(-1, 4), max_size=3)
any_options = st.dictionaries(
    st.sampled_from(["num_cpus", "num_gpus", "memory", "resources", "python", "pip", "name", "x"]), anything, max_size=3
)


def _hashes(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def attempt(make: Callable[[], changes.Change], desired: Desired) -> Desired:
    """The document after the change, or as it was where that is refused: with BadValue or BadType, and never otherwise."""
    try:
        return read_desired(encode(make()(desired)))
    except (BadValue, BadType) as refused:
        assert str(refused)
        return desired


START = Desired(
    backends={name: Backend(name, "c0de", "f") for name in ("a", "b")}, endpoints={"e": Endpoint("e", "/e", ("GET",), {"a": 1.0})}
)


@pytest.mark.parametrize("raw", cases("configs"))
def test_configs_that_did_harm_are_refused(raw: bytes) -> None:
    with pytest.raises((BadValue, BadType)):
        changes.parse_config(json.loads(raw))


@pytest.mark.parametrize(
    "traffic",
    [{"a": 0.5, 1: 0.5}, {"a": 10**400}, {"a": float("nan")}, {"a": float("inf")}, {}, {("a",): 1}, {None: 1.0}, {"a": True}],
    ids=repr,
)
def test_traffic_that_did_harm_is_refused(traffic: dict[Any, Any]) -> None:
    with pytest.raises((BadValue, BadType)):
        changes.set_traffic("e", traffic)(START)


@pytest.mark.parametrize("method", ["GET\r\nx-injected: 1", "", "GET POST", "\ud800", "grüße"])
def test_a_method_that_is_no_token_is_refused(method: str) -> None:
    with pytest.raises(BadValue, match="no HTTP method"):
        parse_endpoint("e", "a", "/e", ["GET", method])


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), 10**400, -1])
def test_an_amount_that_no_machine_has_is_refused(amount: float) -> None:
    for options in ({"num_cpus": amount}, {"memory": amount}, {"num_gpus": amount}, {"resources": {"tpu": amount}}):
        with pytest.raises(BadValue):
            parse_actor_options(options)


def test_a_user_config_that_json_cannot_keep_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (cycle, deep, "\ud800", float("nan"), {1: 2}, object()):
        with pytest.raises(BadValue, match="user_config"):
            changes.parse_config({"user_config": value})


@given(any_config | anything)
def test_any_config_is_parsed_and_kept_or_refused(config: Any) -> None:
    attempt(lambda: changes.update_backend_config("a", config), START)


@given(any_options | anything)
def test_any_actor_options_are_parsed_and_kept_or_refused(options: Any) -> None:
    attempt(lambda: changes.update_backend("a", "c0de", "f", CodeKind.HANDLER, parse_actor_options(options)), START)


@given(
    any_name,
    any_name,
    st.sampled_from(["/x", "/x/{n:int}", None]) | any_text.map(lambda text: f"/{text}") | anything,
    st.lists(any_text, max_size=2) | anything,
)
def test_any_endpoint_is_parsed_and_routed_or_refused(name: Any, backend: Any, route: Any, methods: Any) -> None:
    RouteTable(attempt(lambda: changes.create_endpoint(parse_endpoint(name, backend, route, methods)), START), Observed())


@given(any_name, any_traffic | anything, any_name, anything)
def test_any_traffic_is_split_or_refused(name: Any, traffic: Any, backend: Any, proportion: Any) -> None:
    after = attempt(lambda: changes.set_traffic("e", traffic), START)
    attempt(lambda: changes.set_traffic(name, traffic), after)
    after = attempt(lambda: changes.shadow_traffic("e", backend, proportion), after)
    assert choose(after.endpoints["e"], "").backend in after.backends


@given(any_name)
def test_any_name_is_known_or_refused(name: Any) -> None:
    for make in (
        lambda: changes.delete_backend(name),
        lambda: changes.delete_endpoint(name),
        lambda: changes.update_backend(name, "c0de", "f", CodeKind.HANDLER, None),
        lambda: changes.register_convertor(name, "c0de"),
        lambda: changes.create_backend(Backend(name, "c0de", "f")),
    ):
        attempt(make, START)


class DesiredMachine(RuleBasedStateMachine):
    """Any sequence of changes, most of them valid."""

    def __init__(self) -> None:
        super().__init__()
        self.desired = Desired()

    def change(self, make: Callable[[], changes.Change]) -> None:
        self.desired = attempt(make, msgspec.structs.replace(self.desired, version=self.desired.version + 1))

    @rule(name=names, replicas=st.integers(1, 3))
    def create_backend(self, name: str, replicas: int) -> None:
        self.change(lambda: changes.create_backend(Backend(name, "c0de", "f", {"num_replicas": replicas})))

    @rule(
        name=names, config=st.fixed_dictionaries({}, optional={"num_replicas": st.integers(0, 4), "max_queued_requests": st.integers(1, 3)})
    )
    def configure(self, name: str, config: dict[str, int]) -> None:
        self.change(lambda: changes.update_backend_config(name, config))

    @rule(name=names)
    def update(self, name: str) -> None:
        before = self.desired.backends.get(name)
        self.change(lambda: changes.update_backend(name, "newer", "f", CodeKind.HANDLER, None))
        assert before is None or self.desired.backends[name].version > max(before.version, self.desired.version)

    @rule(name=names)
    def roll_back(self, name: str) -> None:
        if failed := self.desired.backends.get(name):
            self.change(lambda: changes.roll_back(failed, Backend(name, "c0de", "f"), "it did not get ready"))

    @rule(name=names, force=st.booleans())
    def delete_backend(self, name: str, force: bool) -> None:
        self.change(lambda: changes.delete_backend(name, force=force))

    @rule(name=names, backend=names, route=st.sampled_from([None, "/x", "/y", "/{n:int}", "/-/x"]))
    def create_endpoint(self, name: str, backend: str, route: str | None) -> None:
        self.change(lambda: changes.create_endpoint(parse_endpoint(name, backend, route, ["GET"])))

    @rule(name=names)
    def delete_endpoint(self, name: str) -> None:
        self.change(lambda: changes.delete_endpoint(name))

    @rule(name=names, traffic=st.dictionaries(names, st.sampled_from([0, 0.5, 1]), max_size=3))
    def set_traffic(self, name: str, traffic: dict[str, float]) -> None:
        self.change(lambda: changes.set_traffic(name, traffic))

    @rule(name=names, backend=names, proportion=st.sampled_from([0, 0.5, 1, 2]))
    def shadow(self, name: str, backend: str, proportion: float) -> None:
        self.change(lambda: changes.shadow_traffic(name, backend, proportion))

    @invariant()
    def every_endpoint_sends_to_backends_there_are(self) -> None:
        for endpoint in self.desired.endpoints.values():
            assert {*endpoint.traffic, *endpoint.shadows} <= set(self.desired.backends)
            assert abs(sum(endpoint.traffic.values()) - 1) < 1e-4 and all(0 < part <= 1 for part in endpoint.shadows.values())

    @invariant()
    def no_route_is_taken_twice(self) -> None:
        routes = Counter(endpoint.route for endpoint in self.desired.endpoints.values() if endpoint.route)
        assert not routes or max(routes.values()) == 1

    @invariant()
    def it_is_read_as_it_was_written(self) -> None:
        assert read_desired(encode(self.desired)) == self.desired
        assert not {*self.desired.forced} & {*self.desired.backends}


TestAnySequenceOfChangesLeavesAValidDocument = DesiredMachine.TestCase
TestAnySequenceOfChangesLeavesAValidDocument.settings = settings(max_examples=40, stateful_step_count=25)

demands = st.builds(Demand, st.sampled_from([0, 0.5, 1, 3]), st.sampled_from([0, 0.25, 0.5, 1, 2]), st.sampled_from([0, 10, 1000]))
capacities = st.builds(
    Capacity,
    st.integers(0, 4),
    st.integers(0, 3).map(lambda gpus: tuple(map(str, range(gpus)))),
    st.sampled_from([0, 15, 100, 5000]),
)


@given(
    st.dictionaries(names, st.tuples(st.integers(1, 5), st.integers(1, 3), demands), min_size=1),
    st.dictionaries(st.sampled_from(["n1", "n2"]), capacities),
    st.data(),
)
def test_a_plan_keeps_to_the_numbers_and_to_each_nodes_room(
    wanted: dict[str, tuple[int, int, Demand]], nodes: dict[str, Capacity], data: st.DataObject
) -> None:
    """Over several comparisons, with replicas that get ready, die and drain, and new versions in between."""
    numbers = count()
    beats = {node: NodeBeat(node, 0, capacity=capacity) for node, capacity in nodes.items()}
    versions, assigned, draining, ready = dict.fromkeys(wanted, 1), dict[str, Assignment](), dict[str, Assignment](), set[str]()
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            versions[data.draw(st.sampled_from(sorted(versions)))] += 1
        backends = {
            name: Backend(
                name, "c", "f", {"num_replicas": replicas, "max_surge": surge},
                parse_actor_options({"num_cpus": demand.num_cpus, "num_gpus": demand.num_gpus, "memory": demand.memory}), versions[name],
            )
            for name, (replicas, surge, demand) in wanted.items()
        }  # fmt: skip
        placed, _ = place_replicas(
            Desired(backends=backends), assigned, draining, ready, beats, lambda _: True, lambda name: f"{name}#{next(numbers)}"
        )
        for name, (replicas, surge, _) in wanted.items():
            mine = [assignment for assignment in placed.values() if assignment.backend == name]
            assert len(mine) <= replicas + surge
            assert len([assignment for assignment in mine if assignment.version == versions[name]]) <= replicas
        draining |= {name: kept for name, kept in assigned.items() if name not in placed}
        for node, capacity in nodes.items():
            there = [assignment for assignment in [*placed.values(), *draining.values()] if assignment.node == node]
            assert sum(assignment.demand.num_cpus for assignment in there) <= capacity.num_cpus + 1e-6
            assert sum(assignment.demand.memory for assignment in there) <= capacity.memory
            for position in range(len(capacity.gpus)):
                assert sum(min(1.0, held.demand.num_gpus) for held in there if position in held.gpus) <= 1 + 1e-6
            assert all(max(assignment.gpus, default=-1) < len(capacity.gpus) for assignment in there)
        assert all(assignment.node in nodes for assignment in placed.values())
        dead = data.draw(st.sets(st.sampled_from(sorted(placed)), max_size=2)) if placed else set()
        assigned = {name: kept for name, kept in placed.items() if name not in dead}
        ready = {name for name in assigned if name in ready or data.draw(st.booleans())}
        draining = {name: kept for name, kept in draining.items() if data.draw(st.booleans())}
