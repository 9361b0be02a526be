"""The outbox: what follows from the ends of jobs is done once for each, in spite of leaders that die, and no entry holds up another."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import pytest
from msgspec.structs import replace

from mqserve.broker.calls.job_sending import JobSender, JobTerms
from mqserve.broker.envelope import Envelope, RequestHead, Stage
from mqserve.broker.errors import BadEnvelope, BrokerUnavailable
from mqserve.broker.job_store import PlacedEnd
from mqserve.broker.jobs import EndNote, JobEnd, JobRecord, JobState, Sequel
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.overload import HeldBytes
from mqserve.broker.pipelines import VERSION, Plan, Stages, stage_id
from mqserve.broker.queue import Consumption, Delivery
from mqserve.broker.results import ErrorInfo, Result, entry_of
from mqserve.broker.settings import Settings
from mqserve.broker.store import Store, recorded
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.carried import read_carried
from mqserve.broker.values.codecs import encode_value
from mqserve.broker.values.signing import MIN_KEY_BYTES, SealScope, Signer
from mqserve.controller.job_duties import JobDuties
from mqserve.controller.lease import Leader
from mqserve.controller.next_stages import NextStages
from mqserve.controller.outbox import Outbox, Send
from mqserve.controller.sequels import Sequels
from mqserve.controller.state.documents import Backend, Desired, Endpoint
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio

T = TypeVar("T")

SIGNER = Signer([b"k" * MIN_KEY_BYTES], "tests")
STAGES = ("one", "two", "three")
DESIRED = Desired(
    backends={name: Backend(name, "", name) for name in STAGES},
    endpoints={
        **{name: Endpoint(name, None, (), {name: 1.0}) for name in STAGES},
        "p": Endpoint("p", None, (), {}, stages=STAGES),
    },
)
PIPELINE = "a" * 32


async def end(store: Store, job_id: str, *, callback: str = "https://hooks.example/", result: bytes = b"result", **fields: object) -> None:
    one = JobEnd(job_id, result, b"note", JobState.SUCCEEDED, 200, "b", store.now_ms(), 60_000, endpoint="e", callback=callback)
    await recorded(store.jobs.end_then, replace(one, **fields))


@asynccontextmanager
async def reading(store: Store, keys: StoreKeys, send: Send) -> AsyncIterator[Outbox]:
    outbox = Outbox(store, keys, {Sequel.WEBHOOK: send, Sequel.STAGE: send})
    outbox.go_on()
    try:
        yield outbox
    finally:
        await outbox.stop()


# The reader.


async def test_what_comes_is_seen_at_once_and_then_removed(store: Store, keys: StoreKeys) -> None:
    seen: list[str] = []

    async def send(note: EndNote) -> None:
        seen.append(note.id)

    async with reading(store, keys, send):
        for number in range(3):
            await end(store, str(number))
            await until(lambda number=number: seen[number:] == [str(number)])  # type: ignore[misc]
        await until_empty(store)


async def test_an_entry_that_fails_holds_up_no_other_and_is_tried_again(store: Store, keys: StoreKeys) -> None:
    seen: list[str] = []
    may_pass = False

    async def send(note: EndNote) -> None:
        if note.id == "first" and not may_pass:
            raise BrokerUnavailable("away")
        seen.append(note.id)

    await end(store, "first")
    async with reading(store, keys, send):
        await end(store, "second")

        async def only_the_first_is_left() -> bool:
            return [EndNote.from_bytes(entry.note).id for entry in await store.jobs.ends(10)] == ["first"]

        await until(only_the_first_is_left)
        assert seen == ["second"]
        may_pass = True
        await until(lambda: seen == ["second", "first"])
        await until_empty(store)


async def test_the_outbox_is_not_read_again_for_each_entry_that_fails(
    store: Store, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, failed = 0, 0
    ends = store.jobs.ends

    async def counted(at_most: int, after: str = "") -> Sequence[PlacedEnd]:
        nonlocal reads
        reads += 1
        return await ends(at_most, after)

    async def send(note: EndNote) -> None:
        nonlocal failed
        await asyncio.sleep(0.01 * int(note.id))
        failed += 1
        raise BrokerUnavailable("away")

    for number in range(50):
        await end(store, str(number))
    monkeypatch.setattr(store.jobs, "ends", counted)
    async with reading(store, keys, send):
        await until(lambda: failed >= 50)
        assert reads < 25
        await until(lambda: failed >= 100)


async def test_an_entry_that_takes_long_holds_up_no_other(store: Store, keys: StoreKeys) -> None:
    seen: list[str] = []

    async def send(note: EndNote) -> None:
        if note.id == "first":
            await asyncio.Event().wait()
        seen.append(note.id)

    async with reading(store, keys, send):
        await end(store, "first")
        for number in range(200):
            await end(store, str(number))
        await until(lambda: len(seen) == 200)
    assert len(await store.jobs.ends(10)) == 1


async def test_each_of_many_entries_is_sent_once_however_many_come_meanwhile(store: Store, keys: StoreKeys) -> None:
    seen: list[str] = []

    async def send(note: EndNote) -> None:
        await asyncio.sleep(0.001 * (len(seen) % 3))
        seen.append(note.id)

    async with reading(store, keys, send):
        for number in range(500):
            await end(store, str(number))
        await until(lambda: len(seen) >= 500)
        await until_empty(store)
    assert sorted(seen, key=int) == [str(number) for number in range(500)]


async def test_an_entry_that_makes_no_sense_is_dropped(store: Store, keys: StoreKeys) -> None:
    async def send(note: EndNote) -> None:
        raise BadEnvelope("it makes none")

    await end(store, "one")
    async with reading(store, keys, send):
        await until_empty(store)


async def test_a_reader_that_stops_leaves_what_it_had_in_hand_to_the_next(store: Store, keys: StoreKeys) -> None:
    seen: list[str] = []

    async def hang(note: EndNote) -> None:
        seen.append(f"{note.id} is in hand")
        await asyncio.Event().wait()

    async def send(note: EndNote) -> None:
        seen.append(note.id)

    await end(store, "one")
    async with reading(store, keys, hang):
        await until(lambda: seen == ["one is in hand"])
    async with reading(store, keys, send):
        await until(lambda: seen == ["one is in hand", "one"])
        await until_empty(store)


# The next stage.


class Instance:
    """The leader's part of one instance, and a queue where the stages arrive."""

    def __init__(self, store: Store, keys: StoreKeys, signer: Signer = SIGNER) -> None:
        self.store = store
        self.keys = keys
        self.signer = signer
        self.queue = EmbeddedQueue()
        self.jobs = JobSender(self.queue, store, keys, HeldBytes(), signer)
        self.stages = self.leader_with(signer)
        self.arrived: list[Envelope] = []
        self._consumptions: list[Consumption] = []

    def leader_with(self, signer: Signer) -> NextStages:
        stages = NextStages(JobSender(self.queue, self.store, self.keys, HeldBytes(), signer), self.store, self.keys, signer)
        stages.follow(DESIRED, "")
        return stages

    async def __aenter__(self) -> "Instance":
        for name in STAGES:
            await self.queue.declare(name, 1, None)
            self._consumptions.append(await self.queue.consume(name, 1, 100, self._take, jobs=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        for consumption in self._consumptions:
            await consumption.cancel()

    def _take(self, delivery: Delivery) -> None:
        self.arrived.append(delivery.envelope())
        delivery.ack()

    async def submit(self) -> Envelope:
        sent_id = stage_id(PIPELINE, 0)
        kind, body = encode_value([1, {}], self.signer, SealScope("request", "one", sent_id))
        terms = JobTerms(stages=Stages("p", STAGES), tag="t", callback="https://hooks.example/")
        await self.jobs.submit(PIPELINE, "one", body, kind, RequestHead(endpoint="p"), origin="handle", terms=terms)
        await until(lambda: bool(self.arrived))
        return self.arrived.pop()

    async def end_stage(self, message: Envelope, value: object = None, *, error: ErrorInfo | None = None) -> EndNote:
        """Returns what the outbox then says of it."""
        backend, head = message.header.meta.endpoint, message.header.job
        assert head is not None
        kind, body = encode_value(value, self.signer, SealScope("result", backend, message.id))
        result = Result(backend=backend, content_type=kind, body=body, error=error, status=500 if error else 200)
        state = JobState.FAILED if error else JobState.SUCCEEDED
        await end(
            self.store, message.id, result=result.to_bytes(), note=entry_of(message.id, b""), state=state, stage=head.stage, callback=""
        )
        return EndNote(message.id, state, self.store.now_ms(), stage=head.stage)

    async def next(self) -> Envelope:
        await until(lambda: bool(self.arrived))
        return self.arrived.pop()

    async def has_ended(self) -> bool:
        return await self.result() is not None

    async def result(self) -> Result | None:
        raw = await self.store.get(self.keys.future(PIPELINE))
        return None if raw is None else Result.from_bytes(raw)


async def test_the_end_of_a_stage_sends_the_next_one_with_its_result(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        message = await instance.submit()
        for number in (1, 2):
            await instance.stages.send(await instance.end_stage(message, {"after": number}))
            message = await instance.next()
            assert (message.id, message.header.meta.endpoint) == (stage_id(PIPELINE, number), STAGES[number])
            assert message.carries and read_carried(message.body, SIGNER, plain=False) == {"after": number}
        await instance.stages.send(await instance.end_stage(message, (1, 2)))
        record = await store.jobs.read(PIPELINE)
        assert record is not None and (record.state, record.facts.tag) == ("succeeded", "t")
        notes = [EndNote.from_bytes(entry.note) for entry in await store.jobs.ends(100)]
        assert [note.id for note in notes if note.callback] == [PIPELINE], "a callback is told of the end of the whole alone"


async def test_a_second_sending_has_the_id_of_the_first(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        for _ in range(2):  # the first leader died before it removed the entry
            await instance.stages.send(note)
        await until(lambda: len(instance.arrived) == 2)
        assert {message.id for message in instance.arrived} == {stage_id(PIPELINE, 1)}


async def test_a_pipeline_goes_on_while_the_secret_key_is_rotated(store: Store, keys: StoreKeys) -> None:
    old, new = b"k" * MIN_KEY_BYTES, b"n" * MIN_KEY_BYTES
    async with Instance(store, keys, Signer([old, new], "tests")) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        await instance.leader_with(Signer([new, old], "tests")).send(note)
        await instance.stages.send(note)  # by one that has the old key still
        await until(lambda: len(instance.arrived) == 2)
        assert {message.id for message in instance.arrived} == {stage_id(PIPELINE, 1)}


async def test_a_stage_goes_to_an_endpoint_of_which_the_leader_has_not_heard_yet(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        instance.stages.follow(Desired(), "")
        await store.set(keys.desired, msgspec.json.encode(DESIRED))
        await instance.stages.send(note)
        assert (await instance.next()).header.meta.endpoint == "two"


async def test_the_end_of_a_pipeline_is_written_once_and_then_nothing_follows(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), error=ErrorInfo("ValueError", "no"))
        for _ in range(2):
            await instance.stages.send(note)
        found = await instance.result()
        assert found is not None and found.error is not None and (found.error.message, found.status) == ("no", 500)
        await instance.stages.send(replace(note, state=JobState.SUCCEEDED))
        assert not instance.arrived


@pytest.mark.parametrize(
    "change",
    [
        lambda note: replace(note, id="b" * 32),
        lambda note: replace(note, stage=Stage(note.stage.plan, 1)),
        lambda note: replace(note, stage=Stage(note.stage.plan, 99)),
        lambda note: replace(note, stage=Stage(b"forged", 0)),
    ],
    ids=["another id", "another stage", "no stage", "another plan"],
)
async def test_an_entry_that_no_holder_of_the_key_made_moves_nothing(store: Store, keys: StoreKeys, change: object) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        with pytest.raises(BadEnvelope):
            await instance.stages.send(change(note))  # type: ignore[operator]
        assert not instance.arrived and await instance.result() is None


def test_a_plan_of_another_key_is_not_opened() -> None:
    plan = Plan(VERSION, PIPELINE, "p", STAGES, (), "handle", "", 0, 0, 0, 0, 0, "", "", "")
    assert Plan.opened(plan.sealed(SIGNER), SIGNER) == plan
    with pytest.raises(BadEnvelope):
        Plan.opened(plan.sealed(Signer([b"x" * MIN_KEY_BYTES], "tests")), SIGNER)
    with pytest.raises(BadEnvelope):
        Plan.opened(plan.sealed(Signer([], "tests")), SIGNER)


async def test_an_endpoint_that_is_gone_ends_the_pipeline_with_a_sentence(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        instance.stages.follow(Desired(), "")
        await instance.stages.send(note)
        found = await instance.result()
        assert found is not None and found.error is not None and "no endpoint 'two' any more" in found.error.message
        record = await store.jobs.read(PIPELINE)
        assert record is not None and record.state == "failed"


async def test_what_follows_is_sent_by_the_document_as_it_is_also_once_the_last_backend_is_gone(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        message = await instance.submit()
        sequels = Sequels(instance.queue, store, keys, Settings("tests", secret_keys=(b"k" * MIN_KEY_BYTES,)))
        await sequels.turn(DESIRED, None, leads=True)
        await sequels.turn(Desired(), None, leads=True)
        await instance.end_stage(message, 1)
        await until(instance.has_ended)
        await sequels.stop()
        found = await instance.result()
        assert found is not None and found.error is not None and "no endpoint 'two' any more" in found.error.message


async def test_the_outbox_is_gone_through_at_the_end_of_an_instance_also_where_no_replica_can_start(store: Store, keys: StoreKeys) -> None:
    async def at_once(act: Callable[[], Awaitable[T]]) -> T:
        return await act()

    async with Instance(store, keys) as instance:
        await instance.end_stage(await instance.submit(), error=ErrorInfo("ValueError", "no"))
        settings = Settings("tests", secret_keys=(b"k" * MIN_KEY_BYTES,))
        duties = JobDuties(store, keys, instance.queue, Leader(store, keys, "c"), at_once, None, settings)
        await duties.tidy()
        await until(instance.has_ended)


async def test_a_result_that_is_gone_ends_the_pipeline_with_a_sentence(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        message = await instance.submit()
        note = await instance.end_stage(message, 1)
        await store.delete(keys.future(message.id))
        await instance.stages.send(note)
        found = await instance.result()
        assert found is not None and found.error is not None and "is not kept any more" in found.error.message


async def test_what_stands_in_the_place_of_a_result_ends_the_pipeline_with_a_sentence(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        message = await instance.submit()
        note = await instance.end_stage(message, 1)
        await store.set(keys.future(message.id), b"\xc1", ttl_ms=60_000)
        await instance.stages.send(note)
        found = await instance.result()
        assert found is not None and found.error is not None and "the result of stage 'one' cannot be read" in found.error.message


async def test_a_store_that_is_full_has_the_next_stage_wait(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        instance.stages.follow(DESIRED, "the store is full")
        with pytest.raises(Exception, match="the store is full"):
            await instance.stages.send(note)
        assert await instance.result() is None
        instance.stages.follow(DESIRED, "")
        await instance.stages.send(note)
        await instance.next()


async def test_a_pipeline_that_is_cancelled_between_two_stages_sends_no_other(store: Store, keys: StoreKeys) -> None:
    async with Instance(store, keys) as instance:
        note = await instance.end_stage(await instance.submit(), 1)
        assert await instance.jobs.cancel(PIPELINE)
        await instance.stages.send(note)
        assert not instance.arrived
        stages = await instance.jobs.stages(await the_record(store))
        assert [stage.state for stage in stages] == ["succeeded", "cancelled", None]  # so it would not run if it were on its way


async def the_record(store: Store) -> JobRecord:
    record = await store.jobs.read(PIPELINE)
    assert record is not None
    return record


async def until_empty(store: Store) -> None:
    async def is_empty() -> bool:
        return not await store.jobs.ends(1)

    await until(is_empty)
