"""The documents in the store: whatever stands there is read, left out, or refused with a sentence; and no pickle is opened."""

import asyncio
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.errors import BadEnvelope, InstanceError, MQServeError
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller import lease
from mqserve.controller.plan import place_proxies, place_replicas
from mqserve.controller.state.beats import NodeBeat, read_beats
from mqserve.controller.state.documents import Assignment, Backend, Desired, Endpoint, Observed
from mqserve.controller.state.following import follow_state
from mqserve.controller.state.reading import read_desired, read_observed
from mqserve.controller.state.resources import Capacity, Demand
from mqserve.controller.state.traffic import choose
from mqserve.proxy.routes import RouteTable
from tests.fuzz.material import bomb, bytes_like, cases, json_values, mutated

KEYS = StoreKeys("ns")
BACKENDS = {name: Backend(name, "c0de", "f", {"num_replicas": 2}) for name in ("a", "b")}
DESIRED = Desired(backends=BACKENDS, endpoints={"e": Endpoint("e", "/e", ("GET",), {"a": 0.5, "b": 0.5}, {"b": 0.1})})
OBSERVED = Observed(
    1, 2, (1, 3), {"a": (1,)}, replicas={"a#1": Assignment("a", "n", 1, Demand(num_gpus=1), (0,))}, problems={"a": "no room"}
)
BEAT = NodeBeat("n", 1000, 7, capacity=Capacity(2, ("0",)), ended={"a#0": "killed"})
LEASE = lease.InstanceLease("i", "me", False, 1)
DOCUMENTS = [DESIRED.to_bytes(), OBSERVED.to_bytes(), BEAT.to_bytes(), msgspec.json.encode(LEASE)]

any_json = json_values.map(msgspec.json.encode)


def any_document(valid: msgspec.Struct) -> st.SearchStrategy[bytes]:
    """Random bytes, any JSON, the valid one after accidents, and the valid one with any JSON somewhere inside."""
    raw = msgspec.json.encode(valid)
    places = sorted(_places(msgspec.json.decode(raw)), key=repr)
    replaced = st.tuples(st.sampled_from(places), json_values).map(lambda drawn: _replaced(msgspec.json.decode(raw), *drawn))
    return bytes_like(*DOCUMENTS) | any_json | mutated(raw) | replaced.map(msgspec.json.encode)


