"""What the leader does once all jobs of a group have ended: it sends the job that gets their results, once, in spite of leaders that die,
of servers that are away, and of calls that nobody signed."""

import asyncio
from typing import Any

import msgspec
import pytest

from mqserve.broker.calls.chord_calls import VERSION, ChordCall
from mqserve.broker.calls.job_sending import JobSender
from mqserve.broker.envelope import Member, RequestHead
from mqserve.broker.errors import BadEnvelope, BrokerUnavailable, MQServeError, NotRouted, StoreUnavailable
from mqserve.broker.job_groups import GroupFacts, chord_id, member_id
from mqserve.broker.jobs import Done, EndNote, JobState, Leased
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.overload import HeldBytes
from mqserve.broker.results import Result
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.carried import read_carried
from mqserve.broker.values.codecs import encode_value
from mqserve.broker.values.signing import MIN_KEY_BYTES, SealScope, Signer
from mqserve.controller.chords import Chords
from mqserve.controller.state.documents import Backend, Desired, Endpoint
from tests.broker.keeping_jobs import begun, ended
from tests.broker.traffic import Hands

pytestmark = pytest.mark.anyio

SIGNER = Signer([b"k" * MIN_KEY_BYTES], "tests")
STRANGER = Signer([b"s" * MIN_KEY_BYTES], "tests")
DESIRED = Desired(backends={"b": Backend("b", "", "b")}, endpoints={"then": Endpoint("then", None, (), {"b": 1.0})})
CALL = ChordCall(VERSION, "the chord", RequestHead(endpoint="then"), "", 4, "t", "", 60, 1000, 0, 0)

END = EndNote("the last", JobState.SUCCEEDED, 5, group="g")


class OddQueue(EmbeddedQueue):
    """Fails publishes first, as it is told."""

    def __init__(self, *failures: MQServeError) -> None:
        super().__init__()
        self.failures = list(failures)

    def publish_job(self, *args: Any, **options: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        super().publish_job(*args, **options)


class Site:
    """A leader's chords, with a queue of which the test sees each message."""

    def __init__(self, store: Store, keys: StoreKeys, *failures: MQServeError) -> None:
        self.store = store
        self.keys = keys
        self.queue = OddQueue(*failures)
        self.hands = Hands()
        self.chords = self.another_leader()

    def another_leader(self) -> Chords:
        chords = Chords(JobSender(self.queue, self.store, self.keys, HeldBytes(), SIGNER), self.store, self.keys, SIGNER)
        chords.follow(DESIRED, "")
        return chords

    async def begin(self, total: int, signer: Signer = SIGNER, call: ChordCall = CALL) -> None:
        await self.queue.declare("b", 1, None)
        await self.queue.consume("b", 1, 100, self.hands, jobs=True)
        await self.store.jobs.hold(call.id, call.facts)
        await self.store.jobs.keep_group("g", GroupFacts(total, "e", then=call.id), call.sealed(signer, "g"))

    async def end(self, number: int, value: object, state: JobState = JobState.SUCCEEDED, **fields: Any) -> None:
        job_id = member_id("g", number)
        content_type, body = encode_value(value, SIGNER, SealScope("result", "a", job_id))
        raw = Result(backend="a", content_type=content_type, body=body).to_bytes()
        await ended(self.store, job_id, raw, state=state, member=Member("g", number), backend="a", **fields)

    async def follow(self) -> None:
        await self.chords.send(END)

    async def groups_to_follow(self) -> list[str]:
        return [EndNote.from_bytes(entry.note).group for entry in await self.store.jobs.ends(10)]

    async def sent(self) -> list[Any]:
        """The arguments of the jobs that were sent."""
        for _ in range(3):
            await asyncio.sleep(0)
        envelopes = [delivery.envelope() for delivery in self.hands.held]
        assert all(envelope.id == CALL.id and envelope.carries for envelope in envelopes)
        return [read_carried(envelope.body, SIGNER, plain=False) for envelope in envelopes]

    async def chord(self) -> tuple[JobState, str]:
        """The state of the chord's job, and its error."""
        record = await self.store.jobs.read(CALL.id)
        assert record is not None
        raw = await self.store.get(self.keys.future(CALL.id))
        error = None if raw is None else Result.from_bytes(raw).error
        return record.state, "" if error is None else f"{error.type}: {error.message}"


@pytest.fixture
def site(store: Store, keys: StoreKeys) -> Site:
    return Site(store, keys)


async def test_the_results_of_a_group_are_sent_in_order_once_all_have_succeeded(site: Site) -> None:
    await site.begin(3)
    for number, value in ((2, "two"), (0, {0}), (1, None)):
        assert not await site.groups_to_follow()
        await site.end(number, value)
    assert await site.groups_to_follow() == ["g"]
    await site.follow()
    assert await site.sent() == [[{0}, None, "two"]]
    record = await site.store.jobs.read(CALL.id)
    assert record is not None
    assert (record.facts.backend, record.facts.created_ms, record.facts.priority, record.facts.tag) == ("b", 1000, 4, "t")


async def test_a_leader_that_comes_after_one_which_has_sent_it_sends_nothing(site: Site) -> None:
    await site.begin(1)
    await site.end(0, 1)
    await site.follow()
    await site.another_leader().send(END)
    assert len(await site.sent()) == 1


async def test_a_second_sending_by_a_leader_that_knows_nothing_of_the_first_is_recognized(site: Site) -> None:
    await site.begin(1)
    await site.end(0, 1)
    await asyncio.gather(site.follow(), site.another_leader().send(END))
    sent = await site.sent()
    assert sent == [[1]] * len(sent), "with the same id and the same argument"
    assert await begun(site.store, b"one", CALL.id) == Leased(1)
    assert await ended(site.store, CALL.id, token=b"one")
    assert isinstance(await begun(site.store, b"two", CALL.id), Done)


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), NotRouted("no queue yet"), StoreUnavailable("away")])
async def test_what_cannot_be_sent_now_is_sent_later(store: Store, keys: StoreKeys, error: MQServeError) -> None:
    site = Site(store, keys, error)
    await site.begin(1)
    await site.end(0, 1)
    with pytest.raises(type(error)):
        await site.follow()
    await site.follow()
    assert await site.sent() == [[1]]


