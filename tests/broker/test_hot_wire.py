"""The connection without redis-py: each reply finds its question, each question has an end, and odd replies end the connection in words."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis.exceptions

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.process.loops import IoLoop
from mqserve.broker.redis.client import blocking_client
from mqserve.broker.redis.hot_wire import HotWire, Lost, dial, packed
from mqserve.broker.redis.store import open_redis
from mqserve.broker.store import Record
from mqserve.broker.store_keys import StoreKeys
from tests.broker.odd_redis import odd_redis
from tests.broker.traffic import until
from tests.children import MANY_THREADS, in_a_child, sockets
from tests.faults.wire import Wire
from tests.servers import PrivateRedis

pytestmark = pytest.mark.anyio

LONG_S = 60.0


@asynccontextmanager
async def open_wire(url: str) -> AsyncIterator[HotWire]:
    client = blocking_client(url)
    wire = await dial(client, 10)
    try:
        yield wire
    finally:
        wire.end(Lost("the test is over"))
        await client.aclose()


class Heard:
    """What the questions of a test came to, in the order in which they ended."""

    def __init__(self, wire: HotWire) -> None:
        self._wire = wire
        self.ends: list[tuple[str, list[Any] | Exception]] = []

    def ask(self, name: str, *commands: bytes, budget_s: float = LONG_S, in_parts: bool = False) -> None:
        heard = partial(self._hear, name)
        self._wire.ask(b"".join(commands), len(commands), heard, budget_s, in_parts=in_parts)

    def _hear(self, name: str, replies: list[Any] | Exception) -> None:
        self.ends.append((name, replies))

    async def all(self, count: int) -> list[tuple[str, list[Any] | Exception]]:
        await until(lambda: len(self.ends) == count)
        return self.ends


async def test_each_question_gets_its_own_replies_in_the_order_asked(store_url: str) -> None:
    async with open_wire(store_url) as wire:
        heard = Heard(wire)
        heard.ask("one", packed("ECHO", "1"))
        heard.ask("two", packed("ECHO", "2"), packed("ECHO", b"x" * 1_000_000))
        heard.ask("none", packed("NOTHING"), packed("ECHO", "3"))
        (_, one), (_, two), (_, none) = await heard.all(3)
        assert (one, two) == ([b"1"], [b"2", b"x" * 1_000_000])
        assert isinstance(none, list) and isinstance(none[0], redis.exceptions.ResponseError) and none[1] == b"3"
        assert wire.is_open


async def test_a_question_without_a_reply_in_time_ends_the_connection_and_all_that_was_asked() -> None:
    async with odd_redis() as server, open_wire(server.url) as wire:
        server.answers["GET"] = [b""]
        heard = Heard(wire)
        heard.ask("first", packed("GET", "a"), budget_s=0.2)
        heard.ask("second", packed("GET", "a"))
        (_, first), (_, second) = await heard.all(2)
        assert isinstance(first, TimeoutError) and second is first is await wire.ended
        assert "no reply within 0.2 s" in str(first) and not wire.is_open


async def test_the_time_for_a_reply_counts_from_the_reply_before(store_url: str, namespace: str) -> None:
    async with open_wire(store_url) as wire:
        heard = Heard(wire)
        for name in ("one", "two", "three"):  # the server begins with each when it is done with the one before
            heard.ask(name, packed("BLPOP", f"mqserve:{namespace}:none", 0.4), budget_s=0.7)
        assert [reply for _, reply in await heard.all(3)] == [[None]] * 3


@pytest.mark.parametrize("in_parts", [True, False])
async def test_a_reply_that_comes_in_parts_may_take_its_time_for_each(in_parts: bool) -> None:
    async with odd_redis() as server, open_wire(server.url) as wire:
        server.answers["GET"] = [b"$5\r\n"]
        heard = Heard(wire)
        heard.ask("slow", packed("GET", "a"), budget_s=0.5, in_parts=in_parts)
        for part in (b"12", b"34", b"5\r\n"):
            await asyncio.sleep(0.25)
            server.say_to_all(part)
        ((_, slow),) = await heard.all(1)
        assert slow == [b"12345"] if in_parts else isinstance(slow, TimeoutError)


def test_a_reply_that_came_while_this_process_was_held_up_counts(store_url: str) -> None:
    async def ask_and_be_held_up() -> None:
        async with open_wire(store_url) as wire:
            heard = Heard(wire)
            heard.ask("one", packed("PING"), budget_s=0.1)
            time.sleep(0.3)  # noqa: ASYNC251 - as user code does that keeps the GIL
            assert await heard.all(1) == [("one", [b"PONG"])]
            assert wire.is_open

    with asyncio.Runner(loop_factory=IoLoop) as runner:
        runner.run(ask_and_be_held_up())


async def test_a_connection_that_was_idle_for_longer_than_a_reply_may_take_is_kept(store_url: str) -> None:
    async with open_wire(store_url) as wire:
        heard = Heard(wire)
        heard.ask("one", packed("PING"), budget_s=0.1)
        await heard.all(1)
        await asyncio.sleep(0.3)
        assert wire.is_open
        heard.ask("two", packed("PING"), budget_s=10)
        await heard.all(2)


@pytest.mark.parametrize("fault", [Wire.reset, Wire.finish, Wire.reset_clients])
async def test_what_was_asked_over_a_lost_connection_is_told(store_wire: Wire, fault: Any) -> None:
    async with open_wire(store_wire.url) as wire:
        store_wire.hold_answers()
        heard = Heard(wire)
        heard.ask("one", packed("PING"))
        await asyncio.to_thread(fault, store_wire)
        ((_, error),) = await heard.all(1)
        assert isinstance(error, Lost) and not wire.is_open
        wire.end(TimeoutError("twice"))
        assert wire.error is error and len(heard.ends) == 1


ODD = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a length out of range": b"$-7\r\n",
    "a map with a list for a key": b"%1\r\n*1\r\n:1\r\n+a\r\n",
    "a number that is none": b":1x\r\n",
    "more replies than questions": b"+OK\r\n+OK\r\n",
}


@pytest.mark.parametrize("said", ODD.values(), ids=ODD)
async def test_an_odd_reply_ends_the_connection_in_words(said: bytes) -> None:
    async with odd_redis() as server, open_wire(server.url) as wire:
        server.answers["GET"] = [said]
        heard = Heard(wire)
        heard.ask("one", packed("GET", "a"))
        error = await wire.ended
        assert isinstance(error, redis.exceptions.InvalidResponse) and str(error)
        assert len(heard.ends) == 1


async def test_what_the_server_pushes_of_itself_is_passed_over() -> None:
    async with odd_redis() as server, open_wire(server.url) as wire:
        heard = Heard(wire)
        server.say_to_all(b">2\r\n+MOVING\r\n:1\r\n")
        heard.ask("one", packed("PING"))
        assert await heard.all(1) == [("one", [b"PONG"])]


async def test_a_login_of_the_url_counts(store_server: PrivateRedis, namespace: str) -> None:
    store_server.say("ACL", "SETUSER", namespace, "on", ">päss wörd", "-@all", "+ping", "+client|getname", "+client|setname", "+select")
    url = store_server.url.replace("redis://", f"redis://{namespace}:p%C3%A4ss%20w%C3%B6rd@").replace("/0", "/3?client_name=hot")
    try:
        async with open_wire(url) as wire:
            heard = Heard(wire)
            heard.ask("one", packed("CLIENT", "GETNAME"), packed("GET", "a"))
            ((_, replies),) = await heard.all(1)
            assert isinstance(replies, list) and replies[0] == b"hot"
            assert isinstance(replies[1], redis.exceptions.NoPermissionError)
            (client,) = [line for line in str(store_server.say("CLIENT", "LIST")).split("\n") if "name=hot" in line]
            assert " db=3 " in client and f" user={namespace} " in client
        with pytest.raises(redis.exceptions.AuthenticationError):
            async with open_wire(url.replace("p%C3%A4ss", "pass")):
                pass
    finally:
        store_server.say("ACL", "DELUSER", namespace)


async def test_a_server_that_greets_and_refuses_the_rest_is_not_connected_to() -> None:
    async with odd_redis() as server:
        server.answers["PING"] = [b"-LOADING Redis is loading the dataset in memory\r\n"]
        with pytest.raises(redis.exceptions.BusyLoadingError):
            async with open_wire(server.url):
                pass


async def test_a_server_that_does_not_greet_is_given_up_in_time() -> None:
    async with odd_redis() as server:
        server.answers["HELLO"] = [b""]
        client = blocking_client(server.url)
        with pytest.raises(TimeoutError):
            await dial(client, 0.2)


# The two conversations, on a server that says odd things.

ODD_WRITTEN = {
    "text": b"+OK\r\n",
    "too few": b"*0\r\n",
    "too many": b"*2\r\n:1\r\n:1\r\n",
    "texts": b"*1\r\n+1\r\n",
    "an error among them": b"*1\r\n-ERR odd\r\n",
    "nothing": b"_\r\n",
    "no such script, again and again": b"-NOSCRIPT No matching script.\r\n",
}
ODD_POPPED = {
    "text": b"+OK\r\n",
    "a number": b":7\r\n",
    "no list": b"*2\r\n+inbox\r\n+note\r\n",
    "numbers": b"*2\r\n+inbox\r\n*1\r\n:1\r\n",
    "one part": b"*1\r\n*1\r\n+note\r\n",
    "an error": b"-ERR odd\r\n",
    "an error inside": b"*2\r\n+inbox\r\n*1\r\n-ERR odd\r\n",
}


@pytest.mark.parametrize("said", [*ODD_WRITTEN.values(), *ODD.values()], ids=[*ODD_WRITTEN, *ODD])
async def test_a_result_is_written_again_after_an_odd_reply(namespace: str, keys: StoreKeys, said: bytes) -> None:
    async with odd_redis() as server, open_redis(server.url, namespace) as store:
        server.answers["EVAL"] = [said]
        server.answers["EVALSHA"] = [said, b"*1\r\n:1\r\n"]
        assert await store.record(Record(keys.future("f"), b"v", "", b"", deadline_ms=store.now_ms() + 60_000))
        server.answers["EVALSHA"] = [said]
        with pytest.raises(StoreUnavailable):
            await store.record(Record(keys.future("g"), b"v", "", b"", deadline_ms=0))


@pytest.mark.parametrize("said", [*ODD_POPPED.values(), *ODD.values()], ids=[*ODD_POPPED, *ODD])
async def test_an_inbox_is_read_on_after_an_odd_reply(
    namespace: str, keys: StoreKeys, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[bytes] = []
    gaps: list[float] = []
    async with odd_redis() as server, open_redis(server.url, namespace) as store:
        server.answers["BLMPOP"] = [said, b"", b"*2\r\n+inbox\r\n*2\r\n+one\r\n+two\r\n", b""]
        reader = asyncio.create_task(store.read_inbox(keys.inbox("p"), notes.extend, lambda: gaps.append(time.monotonic())))
        await until(lambda: notes == [b"one", b"two"])
        assert len(gaps) == 2 and "lost the inbox" in caplog.text
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


@MANY_THREADS
def test_a_forked_child_has_neither_of_the_connections(store_url: str, namespace: str) -> None:
    server = ("127.0.0.1", int(store_url.rpartition(":")[2].partition("/")[0]))

    def connections() -> int:
        return sum(peer == server for _, peer in sockets())

    async def count(begun: asyncio.Event) -> tuple[int, int]:
        async with open_redis(store_url, namespace) as store:
            reader = asyncio.create_task(store.read_inbox(StoreKeys(namespace).inbox("p"), lambda notes: None, begun.set))
            try:
                await begun.wait()
                return connections(), in_a_child(connections)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    with asyncio.Runner(loop_factory=IoLoop) as runner:
        here, in_the_child = runner.run(count(asyncio.Event()))
    assert here >= 3 and in_the_child == 0
