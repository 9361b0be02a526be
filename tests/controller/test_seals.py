"""Who seals what: whether replicas may demand sealed requests, and whose choice of a Python a node follows."""

import asyncio
from typing import Any

import msgspec
import pytest

from mqserve.broker.errors import BadSignature
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.signing import MIN_KEY_BYTES, Signer, key_id_of
from mqserve.controller.environments import check_environment, seal_environment
from mqserve.controller.lease import claim_instance
from mqserve.controller.plan import key_problem, seal_problem, without_seals
from mqserve.controller.state.beats import Beat, MemberState, NodeBeat, ProxyBeat, ReplicaBeat, beats_of, read_beats
from mqserve.controller.state.documents import Assignment, Backend, Desired, Observed
from mqserve.controller.state.reading import read_observed
from mqserve.controller.state.resources import ActorOptions, Demand
from tests.controller.test_leading import HTTP, controllers, until
from tests.controller.test_node import KEYS, SIGNER, Launcher, replace_observed, running_node

pytestmark = pytest.mark.anyio

OWN = key_id_of(b"k" * MIN_KEY_BYTES)  # that of the controllers
OLD, NEW, KEYLESS = Signer([b"o" * 32], "tests"), SIGNER, Signer([], "tests")
CHOICES = [ActorOptions(python="/usr/bin/python3"), ActorOptions(pip=("humanize==4.*",))]


def beats(**members: Beat) -> dict[str, Beat]:
    return {beat.field: beat for beat in members.values()}


def member(kind: str, name: str, *, seals: bool = False, **fields: Any) -> Beat:
    return (
        (ProxyBeat if kind == "proxy" else ReplicaBeat)(name, at=0, seal_key=OWN if seals else "", **fields)
        if kind != "node"
        else NodeBeat(name, at=0, **fields)
    )


# Requests.


def test_proxies_and_replicas_that_do_not_seal_are_named_and_nobody_else() -> None:
    sealing = {"p": member("proxy", "p", seals=True), "r": member("replica", "r", seals=True), "n": member("node", "n")}
    assert without_seals(beats(**sealing)) == []
    starting, failed = member("replica", "s", state=MemberState.STARTING), member("proxy", "f", state=MemberState.FAILED)
    old = {"q": member("proxy", "q"), "s": starting, "f": failed}
    assert without_seals(beats(**sealing, **old)) == ["q", "s"]
    assert without_seals({}) == []


async def test_the_leader_tells_replicas_to_demand_seals_while_everybody_seals() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await claim_instance(store, keys, "", HTTP, detached=True)

    async def observed() -> Observed:
        return read_observed(await store.get(keys.observed))

    async def demands(sealed: bool) -> bool:
        found = await observed()
        return found.epoch > 0 and found.sealed is sealed

    async def beat(name: str, *, seals: bool) -> None:
        beat = ProxyBeat(name, store.now_ms(), seal_key=OWN if seals else "", external=True)
        await store.put_field(keys.beats, beat.field, beat.to_bytes())
        await store.announce()

    async with controllers(store, keys) as running:
        running.start("first")
        await until(lambda: demands(True))
        await beat("new", seals=True)
        await beat("old", seals=False)
        await until(lambda: demands(False))
        assert (await observed()).problems["requests without a seal"].endswith("have MQSERVE_SECRET_KEY: old")
        await store.drop_fields(keys.beats, "proxy:old")
        await store.announce()
        await until(lambda: demands(True))
        assert not (await observed()).problems


async def test_nothing_is_demanded_where_the_controller_has_no_key_even_before_anybody_is_there() -> None:
    """A client without a key takes what the document says for the instance's word."""
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first", has_key=False)
        await running.leads("first")
        found = read_observed(await store.get(keys.observed))
        assert not found.sealed and not found.problems


