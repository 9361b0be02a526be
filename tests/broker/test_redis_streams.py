"""What only streams on Redis go through: losses, restarts, foreign keys, and how much one call carries."""

import asyncio
import random
import re
import time
from collections.abc import Callable

import pytest
import redis

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.redis.batch_writer import FLUSH_BYTES
from mqserve.broker.redis.store import open_redis
from mqserve.broker.store import Append, Place, Refusal, StoreClosed
from mqserve.broker.store_keys import INBOX_TTL_S, STREAM_TTL_S, StoreKeys
from mqserve.broker.streams import note_of
from tests.broker.streaming import START, append_of, appended, appended_at_last, frames_of, told
from tests.broker.test_store_contract import reading
from tests.broker.traffic import until
from tests.faults.wire import Wire
from tests.instances import NOISE_S
from tests.servers import PrivateRedis

pytestmark = pytest.mark.anyio


# The server is restarted, or forgets.


async def test_a_server_that_comes_back_empty_is_noticed_before_anything_is_written_to_it(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        assert await appended(store, append_of(keys, 1, b"a", b"b")) == 2
        await asyncio.to_thread(store_server.stop)
        await asyncio.to_thread(store_server.start)
        assert await appended_at_last(store, append_of(keys, 3, b"c", ends=b"over", end_note=b"end")) == 0
        assert (await frames_of(store, keys), await store.get(keys.future("f"))) == ([], None)
        assert await appended_at_last(store, append_of(keys, 1, b"a", b"b", b"c", ends=b"over", end_note=b"end")) == 3
        assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b"), (1, 3, b"c")]


async def test_each_stream_is_looked_at_when_it_is_first_appended_to_over_another_connection(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    """As after a restart of a server whose append-only file lacks what it took last: here two streams are cut short."""
    async with open_redis(store_server.url, namespace) as store:
        for name in ("f", "g"):
            await appended(store, append_of(keys, 1, b"a", b"b", b"c", id=name))
        for name in ("f", "g"):
            store_server.say("DEL", keys.stream(name))
            store_server.say("XADD", keys.stream(name), "1-1", "f", note_of(name, 1, b"a"))
        kill_connections(store_server)
        assert await appended_at_last(store, append_of(keys, 1, b"x", id="another")) == 1  # which opens the connection
        for name in ("f", "g"):
            assert await appended(store, append_of(keys, 4, b"d", id=name)) == 1
            assert await appended(store, append_of(keys, 2, b"b", b"c", b"d", id=name)) == 4
            assert [frame for _, _, frame in await frames_of(store, keys, name)] == [b"a", b"b", b"c", b"d"]


async def test_what_was_removed_before_the_server_was_restarted_is_no_gap(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        assert await appended(store, append_of(keys, 1, b"a", b"b", trim_to=2)) == 2
        kill_connections(store_server)
        assert await appended_at_last(store, append_of(keys, 3, b"c")) == 3
        assert await frames_of(store, keys) == [(1, 3, b"c")]


async def test_a_script_that_the_server_has_forgotten_is_said_again(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a"))
        store_server.say("SCRIPT", "FLUSH")
        assert await appended(store, append_of(keys, 2, b"b")) == 2
        assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b")]


# The connection ends, or leads nowhere.


async def test_an_append_whose_answer_was_lost_is_sent_again_and_written_once(store_wire: Wire, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_wire.url, namespace) as store, reading(store, keys.inbox("p")) as notes:
        await appended(store, append_of(keys, 1, b"a"))
        store_wire.hold_answers()
        outcome = asyncio.create_task(appended(store, append_of(keys, 2, b"b", b"c", inboxes=(keys.inbox("p"),))))
        await asyncio.sleep(0.1)
        store_wire.reset()
        store_wire.mend()
        assert await outcome == 3
        assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b"), (1, 3, b"c")]
        await until(lambda: ("f", 3, b"c") in told(notes))


async def test_connections_that_are_killed_all_the_time_cost_no_frame_and_double_none(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    seeded = random.Random(1)
    async with open_redis(store_server.url, namespace) as store:
        last = 0
        while last < 300:
            if seeded.random() < 0.1:
                kill_connections(store_server)
            first = max(1, last + 1 - seeded.choice([0, 0, 3]))
            outcome = await appended_at_last(store, append_of(keys, first, *(b"%d" % seq for seq in range(first, last + 6))))
            assert isinstance(outcome, int)
            last = outcome
        assert await frames_of(store, keys) == [(1, seq, b"%d" % seq) for seq in range(1, last + 1)]


async def test_a_partition_without_a_fin_is_said_in_time_and_the_repeated_append_goes_over_another_connection(
    store_wire: Wire, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a"))
        store_wire.blackhole()
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await appended(store, append_of(keys, 2, b"b"))
        assert 2 < time.monotonic() - begun < 3 + NOISE_S and store.health.trouble
        store_wire.strand()  # what was asked before stays unanswered
        assert await appended_at_last(store, append_of(keys, 2, b"b")) == 2
        assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b")]
        assert not store.health.trouble


async def test_a_full_store_says_so_and_takes_the_same_append_once_there_is_room(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a"))
        store_server.limit_memory("1")
        with pytest.raises(StoreUnavailable, match=r"takes no writes \(OOM\)"):
            await appended(store, append_of(keys, 2, b"b"))
        assert store.health.refusal == "it is full"
        store_server.limit_memory()
        assert await appended_at_last(store, append_of(keys, 2, b"b")) == 2
        assert not store.health.trouble


async def test_what_is_not_appended_by_the_close_is_told_so(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    outcomes: list[int | Refusal | Exception] = []
    async with open_redis(store_server.url, namespace) as store:
        store_server.freeze()
        store.append_then(append_of(keys, 1, b"a"), outcomes.append)
    store.append_then(append_of(keys, 1, b"b", id="late"), outcomes.append)
    assert [type(outcome) for outcome in outcomes[1:]] == [StoreClosed] and isinstance(outcomes[0], StoreUnavailable)


async def test_a_demoted_server_is_left_for_the_one_that_its_address_leads_to_now(namespace: str, keys: StoreKeys) -> None:
    with PrivateRedis() as old, PrivateRedis() as new, Wire(old.url) as wire:
        async with open_redis(wire.url, namespace) as store:
            assert await appended(store, append_of(keys, 1, b"a")) == 1
            wire.lead_to(new.url)  # what is open stays open
            old.say("REPLICAOF", "127.0.0.1", new.port)
            assert await appended_at_last(store, append_of(keys, 2, b"b")) == 0
            assert await appended(store, append_of(keys, 1, b"a", b"b")) == 2
            assert new.say("XLEN", keys.stream("f")) == 2
            old.say("REPLICAOF", "NO", "ONE")  # a primary waits for its copies before it ends


# Keys of another type: of another program.

ODD: dict[str, Callable[[StoreKeys], str]] = {
    "stream": lambda keys: keys.stream("f"),
    "owner": lambda keys: keys.owner("f"),
    "inbox": lambda keys: keys.inbox("p"),
}


def spoil(server: PrivateRedis, key: str) -> None:
    server.say("DEL", key)
    server.say("HSET", key, "another", "program's")


@pytest.mark.parametrize("which", ODD)
async def test_a_key_of_another_type_is_said_and_deleted_and_keeps_no_other_stream_from_being_written(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys, which: str
) -> None:
    key = ODD[which](keys)
    async with open_redis(store_server.url, namespace) as store:
        spoil(store_server, key)
        inboxes = (keys.inbox("p"),)
        outcomes = await asyncio.gather(*(appended(store, append_of(keys, 1, b"a", id=name, inboxes=inboxes)) for name in ("e", "f", "g")))
        assert outcomes == [1, 1, 1]
        assert [await frames_of(store, keys, name) for name in ("e", "f", "g")] == [[(1, 1, b"a")]] * 3
        assert f"{key} was of another type" in store.health.noted
        assert store_server.say("LLEN", keys.inbox("p")) >= 2


async def test_a_stream_that_became_another_type_has_lost_what_it_had(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a", b"b"))
        spoil(store_server, keys.stream("f"))
        assert await store.read_stream(keys.stream("f"), START) == []
        assert await store.last_of_stream(keys.stream("f")) == 0
        assert await appended(store, append_of(keys, 3, b"c")) == 0
        assert await appended(store, append_of(keys, 1, b"a", b"b", b"c")) == 3
        assert f"{keys.stream('f')} was of another type" in store.health.noted


async def test_a_result_of_another_type_ends_its_stream_and_no_other(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        spoil(store_server, keys.future("f"))
        appends = [append_of(keys, 1, b"a", id=name, ends=b"over", end_note=b"end") for name in ("e", "f", "g")]
        assert await asyncio.gather(*(appended(store, append) for append in appends)) == [1, Refusal.ENDED, 1]


async def test_a_feed_of_another_type_is_taken_away_and_what_comes_next_arrives(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        spoil(store_server, keys.feed("r"))
        store.post(keys.feed("r"), b"lost")
        await until(lambda: store_server.say("EXISTS", keys.feed("r")) == 0)
        assert f"{keys.feed('r')} was of another type" in store.health.noted
        store.post(keys.feed("r"), b"1")
        await until(lambda: store_server.say("LRANGE", keys.feed("r"), 0, -1) == [b"1"])
        assert 0 < store_server.say("TTL", keys.feed("r")) <= INBOX_TTL_S


async def test_entries_that_are_not_ours_are_left_out(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a"))
        store_server.say("XADD", keys.stream("f"), "1-2", "another", "program's")
        store_server.say("XADD", keys.stream("f"), "1-3", "f", note_of("f", 3, b"b"), "and", "more")
        store_server.say("XADD", keys.stream("f"), "1-4", "f", "no entry")
        assert await store.read_stream(keys.stream("f"), START) == [(Place(1, 1), b"a")]


# How much there is.


async def test_ten_thousand_frames_stand_and_are_read_in_portions(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    frames = [b"%d" % number for number in range(1, 10_001)]
    async with open_redis(store_server.url, namespace) as store:
        for first in range(0, 9000, 100):
            assert await appended(store, append_of(keys, first + 1, *frames[first : first + 100])) == first + 100
        assert await appended(store, append_of(keys, 9001, *frames[9000:], inboxes=(keys.inbox("p"),))) == 10_000
        assert [frame for _, _, frame in await frames_of(store, keys)] == frames
        assert store_server.say("LLEN", keys.inbox("p")) == 1000
        assert await appended(store, append_of(keys, 10_001, trim_to=9990)) == 10_000
        assert [seq for _, seq, _ in await frames_of(store, keys)] == list(range(9991, 10_001))


async def test_appends_of_one_turn_leave_together_in_calls_of_a_bounded_size(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        small, large = b"x", b"x" * 1024 * 1024
        for frame, most in ((small, 3), (large, 12 * len(large) / FLUSH_BYTES + 3)):
            await appended(store, append_of(keys, 1, b"x", id=f"first {len(frame)}"))
            before = calls_of_scripts(store_server)
            appends: list[Append] = [append_of(keys, 1, frame, id=f"{len(frame)} {number}") for number in range(12)]
            assert set(await asyncio.gather(*(appended(store, append) for append in appends))) == {1}
            assert calls_of_scripts(store_server) - before <= most
        assert calls_of_scripts(store_server) - before >= 12 * len(large) / FLUSH_BYTES


async def test_streams_that_never_end_are_not_remembered_for_longer_than_their_keys_last(
    store_url: str, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_url, namespace) as store:
        for number in range(1000):
            assert await appended(store, append_of(keys, 1, b"a", id=f"left{number}", ttl_ms=5)) == 1
        assert int(re.findall(r"(\d+) streams", repr(store._append))[0]) < 600


async def test_all_keys_of_a_stream_expire(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await appended(store, append_of(keys, 1, b"a", inboxes=(keys.inbox("p"),), ends=b"over", end_note=b"end"))
        for key in (keys.stream("f"), keys.owner("f"), keys.future("f"), keys.inbox("p")):
            assert 0 < store_server.say("TTL", key) <= STREAM_TTL_S


def calls_of_scripts(server: PrivateRedis) -> int:
    with redis.Redis.from_url(server.url) as client:
        return sum(client.info("commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))


def kill_connections(server: PrivateRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
