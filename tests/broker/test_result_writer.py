"""Results on their way to the store: whoever waits for one hears what becomes of it, whatever that is."""

import asyncio
from collections.abc import Sequence

import pytest

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.redis.result_writer import Mark, ResultWriter
from mqserve.broker.store import Record

pytestmark = pytest.mark.anyio


class Writing:
    """What the store makes of the next calls: each raises, or hangs, or writes."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.hangs = asyncio.Event()

    async def results(self, records: Sequence[Record]) -> list[int]:
        if not self.outcomes:
            await self.hangs.wait()
        if (outcome := self.outcomes.pop(0)) is not None:
            raise outcome
        return [1] * len(records)

    async def marks(self, marks: Sequence[Mark]) -> None:
        pass


def writer(writing: Writing) -> ResultWriter:
    return ResultWriter(writing.results, writing.marks, lambda: 0)


def record(name: str) -> Record:
    return Record(name, b"value", "", b"", 1000)


async def test_a_result_that_a_store_did_not_take_is_written_again() -> None:
    assert await writer(Writing(StoreUnavailable("away"), None)).record(record("a")) is True


async def test_an_error_that_nobody_foresaw_is_told_to_those_it_concerns_and_the_next_are_written() -> None:
    results = writer(Writing(ZeroDivisionError("odd"), None))
    with pytest.raises(ZeroDivisionError):
        await results.record(record("a"))
    assert await results.record(record("b")) is True


async def test_what_is_not_written_by_the_end_is_said_to_be_lost() -> None:
    results = writer(Writing())
    under_way = results.record(record("a"))
    await asyncio.sleep(0)
    waits = results.record(record("b"))
    await results.close(0.05)
    assert under_way.cancelled() and waits.cancelled()
