"""What a bare controller does that finds no instance: it waits for the one that is about to be there, and joins it."""

import asyncio

import pytest

from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.connections import Connections
from mqserve.controller.lease import claim_instance, read_instance
from mqserve.controller.state.documents import HttpOptions
from mqserve.controller.state.reading import read_desired
from mqserve.instance.roles import join_or_start
from tests.controller.test_leading import controllers

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")


class Slow(EmbeddedStore):
    """Between its reads and their writes others have a turn, as on a real one."""

    async def get(self, key: str) -> bytes | None:
        found = await super().get(key)
        await asyncio.sleep(0.01)
        return found


def links_to(store: EmbeddedStore) -> Connections:
    return Connections(Settings.read(), EmbeddedQueue(), store, KEYS, "test")


async def test_a_controller_that_starts_while_the_configuration_is_lost_waits_until_it_is_written_back() -> None:
    store = EmbeddedStore()
    old = await claim_instance(store, KEYS, "n1", HttpOptions(), detached=True)
    async with controllers(store, KEYS) as running:
        running.start("first")
        await running.leads("first")
        await store.close()  # which forgets everything
        joined = await join_or_start(links_to(store))
    assert joined == old.id
    assert read_desired(await store.get(KEYS.desired)).head_node == "n1"


async def test_of_two_controllers_that_start_at_once_one_joins_the_other() -> None:
    store = Slow()
    one, other = await asyncio.gather(join_or_start(links_to(store)), join_or_start(links_to(store)))
    assert one == other == (await read_instance(store, KEYS)).id
