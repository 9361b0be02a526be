"""Leading: one controller at a time, its writes refused once another leads, and what a waiting one is ready for. On both stores."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.files.manifest import read_folders
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.lifeline import Stop
from mqserve.broker.queue import Queue
from mqserve.broker.settings import DEFAULTS
from mqserve.broker.store import Store
from mqserve.broker.store_keys import CODE_TTL_S, LEADER_TTL_S, StoreKeys
from mqserve.broker.values.backend_code import Packed, save
from mqserve.broker.values.code import Code
from mqserve.broker.values.signing import MIN_KEY_BYTES
from mqserve.controller.changes import commit, create_backend, delete_backend, register_convertor, update_backend
from mqserve.controller.job_ends import Senders
from mqserve.controller.lease import (
    InstanceLease,
    Leader,
    Leadership,
    NotLeading,
    claim_instance,
    forget,
    has_ended,
    read_instance,
    renew_instance,
)
from mqserve.controller.loop import SETTLE_S, Controller
from mqserve.controller.state.beats import NodeBeat
from mqserve.controller.state.documents import Assignment, Backend, CodeKind, Desired, HttpOptions, Observed
from mqserve.controller.state.reading import read_desired, read_observed
from tests.broker import test_later, traffic

pytestmark = pytest.mark.anyio

HTTP = HttpOptions(location="NoServer")


class Between:
    """A store on whose side something happens before, or after, the next compare-and-set."""

    def __init__(self, store: Store, *, before: Callable[[], Awaitable[Any]] | None = None, after: Exception | None = None) -> None:
        self._store = store
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def replace(self, *what: Any, **how: Any) -> bool:
        before, after, self._before, self._after = self._before, self._after, None, None
        if before is not None:
            await before()
        done = await self._store.replace(*what, **how)
        if after is not None:
            raise after
        return done


async def lapse(store: Store, keys: StoreKeys) -> None:
    """As if the leader had been silent for long."""
    raw = await store.get(keys.leader)
    assert raw is not None
    held = msgspec.json.decode(raw, type=Leadership)
    old = msgspec.structs.replace(held, at=store.now_ms() - LEADER_TTL_S * 1000 - 1000)
    assert await store.replace(keys.leader, raw, msgspec.json.encode(old))


async def leader_of(store: Store, keys: StoreKeys) -> tuple[str, int]:
    raw = await store.get(keys.leader)
    if raw is None:
        return "", 0
    held = msgspec.json.decode(raw, type=Leadership)
    return held.controller.partition("#")[0], held.epoch


async def until(condition: Callable[[], Awaitable[bool]], budget_s: float = 20) -> None:
    async with asyncio.timeout(budget_s):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_one_controller_leads_and_another_waits(store: Store, keys: StoreKeys) -> None:
    first, second = Leader(store, keys, "first"), Leader(store, keys, "second")
    assert [await first.lead(), await second.lead(), await first.lead()] == [True, False, True]
    assert (first.epoch, first.still_leads(), second.still_leads()) == (1, True, False)
    with pytest.raises(NotLeading):
        _ = second.claim


async def test_a_lapsed_lead_passes_on_under_a_higher_epoch_and_the_old_leader_notices(store: Store, keys: StoreKeys) -> None:
    first, second = Leader(store, keys, "first"), Leader(store, keys, "second")
    assert await first.lead()
    await lapse(store, keys)
    assert await second.lead() and second.epoch == 2
    assert not await first.lead() and not first.still_leads()


@pytest.mark.row(13)
async def test_a_leader_frozen_amid_its_renewal_does_not_take_the_lead_back(store: Store, keys: StoreKeys) -> None:
    second = Leader(store, keys, "second")

    async def freeze() -> None:
        await lapse(store, keys)
        assert await second.lead()

    between = Between(store)
    first = Leader(between, keys, "first")
    assert await first.lead()
    between._before = freeze
    assert not await first.lead()
    assert await leader_of(store, keys) == ("second", 2)


@pytest.mark.row(13)
async def test_every_write_of_a_leader_that_was_frozen_is_refused(store: Store, keys: StoreKeys) -> None:
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    first, second = Leader(store, keys, "first"), Leader(store, keys, "second")
    assert await first.lead()
    claim = first.claim
    assert await store.replace(keys.observed, None, b"{}", guard=claim)
    await lapse(store, keys)
    assert await second.lead()
    before = await store.get_many([keys.instance, keys.desired, keys.observed, keys.leader])
    assert not await store.replace(keys.observed, b"{}", b"[]", guard=claim)
    assert not await renew_instance(store, keys, held.id, "a", claim)
    assert not await forget(store, keys, held.id, claim)
    await first.release()
    assert await store.get_many([keys.instance, keys.desired, keys.observed, keys.leader]) == before


async def test_a_leader_stops_by_its_own_clock_before_another_may_take_over(
    store: Store, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("mqserve.controller.lease.time", SimpleNamespace(monotonic=lambda: clock.now))
    leader = Leader(store, keys, "first")
    assert await leader.lead()
    clock.now += LEADER_TTL_S - 2
    assert leader.still_leads()
    await leader.hold()  # which renews it
    clock.now += LEADER_TTL_S - 2
    assert leader.still_leads()
    clock.now += 1
    assert not leader.still_leads()
    with pytest.raises(NotLeading):
        await leader.hold()  # nobody took over, but what it was about to do was decided long ago
    assert await leader.lead() and leader.epoch == 1
    await leader.hold()


async def test_a_released_lead_is_taken_at_once(store: Store, keys: StoreKeys) -> None:
    first, second = Leader(store, keys, "first"), Leader(store, keys, "second")
    assert await first.lead() and not await second.lead()
    await first.release()
    assert await second.lead()
    assert await leader_of(store, keys) == ("second", 2)
    await first.release()
    assert await leader_of(store, keys) == ("second", 2)


async def test_a_claim_whose_answer_was_lost_is_recognised(store: Store, keys: StoreKeys) -> None:
    leader = Leader(Between(store, after=StoreUnavailable("the connection was lost")), keys, "first")
    with pytest.raises(StoreUnavailable):
        await leader.lead()
    assert await leader.lead() and leader.epoch == 1


async def test_a_restarted_controller_of_the_same_name_is_another_one(store: Store, keys: StoreKeys) -> None:
    assert await Leader(store, keys, "controller-host-1").lead()
    assert not await Leader(store, keys, "controller-host-1").lead()


async def test_a_leader_that_finds_a_higher_epoch_goes_above_it(store: Store, keys: StoreKeys) -> None:
    leader = Leader(store, keys, "first")
    assert await leader.lead()
    leader.outrank(7)
    assert await leader.lead() and leader.epoch == 8


async def test_one_who_clears_halfway_harms_no_later_instance(store: Store, keys: StoreKeys) -> None:
    """Frozen between the lease and the documents: by then they are another instance's."""
    old = await claim_instance(store, keys, "", HTTP, detached=True)
    frozen = Between(store)

    async def start_anew() -> None:
        assert await store.replace(keys.instance, await store.get(keys.instance), None)  # as the frozen one did before
        await claim_instance(store, keys, "n2", HTTP, detached=True)

    frozen._before = start_anew
    await forget(frozen, keys, old.id)
    assert read_desired(await store.get(keys.desired)).head_node == "n2"
    assert await store.get(keys.instance) is not None