async def test_a_chord_goes_to_an_endpoint_of_which_the_leader_has_not_heard_yet(site: Site) -> None:
    await site.begin(1)
    await site.end(0, 1)
    site.chords.follow(Desired(), "")
    await site.store.set(site.keys.desired, msgspec.json.encode(DESIRED))
    await site.follow()
    assert await site.sent() == [[1]]


async def test_a_full_store_gets_no_chord_until_it_has_room(site: Site) -> None:
    await site.begin(1)
    await site.end(0, 1)
    site.chords.follow(DESIRED, "it is almost full")
    with pytest.raises(StoreUnavailable, match="almost full"):
        await site.follow()
    site.chords.follow(DESIRED, "")
    await site.follow()
    assert await site.sent() == [[1]]


async def test_a_group_with_ends_of_other_kinds_fails_its_chord_and_names_the_first(site: Site) -> None:
    await site.begin(6)
    states = [JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED]
    for number, state in enumerate(states):
        await site.end(number, number, state)
    await site.follow()
    named = ", ".join(f"{member_id('g', number)} ({state})" for number, state in list(enumerate(states))[1:4])
    assert await site.chord() == (
        JobState.FAILED,
        f"mqserve.MembersFailed: not all of the 6 jobs of its group have succeeded: 1 cancelled, 1 expired, 2 failed; {named} and others",
    )
    assert not await site.sent()


async def test_a_chord_that_was_cancelled_or_has_expired_is_not_sent(site: Site) -> None:
    await site.begin(1, call=msgspec.structs.replace(CALL, expires_ms=1))
    await site.end(0, 1)
    await site.follow()
    assert (await site.chord())[0] is JobState.EXPIRED and not await site.sent()


async def test_a_call_that_no_process_with_the_key_has_made_is_not_sent(site: Site) -> None:
    derived = chord_id("g")
    await site.begin(1, STRANGER, msgspec.structs.replace(CALL, id=derived))
    await site.end(0, 1)
    with pytest.raises(BadEnvelope):
        await site.follow()
    record = await site.store.jobs.read(derived)
    assert record is not None and record.state is JobState.FAILED and not await site.sent()


async def test_the_call_of_one_group_is_no_call_of_another(site: Site) -> None:
    await site.store.jobs.keep_group("g", GroupFacts(1), CALL.sealed(SIGNER, "another"))
    await site.end(0, 1)
    with pytest.raises(BadEnvelope):
        await site.follow()
    assert not await site.sent()


async def test_what_stands_in_the_place_of_a_result_fails_the_chord(site: Site) -> None:
    await site.begin(2)
    await site.end(0, 1)
    await ended(site.store, member_id("g", 1), b"\xc1", member=Member("g", 1))
    await site.follow()
    state, error = await site.chord()
    assert state is JobState.FAILED and "cannot be read" in error and member_id("g", 1) in error


async def test_nothing_follows_from_a_group_that_is_not_known_or_has_no_call(site: Site) -> None:
    await site.chords.send(msgspec.structs.replace(END, group="nobody's"))
    await site.store.jobs.keep_group("g", GroupFacts(0))
    await site.follow()
    assert not await site.sent()


async def test_a_word_that_comes_too_soon_changes_nothing(site: Site) -> None:
    await site.begin(2)
    await site.end(0, 1)
    await site.follow()
    assert (await site.chord())[0] is JobState.QUEUED and not await site.sent()
    await site.end(1, 2)
    await site.follow()
    assert await site.sent() == [[1, 2]]


async def test_an_instance_that_closes_ends_its_chords(site: Site) -> None:
    await site.begin(1)
    await site.end(0, 1)
    site.chords.follow(msgspec.structs.replace(DESIRED, closing=True), "")
    await site.follow()
    state, error = await site.chord()
    assert state is JobState.FAILED and error.startswith("mqserve.BackendGone: the instance was shut down")
