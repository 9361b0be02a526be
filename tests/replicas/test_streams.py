"""The replica's side of streamed answers: what generators yield comes to a reader, in order and as it is made."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.streams import Form
from tests.broker.traffic import until
from tests.replicas.streaming import EVENTS, Reader, Serving

pytestmark = pytest.mark.anyio


class Place:
    def __init__(self) -> None:
        self.queue, self.store = EmbeddedQueue(), EmbeddedStore()

    def serve(self, target: Any, **config: Any) -> Serving:
        return Serving(target, self.queue, self.store, **config)

    def reader(self, name: str = "reader") -> Reader:
        return Reader(self.queue, self.store, name)


@pytest.fixture
def place() -> Place:
    return Place()


def counts(request: Any) -> Iterator[str]:
    for number in range(5):
        yield f"{number} "


async def counts_async(request: Any) -> AsyncIterator[str]:
    for number in range(5):
        await asyncio.sleep(0)
        yield f"{number} "


async def returns_one(request: Any) -> AsyncIterator[str]:
    return counts_async(request)


@pytest.mark.parametrize("handler", [counts, counts_async, returns_one, lambda request: counts(request)])
@pytest.mark.parametrize("config", [{}, {"sync_threads": 3}])
async def test_the_chunks_of_a_generator_come_in_order_and_then_the_end(place: Place, handler: Any, config: dict[str, Any]) -> None:
    async with place.serve(handler, **config) as serving:
        reader = await place.reader().ask()
        result = await reader.end()
        assert reader.body == b"0 1 2 3 4 " and result.frames == 5 and result.error is None and not result.body
        assert reader.head is not None
        assert reader.head.content_type == "text/plain; charset=utf-8" and reader.head.form is Form.BODY and not reader.head.resumable
        await until(serving.is_settled)


async def test_the_first_chunk_is_there_before_the_second_is_made(place: Place) -> None:
    go_on = threading.Event()

    def handler(request: Any) -> Iterator[str]:
        yield "first"
        assert go_on.wait(30)
        yield "second"

    async with place.serve(handler):
        reader = await place.reader().ask()
        await until(lambda: reader.body == b"first")
        go_on.set()
        await reader.end()
        assert reader.body == b"firstsecond"


async def test_events_are_one_chunk_an_item(place: Place) -> None:
    def handler(request: Any) -> Iterator[Any]:
        yield from ["", "text", {"a": 1}, b"bytes", None]

    async with place.serve(handler):
        reader = await place.reader().ask(meta=EVENTS)
        await reader.end()
        assert reader.head is not None and reader.head.form is Form.ITEMS and reader.head.resumable
        assert [frame.data for _, frame in sorted(reader.frames.items())] == [b"", b"", b"text", b'{"a":1}', b"bytes", b"null"]