@pytest.mark.parametrize(("closing", "keeps_queues", "stay"), [(True, False, False), (True, True, True), (False, False, True)])
async def test_the_firings_of_schedules_stay_where_the_queues_of_an_instance_do(
    store: Store, keys: StoreKeys, closing: bool, keeps_queues: bool, stay: bool
) -> None:
    held = await claim_instance(store, keys, "", HTTP, detached=False)
    raw = await store.get(keys.desired)
    desired = msgspec.structs.replace(read_desired(raw), closing=closing, keeps_queues=keeps_queues)
    assert await store.replace(keys.desired, raw, desired.to_bytes())
    await store.set(keys.firings, b"{}")
    await forget(store, keys, held.id)
    assert await store.get_many([keys.desired, keys.firings]) == [None, b"{}" if stay else None]
    await claim_instance(store, keys, "", HTTP, detached=False)
    assert await store.get(keys.firings) == (b"{}" if stay else None)


# Controllers, as tasks of one process.


class Running:
    """Controllers of one instance, by name."""

    def __init__(self, store: Store, keys: StoreKeys, instance: str) -> None:
        self._store = store
        self._keys = keys
        self._instance = instance
        self.stops: dict[str, Stop] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, queue: Queue | None = None, *, has_key: bool = True, senders: Senders | None = None) -> None:
        self.stops[name] = Stop()
        settings = replace(DEFAULTS, namespace="tests", secret_keys=(b"k" * MIN_KEY_BYTES,) if has_key else ())
        controller = Controller(self._store, self._keys, queue or EmbeddedQueue(), name, self._instance, senders=senders, settings=settings)
        self.tasks[name] = asyncio.create_task(controller.run(self.stops[name]))

    async def leads(self, name: str) -> None:
        async def is_leading() -> bool:
            raw = await self._store.get(self._keys.observed)
            return (await leader_of(self._store, self._keys))[0] == name and read_observed(raw).epoch > 0

        await until(is_leading)


