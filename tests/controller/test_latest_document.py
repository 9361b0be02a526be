"""The desired document as the leader follows it, and as it stands in the store."""

import pytest
from msgspec.structs import replace

from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.latest_document import LatestDocument
from mqserve.controller.state.documents import Backend, Desired, Endpoint

pytestmark = pytest.mark.anyio

FOLLOWED = Desired(backends={"b": Backend("b", "sha", "b")}, endpoints={"old": Endpoint("old", None, (), {"b": 1.0})})
LATER = replace(FOLLOWED, version=2, endpoints={**FOLLOWED.endpoints, "new": Endpoint("new", None, (), {"b": 1.0})})


async def test_an_endpoint_that_the_leader_has_not_heard_of_is_found_in_the_store() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await store.set(keys.desired, LATER.to_bytes())
    document = LatestDocument(store, keys)
    document.follow(FOLLOWED)
    assert await document.with_endpoint("old") is FOLLOWED
    assert await document.with_endpoint("new") == LATER


@pytest.mark.parametrize("kept", [None, b"{"])
async def test_what_the_leader_follows_counts_where_the_store_has_lost_the_document(kept: bytes | None) -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    document = LatestDocument(store, keys)
    document.follow(FOLLOWED)
    await store.set(keys.desired, LATER.to_bytes())
    assert await document.with_endpoint("new") == LATER
    if kept is None:
        await store.delete(keys.desired)
    else:
        await store.set(keys.desired, kept)
    assert await document.with_endpoint("gone") is FOLLOWED
    await store.set(keys.desired, LATER.to_bytes())
    assert await document.with_endpoint("new") == LATER
