"""Clients that go away before their answer: which of them are noticed, and what watching them costs."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest

from mqserve.proxy.departures import WATCHED_AFTER_S, Departures
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


class Connection:
    """A client's: `receive` answers once it has gone, or with a part of the body as long as a middleware has any."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = list(parts)
        self._gone = asyncio.Event()
        self.asked = 0

    def go(self) -> None:
        self._gone.set()

    async def receive(self) -> MutableMapping[str, Any]:
        self.asked += 1
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop()}
        await self._gone.wait()
        return {"type": "http.disconnect"}


class Watched(Departures):
    """Notes who has gone."""

    def __init__(self) -> None:
        self.gone: list[str] = []
        super().__init__(self.gone.append)


@pytest.fixture
async def departures() -> AsyncIterator[Watched]:
    departures = Watched()
    watching = asyncio.create_task(departures.watch_forever())
    yield departures
    assert not watching.done(), "nothing that a client does ends the watch"
    watching.cancel()


async def test_a_client_that_goes_while_its_request_waits_is_noticed_once(departures: Watched) -> None:
    client, other = Connection(), Connection()
    departures.expect("a", client.receive)
    departures.expect("b", other.receive)
    client.go()
    await until(lambda: departures.gone)
    await until(lambda: other.asked)
    assert departures.gone == ["a"]


async def test_a_request_that_is_answered_soon_is_never_watched(departures: Watched) -> None:
    soon, later = Connection(), Connection()
    departures.expect("a", soon.receive)
    departures.expect("b", later.receive)
    departures.forget("a")
    await until(lambda: later.asked)  # the older of the two would have been asked by now
    assert not soon.asked


async def test_a_client_that_goes_after_its_answer_is_nobodys_concern(departures: Watched) -> None:
    client, next_one = Connection(), Connection()
    departures.expect("a", client.receive)
    await until(lambda: client.asked)
    departures.forget("a")
    client.go()
    departures.expect("b", next_one.receive)
    next_one.go()
    await until(lambda: departures.gone)
    assert departures.gone == ["b"]


async def test_a_middleware_that_hands_out_the_body_again_does_not_look_like_a_departure(departures: Watched) -> None:
    client = Connection(b"again", b"and again")
    departures.expect("a", client.receive)
    await until(lambda: client.asked == 3)
    assert departures.gone == []
    client.go()
    await until(lambda: departures.gone == ["a"])


@pytest.mark.parametrize("error", [ValueError("a middleware's own"), SystemExit(3)])
async def test_what_a_middleware_raises_leaves_the_request_and_the_others_as_they_are(
    departures: Watched, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    async def receive() -> MutableMapping[str, Any]:
        raise error

    client = Connection()
    departures.expect("a", receive)
    departures.expect("b", client.receive)
    client.go()
    await until(lambda: departures.gone == ["b"])
    assert "its request runs to its end" in caplog.text
    departures.forget("a")


async def test_requests_are_watched_in_the_order_of_their_arrival_once_they_have_waited(departures: Watched) -> None:
    loop = asyncio.get_running_loop()
    clients = [Connection() for _ in range(50)]
    began = loop.time()
    for number, client in enumerate(clients):
        departures.expect(str(number), client.receive)
        client.go()
    await until(lambda: len(departures.gone) == len(clients))
    assert loop.time() - began >= WATCHED_AFTER_S
    assert departures.gone == [str(number) for number in range(50)]


async def test_a_proxy_without_requests_is_not_woken(departures: Watched) -> None:
    client = Connection()
    departures.expect("a", client.receive)
    departures.forget("a")
    await until(lambda: not departures._some.is_set())  # it waits for the next request, with no timer
    departures.expect("b", client.receive)
    client.go()
    await until(lambda: departures.gone == ["b"])