@asynccontextmanager
async def controllers(store: Store, keys: StoreKeys) -> AsyncIterator[Running]:
    """Of the instance there is: none, to begin with, and none is left at the end."""
    running = Running(store, keys, (await read_instance(store, keys)).id)
    try:
        yield running
    finally:
        for stop in running.stops.values():
            stop.set()
        await asyncio.gather(*running.tasks.values(), return_exceptions=True)


async def test_a_controller_that_ends_gracefully_hands_over_at_once(store: Store, keys: StoreKeys) -> None:
    await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        await running.leads("first")
        running.start("second")
        running.stops["first"].set()
        await running.tasks["first"]
        left = msgspec.json.decode(await store.get(keys.leader) or b"", type=Leadership)
        assert left.at == 0 or left.controller.startswith("second"), "it waits for the lead to lapse"
        await running.leads("second")
        assert read_observed(await store.get(keys.observed)).epoch in (1, 2)


async def test_all_controllers_end_with_the_instance(store: Store, keys: StoreKeys) -> None:
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        for name in ("first", "second", "third"):
            running.start(name)
        await until(lambda: exists(store, keys.observed))
        raw = await store.get(keys.desired)
        closing = msgspec.structs.replace(read_desired(raw), closing=True, version=1)
        assert await store.replace(keys.desired, raw, closing.to_bytes())
        async with asyncio.timeout(20):
            await asyncio.gather(*running.tasks.values())
        assert await store.get_many([keys.instance, keys.desired, keys.observed, keys.leader]) == [None] * 4
        assert await has_ended(store, keys, held.id)


async def test_one_who_did_not_see_the_end_does_not_bring_the_instance_back() -> None:
    """As a controller does that is frozen while the instance is shut down: its copy of the documents says nothing of that."""
    store, keys = EmbeddedStore(), StoreKeys("tests")
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("frozen")
        await running.leads("frozen")
        await forget(store, keys, held.id)
        async with asyncio.timeout(20):
            await running.tasks["frozen"]
        assert await store.get(keys.desired) is None


async def test_one_who_wakes_up_among_the_documents_of_another_instance_ends_and_touches_nothing() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("suspended")
        await running.leads("suspended")
        theirs = [msgspec.json.encode(InstanceLease("another", "stranger", False, 1)), Desired(instance="another").to_bytes()]
        await store.delete(keys.observed)
        for key, document in zip((keys.instance, keys.desired), theirs, strict=True):
            await store.set(key, document)
        async with asyncio.timeout(20):
            await running.tasks["suspended"]
        assert await store.get_many([keys.instance, keys.desired, keys.observed]) == [*theirs, None]


