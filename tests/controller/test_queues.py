"""What the leader does to the queues of backends that come, go, and come again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from mqserve.broker.errors import BrokerUnavailable, MQServeError, QueueMismatch
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.changes import Change, commit, create_backend, delete_backend, update_backend_config
from mqserve.controller.job_ends import Senders
from mqserve.controller.lease import claim_instance
from mqserve.controller.state.beats import Beat, MemberState, ReplicaBeat
from mqserve.controller.state.documents import Backend, Desired, Observed
from mqserve.controller.state.reading import read_desired, read_observed
from tests.broker.test_later import Trusting, job_due_in
from tests.broker.traffic import publish, publish_job, text
from tests.controller.test_leading import HTTP, controllers, until

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
B = Backend("b", "sha", "b")


class Recording(EmbeddedQueue):
    """Tells what it was asked to delete."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: list[tuple[str, int]] = []

    async def delete(self, backend: str, generation: int, shards: int = 1, *, only_if_empty: bool) -> bool:
        self.deleted.append((backend, generation))
        return await super().delete(backend, generation, shards, only_if_empty=only_if_empty)


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
        return read_observed(await self.store.get(KEYS.observed))

    async def desired(self) -> Desired:
        return read_desired(await self.store.get(KEYS.desired))

    async def says(self, replica: Beat) -> None:
        await self.store.put_field(KEYS.beats, replica.field, replica.to_bytes())


@asynccontextmanager
async def led(queue: EmbeddedQueue, senders: Senders | None = None) -> AsyncIterator[Led]:
    store = EmbeddedStore("tests")
    held = await claim_instance(store, KEYS, "", HTTP, detached=True)
    async with controllers(store, KEYS) as running:
        running.start("first", queue, senders=senders)
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
        replica = ReplicaBeat("b#old", instance.store.now_ms() + 600_000, state=MemberState.DRAINING, backend="b", generations=(1,))
        await instance.says(replica)
        await instance.change(delete_backend("b"))
        assert (await instance.observed()).retiring == {"b": (1,)}
        await instance.change(create_backend(B))
        assert await publish(queue, text("hello")) is None, "nothing is bound to it"
        await instance.store.drop_fields(KEYS.beats, replica.field)
        await ticks(instance, 3)
        observed = await instance.observed()
        assert (observed.queues, observed.retiring, ("b", 1) in queue.deleted) == ({"b": (1,)}, {}, False)


async def test_jobs_of_a_deleted_backend_that_has_no_replica_end_before_their_queue_goes() -> None:
    queue = EmbeddedQueue()
    async with led(queue, Trusting()) as instance:
        await instance.change(create_backend(B))
        jobs = [job_due_in(instance.store, 0) for _ in range(20)]
        for job in jobs:
            assert await publish_job(queue, job) is None
        await instance.change(delete_backend("b"))

        async def is_gone() -> bool:
            return await queue.depth("b", 1) is None

        await until(is_gone)
        assert None not in await instance.store.get_many([KEYS.future(job.id) for job in jobs])


async def test_jobs_stay_when_their_queue_moves_to_another_generation() -> None:
    queue = EmbeddedQueue()
    async with led(queue, Trusting()) as instance:
        await instance.change(create_backend(B))
        assert await publish_job(queue, job_due_in(instance.store, 0)) is None
        await instance.change(update_backend_config("b", {"max_queued_requests": 7}))
        await ticks(instance, 3)
        assert (await queue.count_jobs("b", 1), await queue.count_jobs("b", 2)) == (1, 0)
        assert (await instance.observed()).queues == {"b": (1, 2)}


class Refusing(EmbeddedQueue):
    """A broker that will not have one backend's queue, whatever its generation."""

    def __init__(self, error: MQServeError) -> None:
        super().__init__()
        self.error = error
        self.asked = 0

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int = 1) -> None:
        if backend == "bad":
            self.asked += 1
            raise self.error
        await super().declare(backend, generation, max_length, shards)


@pytest.mark.parametrize(
    "error", [QueueMismatch("it is of another kind"), MQServeError("it is of another kind")], ids=["mismatch", "other"]
)
async def test_a_queue_that_is_always_refused_is_a_problem_of_its_backend_and_of_no_other(error: MQServeError) -> None:
    queue = Refusing(error)
    async with led(queue) as instance:
        await instance.change(create_backend(Backend("bad", "sha", "bad")))
        await instance.change(create_backend(B))
        assert (await instance.observed()).queues == {"b": (1,)}

        async def is_reported() -> bool:
            return "of another kind" in (await instance.observed()).problems.get("bad", "")

        await until(is_reported)
        asked = queue.asked
        await ticks(instance, 30)
        assert queue.asked <= asked + 1, "it is asked again after a pause"
        generation = (await instance.desired()).backends["bad"].generation
        assert generation > 1 if isinstance(error, QueueMismatch) else generation == 1


