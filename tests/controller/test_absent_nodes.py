"""A node whose beat is gone has left, or the beats were lost: a controller waits for a moment before it believes the former."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.absent_nodes import ABSENT_FOR_S
from mqserve.controller.changes import commit, create_backend
from mqserve.controller.lease import claim_instance
from mqserve.controller.state.beats import MemberState, NodeBeat
from mqserve.controller.state.documents import Assignment, Backend, HttpOptions
from mqserve.controller.state.reading import read_observed
from tests.controller.test_leading import controllers, until

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")


async def beat(store: EmbeddedStore, state: str = "ready") -> None:
    now = store.now_ms()
    await store.put_field(KEYS.beats, "node:n", NodeBeat("n", now, state=MemberState(state), takes_proxy=True).to_bytes())
    await store.announce()


async def placed(store: EmbeddedStore) -> dict[str, Assignment]:
    return read_observed(await store.get(KEYS.observed)).replicas


@asynccontextmanager
async def one_replica() -> AsyncIterator[EmbeddedStore]:
    """The store of an instance with one node, on which one replica is placed."""
    store = EmbeddedStore()
    held = await claim_instance(store, KEYS, "n", HttpOptions(), detached=True)
    await beat(store)
    async with controllers(store, KEYS) as running:
        running.start("first")
        await commit(store, KEYS, held.id, create_backend(Backend("b", "sha", "b")))
        await until(lambda: has_one(store))
        yield store


async def test_beats_that_are_lost_and_come_again_cost_no_replica() -> None:
    async with one_replica() as store:
        before = await placed(store)
        await store.delete(KEYS.beats)
        for _ in range(int(ABSENT_FOR_S / 0.1 / 2)):  # a member beats again within a second
            await store.announce()
            await asyncio.sleep(0.1)
            assert await placed(store) == before
        await beat(store)
        await asyncio.sleep(0.5)
        assert await placed(store) == before


@pytest.mark.parametrize("last_words", ["ready", "draining"])
async def test_a_node_that_left_is_missed_after_a_moment_and_one_that_said_so_at_once(last_words: str) -> None:
    async with one_replica() as store:
        if last_words == "draining":
            await beat(store, "draining")
        else:
            await store.drop_fields(KEYS.beats, "node:n")
        await until(lambda: has_none(store), ABSENT_FOR_S / 2 if last_words == "draining" else 20)
        assert not read_observed(await store.get(KEYS.observed)).problems, "it is no failure of the replica's code"


async def has_one(store: EmbeddedStore) -> bool:
    return len(await placed(store)) == 1


async def has_none(store: EmbeddedStore) -> bool:
    return not await placed(store)
