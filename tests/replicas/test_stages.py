"""The stages of a request in a replica: every move of the table is made, no other one is, and nothing stays held whatever is raised."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from mqserve.broker.backoff import keep_running
from mqserve.broker.calls.cancellations import notice_of_request
from mqserve.broker.envelope import Envelope
from mqserve.broker.errors import BrokerUnavailable, StoreUnavailable
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.tasks import Tasks
from mqserve.broker.results import Result
from mqserve.broker.store import OnRecorded, Record
from mqserve.broker.store_keys import StoreKeys
from mqserve.replicas import settlement
from mqserve.replicas.settlement import Settlement
from mqserve.replicas.stages import MOVES, Job, Stage, WrongMove
from tests.broker.traffic import publish, until
from tests.replicas.parts import MINTED, Serving, minted, request

pytestmark = pytest.mark.anyio

Move = tuple[Stage, Stage]
TABLE = {(stage, after) for stage, followers in MOVES.items() for after in followers}


class HangingStore(EmbeddedStore):
    """Records nothing until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self._tasks = Tasks()

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        self._tasks.start(self._record_later(record, on_recorded))

    async def _record_later(self, record: Record, on_recorded: OnRecorded) -> None:
        await self.go_on.wait()
        super().record_then(record, on_recorded)


class LosingStore(EmbeddedStore):
    """Cannot record the first result."""

    def __init__(self) -> None:
        super().__init__()
        self._lost = False

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        if self._lost:
            return super().record_then(record, on_recorded)
        self._lost = True
        on_recorded(StoreUnavailable("away"))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Move]]:
    """The moves that are made."""
    made: set[Move] = set()
    move = Job.move

    def noted(job: Job, stage: Stage) -> None:
        before = job.stage
        move(job, stage)
        made.add((before, stage))
        if before is Stage.RUNNING:  # the worker's thread makes that move, by a field
            made.add((Stage.ADMITTED, Stage.RUNNING))

    monkeypatch.setattr(Job, "move", noted)
    yield made


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "GIVE_BACK_AFTER_S", 0.01)


async def held(serving: Serving) -> None:
    await until(lambda: serving.server.running == 1)


async def answered() -> None:
    async with Serving() as serving:
        await serving.send(minted())
        serving.end(await serving.taken(), Result())
        await serving.settled()


async def cancelled_before_it_ran() -> None:
    async with Serving() as serving:
        await serving.store.append_log(StoreKeys("tests").cancelled, notice_of_request(MINTED))
        await until(lambda: bool(serving.server._giving_up._cancellations))
        await serving.send(minted())
        await serving.settled()


async def refused() -> None:
    async with Serving() as serving:
        await serving.send(request(body=b"{", content_type="application/json"))
        await serving.settled()


async def a_copy_of_one_that_runs() -> None:
    async with Serving(generations=(1, 2)) as serving:
        assert await publish(serving.queue, minted()) is None
        await serving.taken()
        await held(serving)
        await serving.server.drain(0)


async def late_in_the_worker() -> None:
    async with Serving() as serving:
        await serving.send(minted())
        job = await serving.taken()
        job.deadline = 0.0
        serving.server.on_done(job, Result())
        await serving.settled()


async def withdrawn() -> None:
    async with Serving() as serving:
        await serving.send(minted())
        await serving.taken()
        await serving.server.drain(0)


async def given_back_while_it_ran() -> None:
    async with Serving() as serving:
        await serving.send(minted())
        (await serving.taken()).started = 1.0
        await serving.server.drain(0)


async def result_not_stored() -> None:
    async with Serving(store=LosingStore()) as serving:
        await serving.send(minted())
        serving.end(await serving.taken(), Result())
        serving.end(await serving.taken(), Result())
        await serving.settled()


async def returned_while_the_store_was_away() -> None:
    store = HangingStore()
    async with Serving(store=store) as serving:
        await serving.send(minted())
        serving.end(await serving.taken(), Result())
        serving.server._consumers.paused = True  # as after some seconds
        assert not serving.server._settle_unstored() and serving.server.running == 0
        store.go_on.set()
        await until(serving.server._settle_unstored)


async def abandoned(started: float | None) -> None:
    """By a replica that dies with the request in the worker, or, with None, while it is looked up."""

    class SlowStore(EmbeddedStore):
        async def get(self, key: str) -> bytes | None:
            await asyncio.sleep(60)
            return None

    async with Serving(store=SlowStore()) as serving:
        await serving.send(minted(again=started is None))
        await held(serving)
        if started is not None:
            (await serving.taken()).started = started
        await serving.server.abandon()
        assert serving.server.running == 0


async def test_every_move_of_the_table_is_made_and_no_other_one(moved: set[Move]) -> None:
    for life in (
        answered, cancelled_before_it_ran, refused, a_copy_of_one_that_runs, late_in_the_worker, withdrawn, given_back_while_it_ran,
        result_not_stored, returned_while_the_store_was_away,
    ):  # fmt: skip
        await life()
    for started in (None, 0.0, 1.0):
        await abandoned(started)
    assert moved == TABLE


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("after", Stage)
async def test_a_move_that_is_not_in_the_table_is_refused(stage: Stage, after: Stage) -> None:
    job = Job(request(), 1, Any, _stage=Stage.ADMITTED if stage is Stage.RUNNING else stage, started=float(stage is Stage.RUNNING))  # type: ignore[arg-type]
    assert job.stage is stage
    if after in MOVES[stage]:
        job.move(after)
    else:
        with pytest.raises(WrongMove, match=f"{stage.value} cannot be {after.value}"):
            job.move(after)