async def test_what_waits_in_a_queue_of_an_earlier_instance_with_other_arguments_is_taken_by_the_new_replicas() -> None:
    queue = EmbeddedQueue()
    await queue.declare("b", 1, 5)
    assert await publish(queue, text("left behind")) is None
    async with led(queue) as instance:
        replica = ReplicaBeat("b#new", instance.store.now_ms() + 600_000, backend="b", generations=(1, 2))
        await instance.says(replica)
        await instance.change(create_backend(B))

        async def is_followed() -> bool:
            return (await instance.observed()).queues == {"b": (1, 2)}

        await until(is_followed)
        await publish(queue, text("new"))
        assert [await queue.depth("b", generation) for generation in (1, 2)] == [1, 1]


class AwayFor(EmbeddedQueue):
    """A broker that is away when it is asked to unbind, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    async def unbind(self, backend: str, generation: int, shards: int = 1) -> None:
        if self.times > 0:
            self.times -= 1
            raise BrokerUnavailable("away")
        await super().unbind(backend, generation, shards)


async def test_a_queue_of_an_earlier_instance_is_not_forgotten_while_the_broker_is_away() -> None:
    queue = AwayFor(2)
    await queue.declare("b", 1, 5)
    assert await publish(queue, text("left behind")) is None
    async with led(queue) as instance:
        await instance.says(ReplicaBeat("b#new", instance.store.now_ms() + 600_000, backend="b", generations=(1, 2)))
        await instance.change(create_backend(B))

        async def is_followed() -> bool:
            return (await instance.observed()).queues == {"b": (1, 2)}

        await until(is_followed)
        assert not queue.times


async def test_a_new_leader_finds_the_queue_of_which_only_the_last_one_knew() -> None:
    queue = EmbeddedQueue()
    await queue.declare("b", 1, 5)
    assert await publish(queue, text("left behind")) is None
    async with led(queue) as instance:
        await instance.says(ReplicaBeat("b#new", instance.store.now_ms() + 600_000, backend="b", generations=(1, 2)))
        await instance.change(create_backend(msgspec.structs.replace(B, generation=2)))  # as the last one made it, and wrote no more

        async def is_followed() -> bool:
            return (await instance.observed()).queues == {"b": (1, 2)}

        await until(is_followed)


async def test_the_document_tells_how_many_queues_each_generation_has_until_it_is_gone() -> None:
    async with led(EmbeddedQueue()) as instance:
        replica = ReplicaBeat("b#1", instance.store.now_ms() + 600_000, state=MemberState.READY, backend="b", generations=(1, 2, 3))
        await instance.says(replica)
        await instance.change(create_backend(msgspec.structs.replace(B, settings={"queue_shards": 3})))
        assert (await instance.observed()).shards == {"b": {1: 3}}
        await instance.change(update_backend_config("b", {"queue_shards": 2}))
        await instance.change(update_backend_config("b", {"queue_shards": 1}))
        seen = await instance.observed()
        assert (seen.shards, seen.retiring, seen.queues) == ({"b": {1: 3, 2: 2}}, {"b": (1, 2)}, {"b": (3,)})
        assert (seen.shards_of("b", 1), seen.shards_of("b", 3), seen.shards_of("unknown", 1)) == (3, 1, 1)
        await instance.says(msgspec.structs.replace(replica, generations=(3,)))
        await ticks(instance, 2)
        assert (await instance.observed()).shards == {}


async def test_a_backend_that_was_deleted_by_force_is_not_remembered_once_nothing_is_left_of_it() -> None:
    async with led(EmbeddedQueue()) as instance:
        await instance.change(create_backend(B))
        replica = ReplicaBeat("b#1", instance.store.now_ms() + 600_000, backend="b", generations=(1,))
        await instance.says(replica)
        await instance.change(delete_backend("b", force=True))
        await ticks(instance, 2)
        assert (await instance.desired()).forced == ("b",), "its replica is still there, and not to drain"
        await instance.store.drop_fields(KEYS.beats, replica.field)

        async def is_forgotten() -> bool:
            await ticks(instance, 1)
            return not (await instance.desired()).forced

        await until(is_forgotten)