async def test_one_who_only_waited_writes_back_what_the_store_lost() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    held = await claim_instance(store, keys, "n1", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        await running.leads("first")
        running.start("second")
        await asyncio.sleep(0.2)
        before = read_observed(await store.get(keys.observed)).epoch
        running.stops["first"].set()
        await store.close()  # which forgets everything
        await running.tasks["first"]
        await until(lambda: exists(store, keys.desired))
        restored = read_desired(await store.get(keys.desired))
        assert (restored.instance, restored.head_node, restored.epoch) == (held.id, "n1", 2)

        async def is_above() -> bool:
            return read_observed(await store.get(keys.observed)).epoch > before

        await until(is_above)  # its own epoch was none: it goes above the one it wrote back


async def follows(store: Store, keys: StoreKeys, version: int) -> None:
    async def has_seen() -> bool:
        return read_observed(await store.get(keys.observed)).seen >= (1, version)

    await until(has_seen)


async def test_what_was_deployed_stands_although_the_store_comes_back_with_an_older_copy() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        await follows(store, keys, 0)
        older = await store.get_many([keys.desired, keys.observed])
        await commit(store, keys, held.id, register_convertor("hex", "sha"))
        await follows(store, keys, 1)
        before = read_observed(await store.get(keys.observed))
        for key, document in zip((keys.desired, keys.observed), older, strict=True):
            await store.set(key, document or b"")
        await store.announce()

        async def is_back() -> bool:
            return read_desired(await store.get(keys.desired)).epoch == 2

        await until(is_back)
        assert read_desired(await store.get(keys.desired)).convertors == {"hex": "sha"}
        observed = read_observed(await store.get(keys.observed))
        assert observed.seen >= before.seen and (observed.epoch, observed.version) > (before.epoch, before.version)


async def test_a_controller_that_starts_after_an_outage_gives_the_members_time_to_beat() -> None:
    """It finds what was assigned, and no beat that is not as old as the outage."""
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await claim_instance(store, keys, "n", HttpOptions(), detached=True)
    assigned = Observed(epoch=7, replicas={"b#1": Assignment("b", "n", 1)}, queues={"b": (1,)}, proxies=("n",))
    await store.set(keys.observed, assigned.to_bytes())
    async with controllers(store, keys) as running:
        running.start("first")

        async def leads() -> bool:
            return await leader_of(store, keys) == ("first", 8)  # above what it found

        await until(leads)
        await store.put_field(keys.beats, "node:n", NodeBeat("n", store.now_ms() + 60_000, takes_proxy=True).to_bytes())

        async def compared() -> bool:
            return read_observed(await store.get(keys.observed)).epoch == 8

        await until(compared)
        observed = read_observed(await store.get(keys.observed))
        assert observed.draining == {} and observed.proxies == ("n",)


async def test_a_new_instance_does_not_wait_for_anybody() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    await claim_instance(store, keys, "n", HttpOptions(), detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        async with asyncio.timeout(SETTLE_S / 2):
            await follows(store, keys, 0)


class Expiring(EmbeddedStore):
    """Tells what was said of the time that code has."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, int | None] = {}

    async def expire(self, keys: Sequence[str], ttl_ms: int | None) -> None:
        self.told.update({key: ttl_ms for key in keys if ":code:" in key})
        await super().expire(keys, ttl_ms)


async def test_code_is_kept_while_the_document_names_it_and_goes_by_itself_afterwards() -> None:
    store, keys = Expiring(), StoreKeys("tests")
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        for version, (change, told) in enumerate(
            [
                (create_backend(Backend("b", "old", "b")), {keys.code("old"): None}),
                (update_backend("b", "new", "b", CodeKind.HANDLER, None), {keys.code("old"): CODE_TTL_S * 1000, keys.code("new"): None}),
                (delete_backend("b"), {keys.code("old"): CODE_TTL_S * 1000, keys.code("new"): CODE_TTL_S * 1000}),
            ],
            start=1,
        ):
            await commit(store, keys, held.id, change)
            await follows(store, keys, version)
            assert store.told == told


async def test_the_files_of_code_are_kept_with_it_and_go_with_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "app.py").write_text(f"x = {name!r}\n")
        (tmp_path / name / "same.py").write_text("both have it\n")
    one, two = (read_folders({tmp_path / name: ("",)}, ()) for name in ("one", "two"))
    store, keys = Expiring(), StoreKeys("tests")
    records = [Code(name, target="app:f", files=files.sha256) for name, files in (("one", one), ("two", two))]
    for record, files in zip(records, (one, two), strict=True):
        await save(store, keys, Packed(record, files))
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    first, second = ({record.sha256, files.sha256} | files.manifest.chunks for record, files in zip(records, (one, two), strict=True))
    async with controllers(store, keys) as running:
        running.start("first")
        await commit(store, keys, held.id, create_backend(Backend("b", records[0].sha256, "b")))
        await follows(store, keys, 1)
        assert store.told == {keys.code(sha256): None for sha256 in first}
        await commit(store, keys, held.id, update_backend("b", records[1].sha256, "b", CodeKind.HANDLER, None))
        await follows(store, keys, 2)
        gone = {keys.code(sha256): CODE_TTL_S * 1000 for sha256 in first - second}
        assert store.told == {keys.code(sha256): None for sha256 in first | second} | gone


class SlowQueue(EmbeddedQueue):
    """Declares as slowly as a RabbitMQ that has much to do."""

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int = 1) -> None:
        await asyncio.sleep(0.25)
        await super().declare(backend, generation, max_length, shards)


async def test_the_instance_lives_on_while_its_leader_declares_for_long() -> None:
    store, keys = EmbeddedStore(), StoreKeys("tests")
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    for number in range(16):
        await commit(store, keys, held.id, create_backend(Backend(f"b{number}", "sha", "b")))
    beats = {(await read_instance(store, keys)).at}
    async with controllers(store, keys) as running:
        running.start("first", SlowQueue())
        while await store.get(keys.observed) is None:
            beats.add((await read_instance(store, keys)).at)
            await asyncio.sleep(0.05)
    assert len(beats) >= 4, "one tick of four seconds"


async def test_the_leader_reports_a_store_that_is_set_up_to_forget() -> None:
    class Forgetful(EmbeddedStore):
        async def misconfiguration(self) -> str:
            return "it evicts"

    store, keys = Forgetful(), StoreKeys("tests")
    await claim_instance(store, keys, "", HTTP, detached=True)
    async with controllers(store, keys) as running:
        running.start("first")
        await running.leads("first")
        assert read_observed(await store.get(keys.observed)).problems == {"the store": "it evicts"}


async def test_only_the_leader_looks_after_jobs_that_wait_and_the_next_one_goes_on(store: Store, keys: StoreKeys) -> None:
    held = await claim_instance(store, keys, "", HTTP, detached=True)
    await commit(store, keys, held.id, create_backend(Backend("b", "sha", "b")))
    queue = EmbeddedQueue()
    async with controllers(store, keys) as running:
        running.start("first", queue, senders=test_later.Trusting())
        await running.leads("first")
        await traffic.until(lambda: queue.later.taking)
        first = queue.later.taking
        running.start("second", queue, senders=test_later.Trusting())
        assert await test_later.publish_later(queue, test_later.job_due_in(store, 0.5), 0.5) is None
        await traffic.until(lambda: queue.count_jobs("b", 1))
        assert queue.later.taking is first, "another one consumes, too"
        running.stops["first"].set()
        await running.leads("second")
        await traffic.until(lambda: queue.later.taking is not first and queue.later.taking)
        assert await test_later.publish_later(queue, test_later.job_due_in(store, 0), 0) is None

        async def are_there() -> bool:
            return await queue.count_jobs("b", 1) == 2

        await traffic.until(are_there)


async def test_the_leader_tells_all_that_the_store_is_almost_full_and_no_more_once_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Filling(EmbeddedStore):
        def __init__(self) -> None:
            super().__init__()
            self.why = "it is full to 80%"
            self.was_full: list[bool] = []

        async def fullness(self, *, was_full: bool) -> str:
            self.was_full.append(was_full)
            return self.why

    monkeypatch.setattr("mqserve.controller.store_checks.MEMORY_EVERY_S", 0.1)
    store, keys = Filling(), StoreKeys("tests")
    await claim_instance(store, keys, "", HTTP, detached=True)

    async def says(why: str) -> bool:
        observed = read_observed(await store.get(keys.observed))
        return (observed.store_is_full, "the store's memory" in observed.problems) == (why, bool(why))

    async with controllers(store, keys) as running:
        running.start("first")
        await until(lambda: says("it is full to 80%"))
        store.why = ""
        await until(lambda: says(""))
    assert store.was_full[:2] == [False, True]


async def exists(store: Store, key: str) -> bool:
    return await store.get(key) is not None
