"""What a client notices by itself."""

import asyncio

import pytest

from mqserve.broker.embedded_queue import EmbeddedQueue
from mqserve.broker.embedded_store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.client import Client
from mqserve.controller.state import Desired
from mqserve.links import Links
from mqserve.runtime import Runtime

KEYS = StoreKeys("tests")


def open_no_other() -> Client:
    raise AssertionError("no process is forked here")


@pytest.mark.anyio
async def test_a_client_that_slept_until_another_instance_was_there_knows_that_its_own_has_ended() -> None:
    store = EmbeddedStore()
    await store.set(KEYS.desired, Desired(instance="another").to_bytes())
    client = Client(Runtime(), Links(Settings.read(), EmbeddedQueue(), store, KEYS, "test"), "mine", lambda: None, open_no_other)
    running = asyncio.create_task(client.run())
    async with asyncio.timeout(10):
        while not client.has_ended:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
