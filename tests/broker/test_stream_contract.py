"""What both stores promise of streams: the same tests on the one in memory and on Redis."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqserve.broker.envelope import mint_id
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.redis.store import open_redis
from mqserve.broker.store import Place, Refusal, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.streaming import START, append_of, appended, frames_of, told
from tests.broker.test_store_contract import reading, result
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


async def test_frames_stand_in_order_under_the_numbers_they_were_given(store: Store, keys: StoreKeys) -> None:
    assert await appended(store, append_of(keys, 1, b"a", b"")) == 2
    assert await appended(store, append_of(keys, 3, b"c")) == 3
    assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b""), (1, 3, b"c")]
    assert await store.last_of_stream(keys.stream("f")) == 3


async def test_a_stream_that_is_not_there_has_nothing(store: Store, keys: StoreKeys) -> None:
    assert await store.read_stream(keys.stream("f"), START) == []
    assert await store.last_of_stream(keys.stream("f")) == 0


async def test_a_reader_gets_as_many_as_it_asks_for_behind_the_place_it_names(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, *(b"%d" % number for number in range(1, 6))))
    entries = await store.read_stream(keys.stream("f"), Place(1, 2), count=2)
    assert entries == [(Place(1, 3), b"3"), (Place(1, 4), b"4")]
    assert await store.read_stream(keys.stream("f"), Place(1, 5)) == []


async def test_each_reader_is_told_of_each_frame_and_then_of_the_end(store: Store, keys: StoreKeys) -> None:
    inboxes = (keys.inbox("p"), keys.inbox("q"))
    async with reading(store, inboxes[0]) as ours, reading(store, inboxes[1]) as theirs:
        await appended(store, append_of(keys, 1, b"a", b"b" * 70_000, inboxes=inboxes))
        await appended(store, append_of(keys, 3, b"", inboxes=inboxes, ends=b"over", end_note=b"end"))
        await until(lambda: b"end" in ours and b"end" in theirs)
    for notes in (ours, theirs):
        assert told(notes) == [("f", 1, b"a"), ("f", 2, b"b" * 70_000), ("f", 3, b""), b"end"]
    assert await store.get(keys.future("f")) == b"over"


@pytest.mark.parametrize("lost", [False, True])
async def test_an_end_alone_from_the_first_number_is_recorded_whatever_the_stream_has(store: Store, keys: StoreKeys, lost: bool) -> None:
    """As of an answer that is given up."""
    ours = append_of(keys, 1, inboxes=(keys.inbox("p"),), claim=b"later run", attempt=2, ends=b"over", end_note=b"end")
    async with reading(store, keys.inbox("p")) as notes:
        await appended(store, append_of(keys, 1, b"a", b"b", b"c", claim=b"later run"))
        if lost:
            await store.delete(keys.stream("f"))
        frames = await frames_of(store, keys)
        assert await appended(store, msgspec.structs.replace(ours, claim=b"run")) is Refusal.TAKEN
        assert await store.get(keys.future("f")) is None and not notes
        assert isinstance(await appended(store, ours), int)
        assert await store.get(keys.future("f")) == b"over" and await frames_of(store, keys) == frames
        await until(lambda: notes == [b"end"])


async def test_a_thousand_frames_of_one_append_are_all_told(store: Store, keys: StoreKeys) -> None:
    frames = [b"%d" % number for number in range(1, 1001)]
    async with reading(store, keys.inbox("p")) as notes:
        assert await appended(store, append_of(keys, 1, *frames, inboxes=(keys.inbox("p"),))) == 1000
        await until(lambda: len(notes) == 1000)
    assert told(notes) == [("f", number, frame) for number, frame in enumerate(frames, 1)]


async def test_numbers_of_all_sizes_are_told(store: Store, keys: StoreKeys) -> None:
    firsts = [1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32]
    async with reading(store, keys.inbox("p")) as notes:
        for first in firsts:
            assert await appended(store, append_of(keys, first, b"x", inboxes=(keys.inbox("p"),), trim_to=first - 1)) == first
        await until(lambda: len(notes) == len(firsts))
    assert told(notes) == [("f", first, b"x") for first in firsts]


async def test_streams_of_one_turn_are_all_written(store: Store, keys: StoreKeys) -> None:
    names = [str(number) for number in range(300)]
    outcomes = await asyncio.gather(*(appended(store, append_of(keys, 1, name.encode(), id=name)) for name in names))
    assert set(outcomes) == {1}
    assert [await frames_of(store, keys, name) for name in names] == [[(1, 1, name.encode())] for name in names]


async def test_what_the_stream_has_already_is_passed_over(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b"))
    assert await appended(store, append_of(keys, 2, b"again", b"c")) == 3
    assert await appended(store, append_of(keys, 1, b"again")) == 3
    assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b"), (1, 3, b"c")]


async def test_a_run_that_is_not_the_owner_writes_nothing(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a"))
    assert await store.replace(keys.owner("f"), b"run", b"later run")
    async with reading(store, keys.inbox("p")) as notes:
        late = append_of(keys, 2, b"b", inboxes=(keys.inbox("p"),), ends=b"over", end_note=b"end", trim_to=1)
        assert await appended(store, late) is Refusal.TAKEN
        assert await appended(store, append_of(keys, 2, b"c", claim=b"later run", attempt=2, inboxes=(keys.inbox("p"),))) == 2
        await until(lambda: notes)
    assert told(notes) == [("f", 2, b"c")]
    assert await frames_of(store, keys) == [(1, 1, b"a"), (2, 2, b"c")]
    assert await store.get(keys.future("f")) is None


async def test_nothing_is_written_behind_a_result(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a"))
    await store.record(result(keys.future("f"), b"cancelled"))
    assert await appended(store, append_of(keys, 2, b"b")) is Refusal.ENDED
    assert await appended(store, append_of(keys, 2, b"b", ends=b"over", end_note=b"end")) is Refusal.ENDED
    assert await frames_of(store, keys) == [(1, 1, b"a")]
    assert await store.get(keys.future("f")) == b"cancelled"


async def test_an_end_that_is_repeated_succeeds_and_is_told_again(store: Store, keys: StoreKeys) -> None:
    end = append_of(keys, 1, b"a", ends=b"over", end_note=b"end", inboxes=(keys.inbox("p"),))
    async with reading(store, keys.inbox("p")) as notes:
        assert [await appended(store, end) for _ in range(2)] == [1, 1]
        await until(lambda: len(notes) == 4)
    assert await frames_of(store, keys) == [(1, 1, b"a")]


async def test_a_run_that_was_taken_over_cannot_take_the_stream_back_by_repeating_its_end(store: Store, keys: StoreKeys) -> None:
    end = append_of(keys, 1, b"a", ends=b"over", end_note=b"end")
    await appended(store, end)
    await store.set(keys.owner("f"), b"later run")
    await appended(store, end)
    assert await store.get(keys.owner("f")) == b"later run"


async def test_frames_up_to_a_number_are_removed_and_the_numbers_go_on(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b", b"c"))
    assert await appended(store, append_of(keys, 4, b"d", trim_to=2)) == 4
    assert await frames_of(store, keys) == [(1, 3, b"c"), (1, 4, b"d")]
    assert await appended(store, append_of(keys, 5, trim_to=4)) == 4
    assert await frames_of(store, keys) == []
    assert await store.last_of_stream(keys.stream("f")) == 4
    assert await appended(store, append_of(keys, 5, b"e", trim_to=4)) == 5


async def test_what_an_earlier_run_wrote_and_nobody_has_taken_is_not_removed(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b", b"c"))
    await store.delete(keys.owner("f"))

    async def later(first: int, *frames: bytes, trim_to: int) -> int | Refusal:
        return await appended(store, append_of(keys, first, *frames, claim=b"later run", attempt=3, trim_to=trim_to))

    assert await later(4, b"d", trim_to=1) == 4
    assert await frames_of(store, keys) == [(1, 2, b"b"), (1, 3, b"c"), (3, 4, b"d")]
    assert await later(5, b"e", trim_to=3) == 5
    assert await frames_of(store, keys) == [(3, 4, b"d"), (3, 5, b"e")]
    assert await later(6, trim_to=4) == 5
    assert await frames_of(store, keys) == [(3, 5, b"e")]


async def test_a_later_run_passes_over_what_the_earlier_one_wrote(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b"))
    await store.delete(keys.owner("f"))
    assert await appended(store, append_of(keys, 1, b"A", b"B", b"C", claim=b"later run", attempt=2)) == 3
    assert await frames_of(store, keys) == [(1, 1, b"a"), (1, 2, b"b"), (2, 3, b"C")]


@pytest.mark.parametrize("more", [(), (b"c",)], ids=["the end alone", "a frame and the end"])
async def test_nothing_is_written_behind_a_gap_and_the_end_of_the_stream_is_said(
    store: Store, keys: StoreKeys, more: tuple[bytes, ...]
) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b"))
    await store.delete(keys.stream("f"))
    assert await appended(store, append_of(keys, 3, *more, ends=b"over", end_note=b"end")) == 0
    assert (await frames_of(store, keys), await store.get(keys.future("f"))) == ([], None)
    assert await appended(store, append_of(keys, 1, b"a", b"b", *more, ends=b"over", end_note=b"end")) == 2 + len(more)
    assert len(await frames_of(store, keys)) == 2 + len(more)


async def test_what_its_readers_have_taken_is_no_gap(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", b"b", b"c"))
    await store.delete(keys.stream("f"))
    assert await appended(store, append_of(keys, 4, b"d", trim_to=2)) == 2
    assert await appended(store, append_of(keys, 3, b"c", b"d", trim_to=2)) == 4
    assert await frames_of(store, keys) == [(1, 3, b"c"), (1, 4, b"d")]


async def test_a_stream_and_its_owner_expire_and_each_append_renews_them(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a", ttl_ms=100))
    await appended(store, append_of(keys, 1, b"a", ttl_ms=100, id="witness"))
    await appended(store, append_of(keys, 2, b"b"))

    async def is_over() -> bool:
        return await store.get(keys.owner("witness")) is None

    await until(is_over)
    assert await frames_of(store, keys, "witness") == []
    assert await store.last_of_stream(keys.stream("witness")) == 0
    assert (await store.get(keys.owner("f")), len(await frames_of(store, keys))) == (b"run", 2)


async def test_an_owner_that_was_lost_is_there_again_after_the_next_append(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a"))
    await store.delete(keys.owner("f"))
    await appended(store, append_of(keys, 2, b"b"))
    assert await store.get(keys.owner("f")) == b"run"
    assert await appended(store, append_of(keys, 3, b"c", claim=b"another")) is Refusal.TAKEN


async def test_a_reader_drops_a_stream_when_it_has_read_it(store: Store, keys: StoreKeys) -> None:
    await appended(store, append_of(keys, 1, b"a"))
    for key in (keys.stream("f"), keys.owner("f")):
        store.drop_soon(key)

    async def is_gone() -> bool:
        return not await frames_of(store, keys) and await store.get(keys.owner("f")) is None

    await until(is_gone)


async def test_what_is_posted_reaches_the_one_who_reads_the_list_in_order(store: Store, keys: StoreKeys) -> None:
    async with reading(store, keys.feed("r")) as credits:
        store.post(keys.feed("another"), b"for another")
        for number in range(100):
            store.post(keys.feed("r"), b"%d" % number)
        await until(lambda: len(credits) == 100)
    assert credits == [b"%d" % number for number in range(100)]


# Any sequence of appends, against a model.


@dataclass(frozen=True)
class Step:
    """An append of a run, `back` frames before the one after the last that was written; or a take-over, or a loss, before it."""

    run: int
    back: int
    frames: int
    give_up: int  # how many frames before the append's last one are not given up; more than there are: none is
    takes_over: bool
    loses: str  # stream, owner, or neither
    ends: bool


@dataclass
class Model:
    """What the contract says, in the plainest words."""

    entries: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    last: int = 0
    attempt: int = 0
    owner: int | None = None
    ended_by: int | None = None
    given_up: int = 0

    def append(self, run: int, first: int, frames: list[bytes], trim_to: int, ends: bool) -> int | Refusal:
        if self.ended_by is not None:
            return first - 1 + len(frames) if ends and self.ended_by == run else Refusal.ENDED
        if self.owner not in (None, run):
            return Refusal.TAKEN
        if max(self.last, trim_to) < first - 1:
            return max(self.last, trim_to)
        self.owner = run
        for number, frame in enumerate(frames, first):
            if number > self.last:
                self.last, self.attempt = number, max(run, self.attempt)
                self.entries[number] = (self.attempt, frame)
        self.entries = {number: entry for number, entry in self.entries.items() if number > trim_to}
        self.ended_by = run if ends else None
        return max(self.last, trim_to, first - 1 + len(frames))

    def lose(self, what: str) -> None:
        if what == "stream":
            self.entries, self.last, self.attempt = {}, 0, 0
        elif what == "owner":
            self.owner = None


steps = st.builds(
    Step,
    run=st.integers(1, 3),
    back=st.sampled_from([0, 0, 0, 1, 2, 5]),
    frames=st.integers(0, 4),
    give_up=st.sampled_from([0, 1, 3, 99, 99]),
    takes_over=st.booleans(),
    loses=st.sampled_from(["", "", "", "stream", "owner"]),
    ends=st.sampled_from([False] * 9 + [True]),
)


async def take(store: Store, keys: StoreKeys, program: list[Step], name: str) -> None:
    model, sent, newest = Model(), 0, 0
    for number, step in enumerate(program):
        if step.loses:
            await store.delete({"stream": keys.stream(name), "owner": keys.owner(name)}[step.loses])
            model.lose(step.loses)
        newest = max(newest, step.run)
        if step.run == newest and step.takes_over:
            await store.set(keys.owner(name), b"run %d" % step.run)
            model.owner = step.run
        if step.run < newest and model.owner is None:
            continue  # attempts rise: where the owner was lost, nothing tells the store that this run is not the newest
        first = max(1, sent + 1 - (step.back if step.frames else 0))
        frames = [b"frame %d.%d" % (number, part) for part in range(step.frames)]
        trim_to = max(0, first - 1 + len(frames) - step.give_up)
        ends = b"end of run %d" % step.run if step.ends else b""
        append = append_of(keys, first, *frames, id=name, claim=b"run %d" % step.run, attempt=step.run, trim_to=trim_to, ends=ends)
        outcome = await appended(store, append)
        assert outcome == model.append(step.run, first, frames, trim_to, step.ends), (number, step)
        sent = outcome if isinstance(outcome, int) else sent
        assert await frames_of(store, keys, name) == [(attempt, seq, frame) for seq, (attempt, frame) in sorted(model.entries.items())]


def test_any_sequence_of_appends_does_what_the_contract_says(form: str, request: pytest.FixtureRequest, namespace: str) -> None:
    keys, opened = StoreKeys(namespace), AsyncExitStack()

    async def open_store() -> Store:
        if form == "embedded":
            return EmbeddedStore()
        return await opened.enter_async_context(open_redis(request.getfixturevalue("store_url"), namespace))

    with asyncio.Runner() as runner:
        store = runner.run(open_store())

        @settings(max_examples=300, deadline=None, database=None, derandomize=True)
        @given(st.lists(steps, min_size=1, max_size=12))
        def check(program: list[Step]) -> None:
            runner.run(take(store, keys, program, mint_id()))

        try:
            check()
        finally:
            runner.run(opened.aclose())