def test_where_nobody_has_a_key_there_is_no_problem_and_where_some_have_there_is() -> None:
    keyless, sealing = beats(p=member("proxy", "p"), r=member("replica", "r")), beats(q=member("proxy", "q", seals=True))
    assert not seal_problem(keyless, has_key=False) and not seal_problem(sealing, has_key=True)
    assert seal_problem(keyless, has_key=True).endswith(": p, r")
    assert seal_problem({**keyless, **sealing}, has_key=False).endswith(": the controller, p, r")


def test_members_that_seal_with_a_key_that_the_controller_does_not_hold_are_named() -> None:
    found = beats(p=member("proxy", "p", seals=True), q=ProxyBeat("q", at=0, seal_key="other"), r=member("replica", "r"))
    assert key_problem(found, [OWN]).endswith("of the controller: q")
    assert not key_problem(found, [OWN, "other"])  # while keys are swapped
    assert not key_problem(found, [])  # whoever has a key is named for that


def test_a_document_of_an_earlier_version_demands_nothing() -> None:
    assert not read_observed(b'{"epoch": 3}').sealed
    (beat,) = beats_of(read_beats({"proxy:p": b'{"kind": "proxy", "id": "p", "at": 1}'}), ProxyBeat)
    assert not beat.seal_key


# The backend's own Python.


@pytest.mark.parametrize("options", CHOICES)
def test_a_python_is_sealed_for_its_backend(options: ActorOptions) -> None:
    sealed = seal_environment(options, "b", NEW)
    check_environment(sealed, "b", NEW)
    assert msgspec.json.decode(msgspec.json.encode(sealed), type=ActorOptions) == sealed
    for forged, backend in [
        (sealed, "other"),
        (msgspec.structs.replace(sealed, python="/tmp/mine"), "b"),
        (msgspec.structs.replace(sealed, pip=("mine",)), "b"),
        (options, "b"),
        (seal_environment(options, "b", OLD), "b"),
        (seal_environment(options, "b", Signer([b"k" * 32], "other")), "b"),
    ]:
        with pytest.raises(BadSignature, match=f"backend {backend!r}.*deploy it again"):
            check_environment(forged, backend, NEW)


@pytest.mark.parametrize("options", CHOICES)
def test_its_seal_outlives_a_rotation_of_the_key_and_a_change_of_the_share(options: ActorOptions) -> None:
    sealed = seal_environment(options, "b", OLD)
    both = Signer([b"k" * 32, b"o" * 32], "tests")
    check_environment(msgspec.structs.replace(sealed, demand=Demand(num_cpus=2)), "b", both)


def test_where_nothing_is_chosen_or_there_is_no_key_nothing_is_sealed_or_checked() -> None:
    plain = ActorOptions(Demand(num_cpus=1))
    assert seal_environment(plain, "b", NEW) == plain
    check_environment(plain, "b", NEW)
    for options in CHOICES:
        assert seal_environment(options, "b", KEYLESS) == options
        check_environment(options, "b", KEYLESS)


async def test_a_node_starts_nothing_in_a_python_that_nobody_sealed() -> None:
    """Nor does it look whether there is one: that would run it."""
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        backends = {
            name: Backend(name, "sha", name, options=options)
            for name, options in (("python", CHOICES[0]), ("pip", CHOICES[1]), ("plain", ActorOptions()))
        }
        assert await store.replace(KEYS.desired, await store.get(KEYS.desired), Desired(version=1, backends=backends).to_bytes())
        await replace_observed(
            store, Observed(epoch=1, version=1, proxies=("n",), replicas={f"{name}#1": Assignment(name, "n", 1) for name in backends})
        )
        await until(lambda: _done(bool(launcher.replicas)))

        async def both_refused() -> bool:
            ended = beats_of(read_beats(await store.fields(KEYS.beats)), NodeBeat)[0].ended
            return set(ended) == {"python#1", "pip#1"} and all("deploy it again" in words for words in ended.values())

        await until(both_refused)
        assert [replica.name for replica in launcher.replicas] == ["plain#1"]


async def _done(value: bool) -> bool:
    await asyncio.sleep(0)
    return value