# Exceptions that nobody foresaw.


class Bug(Exception):
    """One of ours."""


def fails(*_: Any, **__: Any) -> Any:
    raise Bug("injected")


async def fails_later(*_: Any, **__: Any) -> Any:
    raise Bug("injected")


Break = Callable[[Serving, pytest.MonkeyPatch], None]


def broken(find: Callable[[Serving], Any], name: str, how: Callable[..., Any] = fails) -> Break:
    return lambda serving, patch: patch.setattr(find(serving), name, how)


STEPS: dict[str, Break] = {
    "reading it": broken(lambda serving: serving.server._reading._trust, "check_header"),
    "looking at it": broken(lambda serving: serving.server._admission, "check_keys"),
    "looking it up": broken(lambda serving: serving.server._admission, "admit", fails_later),
    "asking the store": broken(lambda serving: serving.store, "get", fails_later),
    "giving it to the worker": broken(lambda serving: serving.server._turns, "submit"),
    "counting it": broken(lambda serving: serving.server._metrics, "done"),
    "storing its result": broken(lambda serving: serving.store, "record"),
    "the store's own task": broken(lambda serving: serving.store, "record", lambda record: asyncio.ensure_future(fails_later())),
    "replying": broken(lambda serving: serving.queue, "reply"),
    "acking it": broken(lambda serving: Settlement, "_answered"),
}


async def send_and_run(serving: Serving, envelope: Envelope) -> None:
    """Whatever comes to the worker is run, until nothing is left."""

    async def is_settled() -> bool:
        for job in serving.worker.jobs[:]:
            serving.end(job, Result())
        return not await serving.queue.depth("b", 1) and not serving.server.running

    await serving.send(envelope)
    await until(is_settled)


@pytest.mark.parametrize("step", STEPS)
async def test_a_bug_at_any_step_leaves_no_request_held_and_the_second_time_it_is_set_aside(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Serving() as serving:
        with monkeypatch.context() as patch:
            STEPS[step](serving, patch)
            await send_and_run(serving, request(reply_to="caller"))
            async with serving.queue.dead_letters("b") as letters:
                (letter,) = [letter async for letter in letters]
                assert letter.id == "order-17" and "injected" in letter.death.reason
        serving.worker.jobs.clear()
        await send_and_run(serving, minted())  # and it serves on


@pytest.mark.parametrize("step", ["unmarking it", "dead-lettering it"])
async def test_a_bug_on_the_way_back_leaves_no_request_held(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Serving() as serving:
        with monkeypatch.context() as patch:
            if step == "unmarking it":
                patch.setattr(serving.server._admission, "unmark", fails_later)
                await serving.send(minted())
                (await serving.taken()).mark = b"a mark"
                await serving.server.drain(0)
            else:
                patch.setattr(serving.queue, "dead_letter", fails)
                await serving.send(request(body=b"{", content_type="application/json"))
                await held(serving)
            await until(lambda: serving.server.running == 0)
        assert await serving.queue.depth("b", 1) == 1 or serving.server.running  # it is there again


async def test_a_listener_that_dies_of_a_bug_is_started_again() -> None:
    ends: list[Callable[[], Awaitable[None]]] = [fails_later, fails_later]
    lives = asyncio.Event()

    async def listen() -> None:
        if ends:
            await ends.pop()()
        lives.set()
        await asyncio.sleep(60)

    listening = asyncio.create_task(keep_running("a test's listener", listen))
    async with asyncio.timeout(5):
        await lives.wait()
    listening.cancel()


async def test_cancellations_are_heard_again_after_a_bug_in_what_was_told_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class LogThatFailsOnce(EmbeddedStore):
        failed = False

        async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
            if not self.failed:
                self.failed = True
                raise Bug("injected")
            await super().read_log(key, on_entries)

    async with Serving(store=LogThatFailsOnce()) as serving:
        await serving.store.append_log(StoreKeys("tests").cancelled, notice_of_request(MINTED))
        await until(lambda: bool(serving.server._giving_up._cancellations))
        await serving.send(minted())
        await serving.settled()
        assert not serving.worker.jobs


async def test_what_the_broker_does_not_take_is_tried_again_and_is_no_bug() -> None:
    class QueueThatIsAway(EmbeddedQueue):
        times = 1

        def reply(self, envelope: Envelope, reply_to: str, settled: Any) -> None:
            self.times -= 1
            settled(BrokerUnavailable("away") if self.times >= 0 else None)

    async with Serving(QueueThatIsAway()) as serving:
        await send_and_run(serving, request(reply_to="caller"))
        async with serving.queue.dead_letters("b") as letters:
            assert not [letter async for letter in letters]
