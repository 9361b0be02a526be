"""What a deploy undoes that did not get ready. The controller is a document of the test's."""

import pytest

from mqserve.broker.code import Code
from mqserve.broker.embedded_queue import EmbeddedQueue
from mqserve.broker.embedded_store import EmbeddedStore
from mqserve.broker.errors import BackendFailed
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.desired import commit, update_backend
from mqserve.controller.resources import ActorOptions
from mqserve.controller.state import Backend, BackendConfig, Desired, Observed
from mqserve.deployments import Deployments
from mqserve.links import Links
from mqserve.membership import Membership

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
FAILING = Observed(epoch=1, seen=(9, 9), queues={"b": (1,)}, problems={"b": "no model"})


class Meanwhile(EmbeddedStore):
    """While one client saves its code, another deploys good code."""

    async def set_default(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        await commit(self, KEYS, "i", update_backend("b", "good", "good", None))
        await super().set_default(key, value, ttl_ms=ttl_ms)


def deployments(store: EmbeddedStore) -> Deployments:
    links = Links(Settings.read(), EmbeddedQueue(), store, KEYS, "test")
    return Deployments(links, Membership(links, "i", owns=True), lambda desired: None)


async def test_an_update_that_fails_is_rolled_back_to_what_it_replaced_and_not_past_that() -> None:
    store = Meanwhile()
    await store.set(KEYS.desired, Desired(instance="i", version=1, backends={"b": Backend("b", "first", "first")}).to_bytes())
    await store.set(KEYS.observed, FAILING.to_bytes())
    with pytest.raises(BackendFailed, match="no model"):
        await deployments(store).update_backend("b", Code("bad", target="m:bad"), None)
    assert Desired.from_bytes(await store.get(KEYS.desired)).backends["b"].code == "good"


async def test_a_backend_that_fails_says_why_although_it_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.deployments.DELETE_BUDGET_S", 0.1)
    store = EmbeddedStore()
    await store.set(KEYS.desired, Desired(instance="i").to_bytes())
    await store.set(KEYS.observed, FAILING.to_bytes())
    with pytest.raises(BackendFailed, match="does not get ready: no model"):
        await deployments(store).create_backend("b", Code("bad", target="m:bad"), BackendConfig(), ActorOptions())
    assert Desired.from_bytes(await store.get(KEYS.desired)).backends == {}
