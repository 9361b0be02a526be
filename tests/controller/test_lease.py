"""Leases: one instance per namespace, one leading controller per instance, and what happens when the store forgets."""

import asyncio
import os
import time
from collections.abc import Coroutine
from typing import Any

import httpx
import msgspec
import pytest
import redis

from mqserve.broker.errors import InstanceError
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.lease import (
    LAPSED_AFTER_S,
    InstanceLease,
    Leader,
    Leadership,
    Standing,
    claim_instance,
    forget,
    read_instance,
    read_standing,
    release_of,
    renew_instance,
)
from mqserve.controller.loop import SETTLE_S
from mqserve.controller.state.documents import Backend, HttpOptions
from mqserve.controller.state.reading import read_desired
from tests.instances import Deploy, started, wait_until
from tests.servers import PrivateRabbitMQ, PrivateRedis

KEYS = StoreKeys("tests")
HTTP = HttpOptions()
NO_GUARD = ("nothing stands here", None)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def lapse(store: EmbeddedStore) -> None:
    """As if its owner had been silent for long."""
    held = await read_instance(store, KEYS)
    old = msgspec.structs.replace(held, at=store.now_ms() - int(LAPSED_AFTER_S * 1000) - 1000)
    await store.set(KEYS.instance, msgspec.json.encode(old))


def test_a_claimed_namespace_has_an_empty_document() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=False)
        desired = read_desired(await store.get(KEYS.desired))
        assert (await read_instance(store, KEYS)).id == held.id == desired.instance
        assert (desired.head_node, desired.backends) == ("n1", {})

    run(main())


def test_a_namespace_without_an_instance_says_how_to_start_one() -> None:
    async def main() -> None:
        with pytest.raises(InstanceError, match="no instance runs under this namespace: start one"):
            await read_instance(EmbeddedStore(), KEYS)

    run(main())


def test_a_live_instance_is_not_taken_over() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=False)

        async def beat() -> None:
            while True:
                await asyncio.sleep(0.01)
                await renew_instance(store, KEYS, held.id, "a", NO_GUARD)

        beating = asyncio.create_task(beat())
        with pytest.raises(InstanceError, match="runs under this namespace already"):
            await claim_instance(store, KEYS, "n2", HTTP, detached=False)
        beating.cancel()

    run(main())


def test_a_lapsed_instance_is_cleared() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        old = await claim_instance(store, KEYS, "n1", HTTP, detached=False)
        await lapse(store)
        new = await claim_instance(store, KEYS, "n2", HTTP, detached=False)
        desired = read_desired(await store.get(KEYS.desired))
        assert new.id != old.id and (desired.instance, desired.head_node) == (new.id, "n2")

    run(main())


DEPLOYED = {"backends": {"b": Backend("b", "sha", "b")}, "http": HttpOptions(port=1, middlewares="theirs")}


async def leave_behind(store: EmbeddedStore, **changes: Any) -> str:
    """A detached instance whose processes are gone; its id."""
    old = await claim_instance(store, KEYS, "n1", HTTP, detached=True)
    desired = msgspec.structs.replace(read_desired(await store.get(KEYS.desired)), version=7, **changes)
    await store.set(KEYS.desired, desired.to_bytes())
    await lapse(store)
    return old.id


@pytest.mark.parametrize(("middlewares", "then"), [("", "theirs"), ("mine", "mine")])
def test_a_lapsed_detached_instance_is_taken_over_with_what_is_deployed_by_a_new_head_node(middlewares: str, then: str) -> None:
    async def main() -> None:
        store = EmbeddedStore()
        instance = await leave_behind(store, **DEPLOYED)
        claim = await claim_instance(store, KEYS, "n2", HttpOptions(port=2, middlewares=middlewares), detached=True)
        desired = read_desired(await store.get(KEYS.desired))
        assert claim.id == instance and claim.found is not None and claim.found.version == 7
        assert (desired.head_node, desired.http, desired.version) == ("n2", HttpOptions(port=2, middlewares=then), 8)
        assert desired.backends == DEPLOYED["backends"]

    run(main())


def test_a_controller_that_takes_over_has_no_opinion_of_head_node_and_http() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        instance = await leave_behind(store, **DEPLOYED)
        document = await store.get(KEYS.desired)
        claim = await claim_instance(store, KEYS, "", None, detached=True)
        assert claim.id == instance and claim.found is not None
        assert await store.get(KEYS.desired) == document

    run(main())


def test_an_instance_that_was_left_amid_its_end_is_not_taken_over() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        instance = await leave_behind(store, closing=True)
        claim = await claim_instance(store, KEYS, "n2", HTTP, detached=True)
        assert claim.id != instance and claim.found is None
        assert not read_desired(await store.get(KEYS.desired)).closing

    run(main())


def test_a_lease_that_was_deleted_is_written_anew() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=True)
        await store.delete(KEYS.instance)
        assert await renew_instance(store, KEYS, held.id, "a", NO_GUARD)
        assert (await read_instance(store, KEYS)).id == held.id

    run(main())


def test_the_lease_of_an_instance_that_has_ended_is_not_written_anew() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=True)
        await forget(store, KEYS, held.id)
        assert await renew_instance(store, KEYS, held.id, "a", NO_GUARD)
        assert await store.get(KEYS.instance) is None

    run(main())


def test_another_instances_lease_is_not_renewed() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        await claim_instance(store, KEYS, "n1", HTTP, detached=False)
        await lapse(store)
        before = await store.get(KEYS.instance)
        assert await renew_instance(store, KEYS, "another", "a", NO_GUARD)
        assert await store.get(KEYS.instance) == before

    run(main())


