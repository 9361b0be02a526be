"""Results on their way to the store: whoever waits for one hears what becomes of it, whatever that is."""

import asyncio
from collections.abc import Sequence

import pytest

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.redis.batch_writer import FLUSH_BYTES
from mqserve.broker.redis.result_writer import EARLY_BATCH, Mark, OnWritten, Post, ResultWriter
from mqserve.broker.store import Record
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


class Writing:
    """What the store makes of the next batches: an error, or they are written; after the last outcome it hangs."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.batches: list[tuple[list[str], list[str]]] = []  # names of results, keys of marks

    def write(self, records: Sequence[Record], marks: Sequence[Mark], posts: Sequence[Post], on_written: OnWritten) -> None:
        self.batches.append(([record.key for record in records], [mark[0] for mark in marks]))
        if self.outcomes:
            asyncio.get_running_loop().call_soon(on_written, self.outcomes.pop(0) or [1] * len(records))


def writer(writing: Writing) -> ResultWriter:
    return ResultWriter(writing.write, lambda: 0)


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
    writing = Writing()
    results = writer(writing)
    under_way = results.record(record("a"))
    await until(lambda: writing.batches)
    waits = results.record(record("b"))
    await results.close(0.05)
    assert under_way.cancelled() and waits.cancelled()
    assert results.record(record("c")).cancelled()


async def test_what_comes_in_one_turn_leaves_in_one_batch_and_what_comes_meanwhile_in_the_next() -> None:
    writing = Writing(None, None)
    results = writer(writing)
    results.mark("m", b"1", 1000)
    first = [results.record(record("a")), results.record(record("b"))]
    await until(lambda: writing.batches)
    await asyncio.gather(*first, results.record(record("c")))
    assert writing.batches == [(["a", "b"], ["m"]), (["c"], [])]


async def test_many_results_leave_before_their_turn_ends_and_the_rest_when_these_are_written() -> None:
    writing = Writing(None, None)
    results = writer(writing)
    names = [f"r{number}" for number in range(EARLY_BATCH + 2)]
    written = [results.record(record(name)) for name in names]
    early, rest = names[:EARLY_BATCH], names[EARLY_BATCH:]
    assert writing.batches == [(early, [])]
    assert await asyncio.gather(*written) == [True] * len(names)
    assert writing.batches == [(early, []), (rest, [])]


async def test_results_that_left_early_and_were_not_taken_wait_for_their_next_try() -> None:
    writing = Writing(StoreUnavailable("away"))
    results = writer(writing)
    written = [results.record(record(str(number))) for number in range(EARLY_BATCH)]
    await until(lambda: "PAUSING" in repr(results))
    await asyncio.sleep(0)  # the end of the turn in which they came
    assert len(writing.batches) == 1
    writing.outcomes.append(None)
    assert await asyncio.gather(*written) == [True] * EARLY_BATCH


async def test_posts_leave_in_their_order_and_in_batches_that_the_store_takes_in_time() -> None:
    sent: list[list[bytes]] = []

    def write(records: Sequence[Record], marks: Sequence[Mark], posts: Sequence[Post], on_written: OnWritten) -> None:
        sent.append([entry for _, entry in posts])
        asyncio.get_running_loop().call_soon(on_written, [])

    results = ResultWriter(write, lambda: 0)
    entries = [bytes([number]) * 64 * 1024 for number in range(150)]
    for entry in entries:
        results.post("inbox", entry)
    await until(lambda: "IDLE" in repr(results))
    assert [entry for batch in sent for entry in batch] == entries
    assert max(sum(map(len, batch)) for batch in sent) <= FLUSH_BYTES and len(sent) == 3


async def test_a_batch_that_cannot_be_packed_is_told_to_those_it_concerns() -> None:
    def write(records: Sequence[Record], marks: Sequence[Mark], posts: Sequence[Post], on_written: OnWritten) -> None:
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    with pytest.raises(UnicodeEncodeError):
        await ResultWriter(write, lambda: 0).record(record("a"))


async def test_a_reader_that_raises_keeps_no_outcome_from_the_others() -> None:
    def broken(outcome: bool | Exception) -> None:
        raise ZeroDivisionError("a bug of the reader")

    results = writer(Writing(None, None))
    results.record_then(record("a"), broken)
    assert await results.record(record("b")) is True
    assert await results.record(record("c")) is True
