"""What the leader does to the queues of backends that come, go, and come again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mqserve.broker.embedded_queue import EmbeddedQueue
from mqserve.broker.embedded_store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.desired import Change, commit, create_backend, delete_backend
from mqserve.controller.lease import claim_instance
from mqserve.controller.state import Backend, Beat, Desired, Observed
from tests.broker.traffic import publish, text
from tests.controller.test_leading import HTTP, controllers, until

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
B = Backend("b", "sha", "b")


class Recording(EmbeddedQueue):
    """Tells what it was asked to delete."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: list[tuple[str, int]] = []

    async def delete(self, backend: str, generation: int, *, only_if_empty: bool) -> bool:
        self.deleted.append((backend, generation))
        return await super().delete(backend, generation, only_if_empty=only_if_empty)


class Led:
    """An instance with a controller, in memory."""

    def __init__(self, store: EmbeddedStore, instance: str) -> None:
        self.store = store
        self._instance = instance

    async def change(self, change: Change) -> Desired:
        """Once the controller has followed it."""
        committed = await commit(self.store, KEYS, self._instance, change)

        async def is_followed() -> bool:
            return (await self.observed()).seen >= (committed.epoch, committed.version)

        await until(is_followed)
        return committed

    async def observed(self) -> Observed:
        return Observed.from_bytes(await self.store.get(KEYS.observed))

    async def desired(self) -> Desired:
        return Desired.from_bytes(await self.store.get(KEYS.desired))

    async def says(self, replica: Beat) -> None:
        await self.store.put_field(KEYS.beats, replica.field, replica.to_bytes())


@asynccontextmanager
async def led(queue: EmbeddedQueue) -> AsyncIterator[Led]:
    store = EmbeddedStore()
    held = await claim_instance(store, KEYS, "", HTTP, detached=True)
    async with controllers(store, KEYS) as running:
        running.start("first", queue)
        yield Led(store, held.id)


async def ticks(led: Led, count: int) -> None:
    """So many comparisons later."""
    for _ in range(count):
        await led.change(lambda desired: desired)


async def test_the_queue_of_a_backend_that_was_deleted_and_is_there_again_is_its_queue() -> None:
    """An old replica still holds it, so that it was unbound and not deleted yet."""
    queue = Recording()
    async with led(queue) as instance:
        await instance.change(create_backend(B))
        replica = Beat("replica", "b#old", instance.store.now_ms() + 600_000, state="draining", backend="b", generations=(1,))
        await instance.says(replica)
        await instance.change(delete_backend("b"))
        assert (await instance.observed()).retiring == {"b": (1,)}
        await instance.change(create_backend(B))
        assert await publish(queue, text("hello")) is None, "nothing is bound to it"
        await instance.store.drop_fields(KEYS.beats, replica.field)
        await ticks(instance, 3)
        observed = await instance.observed()
        assert (observed.queues, observed.retiring, queue.deleted) == ({"b": (1,)}, {}, [])