def _places(value: Any, here: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {here}.union(*(_places(item, (*here, key)) for key, item in inside))


def _replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    value[place[0]] = _replaced(value[place[0]], place[1:], by)
    return value


def new_id() -> Callable[[str], str]:
    numbers = count()
    return lambda name: f"{name}#{next(numbers)}"


def live_with_desired(raw: bytes) -> Desired | None:
    """If it is read, then everybody can live with it."""
    try:
        desired = read_desired(raw)
    except BadEnvelope as refused:
        assert "the desired state in the store" in str(refused)
        return None
    for endpoint in desired.endpoints.values():
        choice = choose(endpoint, "")
        assert {choice.backend, *choice.shadows} <= set(desired.backends)
    assert desired.to_bytes()
    beats = {"n": NodeBeat("n", 1000, capacity=Capacity(num_cpus=1))}
    few = all(backend.config.num_replicas < 100 for backend in desired.backends.values())
    if few:
        place_replicas(desired, {}, {}, [], beats, lambda _: True, new_id())
    place_proxies(desired, beats)
    return desired


def live_with_observed(raw: bytes) -> Observed | None:
    try:
        observed = read_observed(raw)
    except BadEnvelope as refused:
        assert "the observed state in the store" in str(refused)
        return None
    beats = {"n": NodeBeat("n", 1000, capacity=Capacity(1, ("0",)))}
    place_replicas(DESIRED, observed.replicas, observed.draining, [], beats, lambda _: True, new_id())
    RouteTable(DESIRED, observed)
    assert observed.to_bytes()
    return observed


@pytest.mark.parametrize("raw", cases("desired"))
def test_desired_states_that_did_harm_are_refused(raw: bytes) -> None:
    assert live_with_desired(raw) is None


@pytest.mark.parametrize("raw", cases("observed"))
def test_observed_states_that_did_harm_are_refused(raw: bytes) -> None:
    assert live_with_observed(raw) is None


@pytest.mark.parametrize("raw", cases("beats"))
def test_beats_that_did_harm_are_left_out(raw: bytes) -> None:
    assert read_beats({"node:n": raw, "node:m": BEAT.to_bytes()}) == {"node:m": BEAT}


@given(any_document(DESIRED))
def test_any_desired_state_is_one_to_live_with_or_refused(raw: bytes) -> None:
    live_with_desired(raw)


@given(any_document(OBSERVED))
def test_any_observed_state_is_one_to_live_with_or_refused(raw: bytes) -> None:
    live_with_observed(raw)


@given(any_document(BEAT))
def test_any_beat_is_read_or_left_out(raw: bytes) -> None:
    for beat in read_beats({"node:n": raw}).values():
        assert 0 <= beat.at <= 2**53 and beat.to_bytes()


def check_leases(run: Callable[[Any], Any], raw: bytes) -> None:
    """Each party that reads a lease, on a store where `raw` stands in its place."""

    async def check() -> None:
        store = EmbeddedStore()
        await store.set(KEYS.desired, DESIRED.to_bytes())
        await store.set(KEYS.instance, raw)
        try:
            assert await lease.read_instance(store, KEYS)
        except MQServeError as refused:
            assert "the instance's lease in the store does not parse" in str(refused)
            await lease.renew_instance(store, KEYS, "i", "a", (KEYS.leader, None))
            assert (await lease.read_instance(store, KEYS)).id == "i"  # its controller writes it anew
        await store.set(KEYS.leader, raw)
        leader = lease.Leader(store, KEYS, "c")
        await leader.lead()
        try:
            await lease.forget(store, KEYS, "i")
        except MQServeError as refused:
            assert str(refused)

    run(check())


@pytest.mark.parametrize("raw", [*cases("leases"), *cases("beats"), *cases("desired")])
def test_leases_that_did_harm_are_refused_or_written_anew(raw: bytes) -> None:
    check_leases(asyncio.run, raw)


def test_any_lease_is_one_or_refused() -> None:
    with asyncio.Runner() as runner:

        @given(any_document(LEASE))
        def check(raw: bytes) -> None:
            check_leases(runner.run, raw)

        check()


@pytest.mark.anyio
async def test_a_lapsed_instance_whose_desired_state_is_broken_can_be_replaced() -> None:
    store = EmbeddedStore()
    await store.set(KEYS.instance, msgspec.json.encode(LEASE))
    await store.set(KEYS.desired, b"{")
    assert (await lease.claim_instance(store, KEYS, "n", DESIRED.http, detached=False)).id != "i"
    assert read_desired(await store.get(KEYS.desired)).version == 0


@pytest.mark.anyio
async def test_a_start_beside_a_lease_that_does_not_parse_is_refused_with_a_sentence() -> None:
    store = EmbeddedStore()
    await store.set(KEYS.instance, b"{")
    with pytest.raises((BadEnvelope, InstanceError), match="does not parse"):
        await lease.claim_instance(store, KEYS, "n", DESIRED.http, detached=False)


@pytest.mark.anyio
async def test_whoever_follows_the_documents_keeps_the_last_good_ones(caplog: pytest.LogCaptureFixture) -> None:
    store = EmbeddedStore()
    await store.set(KEYS.desired, DESIRED.to_bytes())
    await store.set(KEYS.observed, OBSERVED.to_bytes())
    following = follow_state(store, KEYS)
    assert await anext(following) == (DESIRED, OBSERVED)
    for broken in (b"", b"{", b"\xff", b"[" * 5000):
        raw = await store.get(KEYS.desired)
        assert await store.replace(KEYS.desired, raw, broken)
        assert await anext(following) == (DESIRED, OBSERVED)
        assert "the desired state in the store does not parse" in caplog.text and "last good one" in caplog.text
        caplog.clear()
    assert await store.replace(KEYS.observed, OBSERVED.to_bytes(), b"null")
    assert await anext(following) == (DESIRED, OBSERVED)
    newer = msgspec.structs.replace(DESIRED, version=7)
    assert await store.replace(KEYS.desired, broken, newer.to_bytes())
    assert await anext(following) == (newer, OBSERVED)
    await following.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("read", [live_with_desired, live_with_observed])
def test_no_document_is_a_pickle_to_be_opened(read: Callable[[bytes], Any], tmp_path: Path) -> None:
    pickled = bomb(tmp_path / "opened")
    assert read(pickled) is None and read_beats({"node:n": pickled}) == {}
    check_leases(asyncio.run, pickled)
    assert not (tmp_path / "opened").exists()