def test_a_forgotten_instance_leaves_nothing() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=False)
        await forget(store, KEYS, "another")
        assert await store.get(KEYS.instance) is not None  # a later one is not theirs to clear
        await forget(store, KEYS, held.id)
        assert await store.get_many([KEYS.instance, KEYS.desired, KEYS.observed, KEYS.leader]) == [None] * 4

    run(main())


def tell_pid(request: object) -> int:
    return os.getpid()


def test_the_leader_writes_everything_back_when_the_store_lost_its_data(
    broker_server: PrivateRabbitMQ, store_server: PrivateRedis, namespace: str
) -> None:
    """FLUSHALL amid a running instance: routes, code and lease come back under the next epoch, and it serves on."""
    with (
        started(broker_url=broker_server.url, store_url=store_server.url, namespace=namespace) as client,
        redis.Redis.from_url(store_server.url) as store,
    ):
        keys = StoreKeys(namespace)
        deploy = Deploy(client)
        url = deploy.at(tell_pid)
        pid = httpx.get(url, timeout=30).json()
        before = read_desired(store.get(keys.desired))
        store.flushall()
        wait_until(lambda: store.get(keys.desired) is not None)
        after = read_desired(store.get(keys.desired))
        assert (after.epoch, after.backends, after.endpoints) == (before.epoch + 1, before.backends, before.endpoints)
        assert store.exists(*(keys.code(backend.code) for backend in after.backends.values()))
        wait_until(lambda: store.get(keys.instance) is not None)
        lease = msgspec.json.decode(store.get(keys.instance), type=InstanceLease)
        assert lease.id == after.instance and lease.at > time.time() * 1000 - 60_000
        has_settled = time.monotonic() + 2 * SETTLE_S
        while time.monotonic() < has_settled:  # nobody is missed before; then they are looked at
            assert httpx.get(url, timeout=30).json() == pid, "a loss of data must stop nothing that runs"
            time.sleep(0.1)
        assert httpx.get(deploy.at(lambda request: "made later"), timeout=30).text == "made later"


def test_of_two_who_start_over_one_lapsed_lease_one_is_refused() -> None:
    class Meanwhile(EmbeddedStore):
        """Between one starter's two looks at the lease another one takes it."""

        looks = 0

        async def get(self, key: str) -> bytes | None:
            if key == KEYS.instance:
                self.looks += 1
                if self.looks == 2:
                    await claim_instance(self, KEYS, "n2", HTTP, detached=True)
            return await super().get(key)

    async def main() -> None:
        store = Meanwhile()
        await leave_behind(store, **DEPLOYED)
        store.looks = 0
        with pytest.raises(InstanceError, match="at the same moment"):
            await claim_instance(store, KEYS, "n3", HTTP, detached=True)
        assert read_desired(await store.get(KEYS.desired)).head_node == "n2"

    run(main())


# Keepers of controllers.


@pytest.mark.parametrize(("held_by", "is_released"), [("mine", True), ("min", False), ("", False), ("another", False)])
def test_the_lead_of_a_controller_that_has_ended_is_released_by_who_kept_it_and_by_nobody_else(held_by: str, is_released: bool) -> None:
    async def main() -> None:
        store = EmbeddedStore()
        dead, next_one = Leader(store, KEYS, "controller-host-1", held_by), Leader(store, KEYS, "controller-host-2")
        assert await dead.lead() and not await next_one.lead()
        await release_of(store, KEYS, "mine")
        assert await next_one.lead() is is_released
        assert next_one.epoch == (2 if is_released else 0)
        assert await dead.lead() is not is_released, "its claim is over"

    run(main())


def test_a_leader_that_came_before_the_release_keeps_its_lead() -> None:
    class Quicker(EmbeddedStore):
        """Between the look at the lead and its release another one takes it over."""

        async def replace(self, key: str, old: bytes | None, new: bytes | None, **how: Any) -> bool:
            if new is not None and msgspec.json.decode(new, type=Leadership).at == 0:
                await self.set(KEYS.leader, msgspec.json.encode(Leadership("controller-host-2#other.1", 7, self.now_ms())))
            return await super().replace(key, old, new, **how)

    async def main() -> None:
        store = Quicker()
        assert await Leader(store, KEYS, "controller-host-1", "mine").lead()
        await release_of(store, KEYS, "mine")
        left = msgspec.json.decode(await store.get(KEYS.leader) or b"", type=Leadership)
        assert (left.epoch, left.at > 0) == (7, True)

    run(main())


def test_what_is_left_of_an_instance_is_told_from_what_is_lost() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        held = await claim_instance(store, KEYS, "n1", HTTP, detached=True)
        seen = [await read_standing(store, KEYS, held.id), await read_standing(store, KEYS, "another")]
        assert seen == [Standing.RUNS, Standing.ENDED]
        raw = await store.get(KEYS.desired)
        await store.set(KEYS.desired, b"no document")
        assert await read_standing(store, KEYS, held.id) is Standing.RUNS, "it is there, and its controller has a good one"
        closing = msgspec.structs.replace(read_desired(raw), closing=True)
        await store.set(KEYS.desired, closing.to_bytes())
        await store.set(KEYS.ended, held.id.encode())
        assert await read_standing(store, KEYS, held.id) is Standing.DRAINS, "its clearing was cut short"
        await forget(store, KEYS, held.id)
        assert await read_standing(store, KEYS, held.id) is Standing.ENDED
        await store.close()  # which forgets everything
        assert await read_standing(store, KEYS, held.id) is Standing.LOST
        await claim_instance(store, KEYS, "n2", HTTP, detached=True)
        assert await read_standing(store, KEYS, held.id) is Standing.ENDED

    run(main())
