"""What both stores promise: the same tests on the one in memory and on Redis."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from mqserve.broker.store import Record, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


async def test_a_result_is_recorded_once(store: Store, keys: StoreKeys) -> None:
    key = keys.future("f")
    assert await store.record(result(key, b"first"))
    assert not await store.record(result(key, b"second"))
    assert await store.get(key) == b"first"


async def test_of_two_results_in_one_turn_the_first_stands(store: Store, keys: StoreKeys) -> None:
    key = keys.future("f")
    first, second = await asyncio.gather(store.record(result(key, b"first")), store.record(result(key, b"second")))
    assert (first, second) == (True, False)
    assert await store.get(key) == b"first"


async def test_a_thousand_results_of_one_turn_all_stand(store: Store, keys: StoreKeys) -> None:
    names = [keys.future(str(number)) for number in range(1000)]
    assert all(await asyncio.gather(*(store.record(result(name, name.encode())) for name in names)))
    assert await store.get_many(names) == [name.encode() for name in names]


async def test_only_the_first_result_is_told_to_the_inbox(store: Store, keys: StoreKeys) -> None:
    inbox = keys.inbox("p")
    async with reading(store, inbox) as notes:
        await store.record(result(keys.future("f"), b"first", inbox, b"note of the first"))
        await store.record(result(keys.future("f"), b"second", inbox, b"note of the second"))
        await store.record(result(keys.future("g"), b"other", inbox, b"note of the other"))
        await until(lambda: b"note of the other" in notes)
    assert notes == [b"note of the first", b"note of the other"]


async def test_an_inbox_reader_gets_no_notes_of_others(store: Store, keys: StoreKeys) -> None:
    async with reading(store, keys.inbox("p")) as notes:
        await store.record(result(keys.future("f"), b"1", keys.inbox("q"), b"for q"))
        await store.record(result(keys.future("g"), b"2", keys.inbox("p"), b"for p"))
        await until(lambda: notes)
    assert notes == [b"for p"]


async def test_a_marker_rides_with_the_next_result(store: Store, keys: StoreKeys) -> None:
    store.mark(keys.start("f"), b"1", 60_000)
    await store.record(result(keys.future("f"), b"result"))
    assert await store.get(keys.start("f")) == b"1"


async def test_a_value_is_there_until_it_is_deleted(store: Store, keys: StoreKeys) -> None:
    assert await store.get(keys.desired) is None
    assert await store.set(keys.desired, b"\x00\xff")
    assert await store.get(keys.desired) == b"\x00\xff"
    await store.delete(keys.desired, keys.observed)
    assert await store.get(keys.desired) is None


async def test_many_values_come_in_the_order_asked(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.desired, b"d")
    await store.set(keys.leader, b"l")
    assert await store.get_many([keys.leader, keys.observed, keys.desired]) == [b"l", None, b"d"]
    assert await store.get_many([]) == []


async def test_only_new_leaves_a_taken_key_alone(store: Store, keys: StoreKeys) -> None:
    assert await store.set(keys.leader, b"mine", only_new=True)
    assert not await store.set(keys.leader, b"yours", only_new=True)
    assert await store.get(keys.leader) == b"mine"


async def test_a_result_is_kept_for_its_own_time_beside_others(store: Store, keys: StoreKeys) -> None:
    short = [replace(result(keys.future(name), b"short"), ttl_ms=50) for name in ("a", "c")]
    long = result(keys.future("b"), b"long")
    assert await asyncio.gather(*(store.record(record) for record in (short[0], long, short[1]))) == [True] * 3

    async def are_gone() -> bool:
        return await store.get_many([record.key for record in (short[0], long, short[1])]) == [None, b"long", None]

    await until(are_gone)


async def test_a_value_expires_and_its_key_is_new_again(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.leader, b"mine", ttl_ms=50)
    await until(lambda: store.set(keys.leader, b"yours", only_new=True), budget_s=5)
    assert await store.get(keys.leader) == b"yours"


async def test_setting_without_expiry_takes_the_expiry_away(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.leader, b"short", ttl_ms=50)
    await store.set(keys.leader, b"long")
    await store.set(keys.desired, b"witness", ttl_ms=60)
    await until(lambda: store.set(keys.desired, b"", only_new=True), budget_s=5)
    assert await store.get(keys.leader) == b"long"


async def test_a_value_may_be_given_an_expiry_later_and_lose_it_again(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.leader, b"kept", ttl_ms=50)
    await store.expire([keys.leader], None)
    await store.set(keys.observed, b"to go")
    await store.expire([keys.observed], 60)
    await until(lambda: store.set(keys.observed, b"", only_new=True), budget_s=5)
    assert await store.get(keys.leader) == b"kept"


async def test_an_expiry_of_nothing_is_nothing(store: Store, keys: StoreKeys) -> None:
    await store.expire([keys.desired], None)
    await store.expire([keys.desired], 1000)
    assert await store.get(keys.desired) is None


@pytest.mark.parametrize(
    ("before", "old", "new", "replaced"),
    [
        (b"a", b"a", b"b", True),
        (b"a", b"x", b"b", False),
        (b"a", None, b"b", False),
        (b"a", b"a", None, True),
        (b"a", b"", b"b", False),
        (None, None, b"b", True),
        (None, b"a", b"b", False),
        (None, b"", b"b", False),
        (b"", None, b"b", False),
        (b"", b"", b"b", True),
    ],
)
async def test_a_value_is_replaced_only_when_it_is_the_expected_one(
    store: Store, keys: StoreKeys, before: bytes | None, old: bytes | None, new: bytes | None, replaced: bool
) -> None:
    if before is not None:
        await store.set(keys.desired, before)
    assert await store.replace(keys.desired, old, new) is replaced
    assert await store.get(keys.desired) == (new if replaced else before)


async def test_of_many_who_replace_the_same_value_one_succeeds(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.desired, b"old")
    won = await asyncio.gather(*(store.replace(keys.desired, b"old", b"new %d" % number) for number in range(10)))
    assert sum(won) == 1
    assert await store.get(keys.desired) == b"new %d" % won.index(True)


@pytest.mark.parametrize(("guard", "holds"), [(b"mine", True), (b"another's", False), (b"", False), (None, False)])
async def test_a_guarded_write_happens_only_while_the_guard_holds(store: Store, keys: StoreKeys, guard: bytes | None, holds: bool) -> None:
    await store.set(keys.leader, b"mine")
    assert await store.replace(keys.observed, None, b"new", guard=(keys.leader, guard)) is holds
    assert await store.get(keys.observed) == (b"new" if holds else None)
    await store.set(keys.observed, b"old")
    await store.put_field(keys.beats, "node", b"1")
    assert await store.delete(keys.observed, keys.beats, guard=(keys.leader, guard)) is holds
    assert (await store.get(keys.observed), await store.fields(keys.beats)) == ((None, {}) if holds else (b"old", {"node": b"1"}))


async def test_a_guard_may_be_that_nothing_stands_there(store: Store, keys: StoreKeys) -> None:
    nothing = (keys.leader, None)
    assert await store.replace(keys.observed, None, b"new", guard=nothing) and await store.delete(keys.observed, guard=nothing)
    await store.set(keys.leader, b"")
    assert not await store.replace(keys.observed, None, b"new", guard=nothing) and not await store.delete(keys.desired, guard=nothing)


async def test_a_quiet_replacement_wakes_nobody(store: Store, keys: StoreKeys) -> None:
    async with watching(store) as changed:
        assert await store.replace(keys.desired, None, b"new", quiet=True)
        assert await store.get(keys.desired) == b"new"
        await asyncio.sleep(0.1)  # a message would be here by then
        assert not changed.is_set()


async def test_fields_are_put_read_and_dropped_one_by_one(store: Store, keys: StoreKeys) -> None:
    assert await store.fields(keys.beats) == {}
    await store.put_field(keys.beats, "node ä", b"1")
    await store.put_field(keys.beats, "proxy", b"1")
    await store.put_field(keys.beats, "proxy", b"2")
    assert await store.fields(keys.beats) == {"node ä": b"1", "proxy": b"2"}
    await store.drop_fields(keys.beats, "node ä", "unknown")
    await store.drop_fields(keys.beats)
    assert await store.fields(keys.beats) == {"proxy": b"2"}
    await store.delete(keys.beats)
    assert await store.fields(keys.beats) == {}


async def test_every_watcher_is_woken_by_an_announcement(store: Store) -> None:
    async with watching(store) as one, watching(store) as other:
        await store.announce()
        await all_set(one, other)


async def test_watchers_are_woken_by_a_replacement(store: Store, keys: StoreKeys) -> None:
    async with watching(store) as changed:
        await store.replace(keys.desired, None, b"new")
        await all_set(changed)


async def test_one_who_no_longer_watches_is_not_woken(store: Store) -> None:
    async with watching(store) as witness:
        async with watching(store) as gone:
            pass
        gone.clear()
        await store.announce()
        await all_set(witness)
        assert not gone.is_set()


async def test_store_time_is_close_to_ours_on_one_machine(store: Store) -> None:
    assert min(abs(store.now_ms() - time.time() * 1000) for _ in range(5)) < 250


async def test_a_store_in_use_is_connected(store: Store, keys: StoreKeys) -> None:
    await store.get(keys.desired)
    assert store.health.connected


def result(key: str, value: bytes, inbox: str = "", note: bytes = b"") -> Record:
    return Record(key, value, inbox, note, deadline_ms=0)


@asynccontextmanager
async def reading(store: Store, inbox: str) -> AsyncIterator[list[bytes]]:
    """The notes as they arrive at a reader that has begun."""
    notes: list[bytes] = []
    begun = asyncio.Event()
    reader = asyncio.create_task(store.read_inbox(inbox, notes.extend, begun.set))
    try:
        await begun.wait()
        yield notes
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


@asynccontextmanager
async def watching(store: Store) -> AsyncIterator[asyncio.Event]:
    """An event of ours, unset, that announcements reach."""
    changed = store.watch()
    try:
        await store.announce()
        await all_set(changed)  # by the announcement, or by a subscription that came later than it
        changed.clear()
        yield changed
    finally:
        store.unwatch(changed)


async def all_set(*events: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*(event.wait() for event in events))


async def test_the_same_result_twice_is_told_twice_and_stands_once(store: Store, keys: StoreKeys) -> None:
    inbox = keys.inbox("p")
    async with reading(store, inbox) as notes:
        assert await store.record(result(keys.future("f"), b"cancelled"))  # by somebody who knows no inbox
        assert await store.record(result(keys.future("f"), b"cancelled", inbox, b"note"))
        await until(lambda: notes == [b"note"])


async def test_a_log_is_read_from_its_beginning_and_then_as_it_grows(store: Store, keys: StoreKeys) -> None:
    await store.append_log(keys.cancelled, b"1", b"2")
    read: list[bytes] = []
    reader = asyncio.create_task(store.read_log(keys.cancelled, read.extend))
    await until(lambda: read == [b"1", b"2"])
    await store.append_log(keys.cancelled, b"3")
    await until(lambda: read == [b"1", b"2", b"3"])
    reader.cancel()
    await asyncio.wait([reader])


async def test_everybody_reads_all_of_a_log(store: Store, keys: StoreKeys) -> None:
    reads: list[list[bytes]] = [[], [], []]
    readers = [asyncio.create_task(store.read_log(keys.cancelled, read.extend)) for read in reads]
    await store.append_log(keys.cancelled, b"1")
    await until(lambda: all(read == [b"1"] for read in reads))
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)


async def test_a_new_value_that_is_sent_twice_is_still_the_senders(store: Store, keys: StoreKeys) -> None:
    """As a client does that did not hear the first answer."""
    assert await store.set(keys.leader, b"mine", only_new=True)
    assert await store.set(keys.leader, b"mine", only_new=True)


async def test_a_key_can_be_dropped_with_the_next_write(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.body("f"), b"body", ttl_ms=60_000)
    assert await store.get_large(keys.body("f")) == b"body"
    store.drop_soon(keys.body("f"))

    async def is_gone() -> bool:
        return await store.get_large(keys.body("f")) is None

    await until(is_gone)


async def test_what_can_have_one_value_only_is_written_once_and_its_expiry_put_off(store: Store, keys: StoreKeys) -> None:
    await store.put_if_absent(keys.code("a"), b"code", ttl_ms=100)
    await store.put_if_absent(keys.code("a"), b"code", ttl_ms=60_000)
    await store.set(keys.leader, b"witness", ttl_ms=150)
    await store.put_if_absent(keys.code("b"), b"code", ttl_ms=100)
    await store.expire([keys.code("b")], None)
    await store.put_if_absent(keys.code("b"), b"code", ttl_ms=100)  # which has no end by now, and gets none

    async def is_late() -> bool:
        return await store.get(keys.leader) is None

    await until(is_late)
    assert await store.get_many([keys.code("a"), keys.code("b")]) == [b"code", b"code"]
