"""What a deploy undoes that did not get ready. The controller is a document of the test's."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mqserve.broker.errors import BackendFailed
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.backend_code import Packed
from mqserve.broker.values.code import Code
from mqserve.broker.values.signing import Signer
from mqserve.client.deployments import Deployments
from mqserve.client.membership import Membership
from mqserve.connections import Connections
from mqserve.controller.changes import commit, update_backend
from mqserve.controller.environments import check_environment, seal_environment
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.documents import Backend, CodeKind, Desired, Observed
from mqserve.controller.state.reading import read_desired
from mqserve.controller.state.resources import ActorOptions

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
FAILING = Observed(epoch=1, seen=(9, 9), queues={"b": (1,)}, problems={"b": "no model"})


class Meanwhile(EmbeddedStore):
    """While one client saves its code, another deploys good code."""

    async def put_if_absent(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        await commit(self, KEYS, "i", update_backend("b", "good", "good", CodeKind.HANDLER, None))
        await super().put_if_absent(key, value, ttl_ms=ttl_ms)


def deployments(store: EmbeddedStore) -> Deployments:
    return deployments_by(Settings.read(), store, lambda desired: None)


def deployments_by(settings: Settings, store: EmbeddedStore, on_commit: Callable[[Desired], None]) -> Deployments:
    connections = Connections(settings, EmbeddedQueue(), store, KEYS, "test")
    return Deployments(connections, Membership(connections, "i", owns=True), on_commit)


async def test_an_update_that_fails_is_rolled_back_to_what_it_replaced_and_not_past_that() -> None:
    store = Meanwhile()
    await store.set(KEYS.desired, Desired(instance="i", version=1, backends={"b": Backend("b", "first", "first")}).to_bytes())
    await store.set(KEYS.observed, FAILING.to_bytes())
    with pytest.raises(BackendFailed, match="no model"):
        await deployments(store).update_backend("b", Packed(Code("bad", target="m:bad")), CodeKind.NAMED, None)
    assert read_desired(await store.get(KEYS.desired)).backends["b"].code == "good"


async def test_a_backend_that_fails_says_why_although_it_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.client.deployments.DELETE_BUDGET_S", 0.1)
    store = EmbeddedStore()
    await store.set(KEYS.desired, Desired(instance="i").to_bytes())
    await store.set(KEYS.observed, FAILING.to_bytes())
    with pytest.raises(BackendFailed, match="does not get ready: no model"):
        await deployments(store).create_backend("b", Packed(Code("bad", target="m:bad")), CodeKind.NAMED, BackendConfig(), ActorOptions())
    assert read_desired(await store.get(KEYS.desired)).backends == {}


OLD_KEY, NEW_KEY = b"o" * 32, b"n" * 32
OLD, NEW = Signer([OLD_KEY], "mqserve"), Signer([NEW_KEY], "mqserve")


async def updated(before: ActorOptions, given: ActorOptions | None, *keys: bytes) -> ActorOptions:
    """The options of a backend in the document that an update of its code commits, by a client with these keys."""
    store, committed = EmbeddedStore(), list[Desired]()
    backends = {"b": Backend("b", "first", "first", options=before)}
    await store.set(KEYS.desired, Desired(instance="i", version=1, backends=backends).to_bytes())
    await store.set(KEYS.observed, FAILING.to_bytes())
    settings = replace(Settings.read(), secret_keys=keys)
    with pytest.raises(BackendFailed):
        await deployments_by(settings, store, committed.append).update_backend(
            "b", Packed(Code("new", target="m:new")), CodeKind.NAMED, given
        )
    return committed[0].backends["b"].options


async def test_a_python_that_is_given_is_sealed_and_one_that_stays_is_sealed_anew() -> None:
    """So that once all code was deployed again, the key before is not needed any more."""
    chosen = ActorOptions(python="/usr/bin/python3")
    check_environment(await updated(ActorOptions(), chosen, NEW_KEY, OLD_KEY), "b", NEW)
    check_environment(await updated(seal_environment(chosen, "b", OLD), None, NEW_KEY, OLD_KEY), "b", NEW)


async def test_a_python_that_nobody_sealed_gets_no_seal_from_who_deploys_beside_it() -> None:
    theirs = ActorOptions(python="/tmp/theirs")
    for before in (theirs, seal_environment(theirs, "other", NEW), seal_environment(theirs, "b", OLD)):
        assert await updated(before, None, NEW_KEY) == before
