"""What both stores keep of jobs: the same tests on the one in memory and on Redis."""

import asyncio

import msgspec
import pytest

from mqserve.broker.envelope import Member, Stage
from mqserve.broker.errors import BadEnvelope
from mqserve.broker.job_groups import GroupFacts
from mqserve.broker.jobs import (
    KEPT_ATTEMPTS,
    KEPT_EVENTS,
    LEASE_MS,
    Attempt,
    Done,
    EndNote,
    EventKind,
    Held,
    JobEvent,
    JobFacts,
    JobRecord,
    JobState,
    Leased,
    Pipeline,
    Run,
    record_of,
)
from mqserve.broker.results import EVENT_KIND, read_entry
from mqserve.broker.store import Record, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.keeping_jobs import FACTS, added, begun, ended, state_of
from tests.broker.test_store_contract import reading
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


# The record.


async def test_a_job_that_was_sent_is_queued_with_what_is_known_of_it(store: Store) -> None:
    facts = JobFacts("b", "e", created_ms=1000, expires_ms=2000, not_before_ms=1500, priority=3, tag="nightly", retry_of="another")
    await added(store, facts=facts)
    record = await store.jobs.read("f")
    assert record is not None
    assert (record.id, record.facts, record.state, record.attempts, record.has_result) == ("f", facts, JobState.QUEUED, (), False)


async def test_nothing_is_known_of_a_job_that_was_not_sent(store: Store) -> None:
    assert await store.jobs.read("f") is None
    assert await store.jobs.message("f") is None
    assert await store.jobs.events("f") == []
    assert await store.jobs.place("f", FACTS) is None
    assert await store.jobs.list() == []


async def test_a_replica_writes_the_record_where_it_is_missing_and_the_sender_who_comes_later_changes_nothing(store: Store) -> None:
    assert await begun(store) == Leased(1)
    before = await store.jobs.read("f")
    await added(store, facts=JobFacts("b", "another", created_ms=5))
    assert await store.jobs.read("f") == before
    assert before is not None and before.state is JobState.RUNNING and before.facts == FACTS


async def test_a_job_runs_and_succeeds(store: Store, keys: StoreKeys) -> None:
    await added(store)
    assert await begun(store) == Leased(1)
    assert await state_of(store) == "running"
    assert await ended(store, token=b"run")
    record = await store.jobs.read("f")
    assert record is not None
    assert (record.state, record.status, record.started_ms, record.ended_ms) == (JobState.SUCCEEDED, 200, 2000, 3000)
    assert record.attempts == (Attempt(1, "replica-1", 2000),)
    assert record.has_result and await store.get(keys.future("f")) == b"result"


async def test_a_job_whose_result_has_gone_gets_no_other(store: Store, keys: StoreKeys) -> None:
    await added(store)
    assert await ended(store)
    await store.delete(keys.future("f"))
    assert not await ended(store, result=b"cancelled", state=JobState.CANCELLED, status=499)
    record = await store.jobs.read("f")
    assert record is not None and (record.state, record.has_result) == (JobState.SUCCEEDED, False)


async def test_only_the_first_end_counts(store: Store, keys: StoreKeys) -> None:
    await added(store)
    assert await ended(store, state=JobState.CANCELLED, status=499)
    assert not await ended(store, result=b"another")
    assert await ended(store), "an equal one may be the same, sent again"
    record = await store.jobs.read("f")
    assert record is not None and (record.state, record.status) == (JobState.CANCELLED, 499)
    assert await store.get(keys.future("f")) == b"result"


async def test_a_record_of_which_only_the_end_is_left_can_be_read(store: Store) -> None:
    """Redis lost the rest."""
    assert await ended(store)
    record = await store.jobs.read("f")
    assert record is not None and (record.state, record.facts) == (JobState.SUCCEEDED, JobFacts(backend=""))
    await added(store)
    record = await store.jobs.read("f")
    assert record is not None and (record.state, record.facts) == (JobState.SUCCEEDED, FACTS)


async def test_a_result_goes_first_and_the_record_stays_as_long_again(store: Store, keys: StoreKeys) -> None:
    await added(store, message=b"message")
    assert await ended(store, result_ttl_ms=300)
    assert await store.get(keys.future("f")) == b"result"

    async def result_is_gone() -> bool:
        return await store.get(keys.future("f")) is None and not await store.jobs.events("f")

    await until(result_is_gone)
    record = await store.jobs.read("f")
    assert record is not None and record.state is JobState.SUCCEEDED and not record.has_result
    assert await store.jobs.message("f") is None
    assert await begun(store) == Done(b""), "it does not run again"

    async def record_is_gone() -> bool:
        return await store.jobs.read("f") is None

    await until(record_is_gone)


async def test_a_result_that_stands_already_keeps_a_job_from_running(store: Store, keys: StoreKeys) -> None:
    await store.record(Record(keys.future("f"), b"another", "", b"", 0))
    assert await begun(store) == Done(b"another")
    assert not await ended(store)


async def test_the_message_of_a_job_is_kept_for_a_retry(store: Store) -> None:
    await added(store, message=b"\0message\xff")
    await begun(store)
    await ended(store, state=JobState.FAILED, status=500)
    assert await store.jobs.message("f") == b"\0message\xff"


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
async def test_a_job_that_ended_before_its_sender_was_told_can_be_retried(store: Store, state: JobState) -> None:
    await begun(store)
    await ended(store, state=state)
    await added(store, message=b"message")
    assert (await state_of(store), await store.jobs.message("f")) == (state, b"message")


async def test_what_has_ended_can_be_forgotten_and_nothing_else(store: Store, keys: StoreKeys) -> None:
    await added(store, message=b"message")
    await added(store, "other")
    assert not await store.jobs.forget("f")
    await begun(store)
    assert not await store.jobs.forget("f")
    await ended(store)
    assert await store.jobs.forget("f")
    assert await store.jobs.read("f") is None
    assert (await store.jobs.message("f"), await store.get(keys.future("f")), await store.jobs.events("f")) == (None, None, [])
    assert [record.id for record in await store.jobs.list()] == ["other"]


async def test_what_is_not_known_counts_as_forgotten(store: Store, keys: StoreKeys) -> None:
    assert await store.jobs.forget("f")
    await store.jobs.wait("f", keys.inbox("p"))
    assert await store.jobs.forget("f"), "though somebody waits for it"


async def test_a_large_body_goes_with_the_message_that_names_it(store: Store, keys: StoreKeys) -> None:
    for name in ("f", "forgotten"):
        await added(store, name, message=b"message")
        await store.set(keys.body(name), b"body", ttl_ms=3_600_000)
        await begun(store, id=name)
    await ended(store, "forgotten")
    assert await store.jobs.forget("forgotten")
    assert await store.get(keys.body("forgotten")) is None
    await ended(store, state=JobState.FAILED, status=500, result_ttl_ms=300)
    assert await store.get(keys.body("f")) == b"body", "a retry needs it"

    async def body_is_gone() -> bool:
        return await store.get(keys.body("f")) is None

    await until(body_is_gone)


async def test_a_thousand_jobs_of_one_turn_are_all_kept(store: Store) -> None:
    names = [f"job-{number}" for number in range(1000)]
    await asyncio.gather(*(added(store, name, message=name.encode()) for name in names))
    assert all(one == Leased(1) for one in await asyncio.gather(*(begun(store, name.encode(), name) for name in names)))
    assert all(await asyncio.gather(*(ended(store, name, token=name.encode()) for name in names)))
    assert {record.state for name in names if (record := await store.jobs.read(name))} == {JobState.SUCCEEDED}


# Leases.


async def test_a_second_run_waits_for_the_lease_of_the_first(store: Store) -> None:
    assert await begun(store) == Leased(1)
    held = await begun(store, b"another")
    assert isinstance(held, Held) and LEASE_MS - 5000 < held.left_ms <= LEASE_MS
    assert await store.jobs.renew("f", b"run")
    assert not await store.jobs.renew("f", b"another")


async def test_a_beginning_that_is_said_again_is_the_same_run(store: Store) -> None:
    assert await begun(store) == await begun(store) == Leased(1)
    record = await store.jobs.read("f")
    assert record is not None and len(record.attempts) == 1


async def test_a_run_whose_lease_lapsed_writes_nothing_once_another_has_begun(store: Store, keys: StoreKeys) -> None:
    await added(store)
    await begun(store)
    await store.delete(keys.lease("f"))
    assert await begun(store, b"another") == Leased(2)
    await store.delete(keys.lease("f"))
    before = (await store.jobs.read("f"), await store.jobs.events("f"))
    store.jobs.note("f", b"run", JobEvent(EventKind.PROGRESS, 1, fraction=0.5))
    assert not await store.jobs.renew("f", b"run")
    assert not await store.jobs.try_again("f", b"run", Attempt(1, error="stale"), FACTS)
    await store.jobs.give_back("f", b"run", FACTS)
    assert (await store.jobs.read("f"), await store.jobs.events("f")) == before
    assert await ended(store, token=b"run"), "its result counts: it is the same work"
    assert await state_of(store) == "succeeded"


async def test_the_failure_of_a_run_does_not_count_once_another_has_begun(store: Store, keys: StoreKeys) -> None:
    await begun(store)
    await store.delete(keys.lease("f"))
    assert await begun(store, b"another") == Leased(2)
    assert not await ended(store, token=b"run", state=JobState.FAILED, status=500)
    assert await state_of(store) == "running" and await store.get(keys.future("f")) is None
    assert await ended(store, token=b"another", result=b"another", state=JobState.FAILED, status=500)
    assert not await ended(store, token=b"run", state=JobState.FAILED, status=500)
    assert await state_of(store) == "failed"


async def test_an_end_that_is_no_run_counts_beside_one(store: Store) -> None:
    await begun(store)
    assert await ended(store, state=JobState.CANCELLED, status=499)
    assert await state_of(store) == "cancelled"


async def test_a_lease_that_lapsed_is_renewed_by_its_run_if_no_other_began(store: Store, keys: StoreKeys) -> None:
    await begun(store)
    await store.delete(keys.lease("f"))
    assert await store.jobs.renew("f", b"run")
    assert isinstance(await begun(store, b"another"), Held)


async def test_the_end_of_a_job_ends_the_lease_of_its_run_alone(store: Store) -> None:
    await begun(store)
    await ended(store, token=b"stale")
    assert await store.jobs.renew("f", b"run"), "it goes on, in vain"
    assert await begun(store, b"another") == Done(b"result")


async def test_a_run_that_is_given_back_is_no_attempt_and_another_begins_at_once(store: Store) -> None:
    await added(store)
    await begun(store)
    await store.jobs.give_back("f", b"run", FACTS)
    record = await store.jobs.read("f")
    assert record is not None and record.state is JobState.QUEUED and record.has_begun, "so it does not expire any more"
    assert await begun(store, b"another") == Leased(1)
    record = await store.jobs.read("f")
    assert record is not None and len(record.attempts) == 1


# Another try.


async def test_a_run_that_failed_is_written_down_and_the_job_waits_for_another(store: Store) -> None:
    await added(store)
    await begun(store)
    failed = Attempt(1, ended_ms=2500, error="OSError: no", again_ms=4000)
    assert await store.jobs.try_again("f", b"run", failed, FACTS)
    assert await store.jobs.try_again("f", b"run", failed, FACTS), "said again"
    assert await state_of(store) == "queued"
    assert await begun(store, b"another") == Leased(2)
    record = await store.jobs.read("f")
    assert record is not None and record.state is JobState.RUNNING
    assert record.attempts == (Attempt(1, "replica-1", 2000, 2500, "OSError: no", 4000), Attempt(2, "replica-1", 2000))


async def test_a_job_that_was_cancelled_meanwhile_is_not_tried_again(store: Store) -> None:
    await begun(store)
    await ended(store, state=JobState.CANCELLED)
    assert not await store.jobs.try_again("f", b"run", Attempt(1, error="OSError"), FACTS)
    assert await state_of(store) == "cancelled"


async def test_only_the_latest_attempts_are_kept(store: Store) -> None:
    for number in range(1, KEPT_ATTEMPTS + 4):
        assert await begun(store, b"%d" % number) == Leased(number)
        assert await store.jobs.try_again("f", b"%d" % number, Attempt(number, error=str(number)), FACTS)
    record = await store.jobs.read("f")
    assert record is not None
    assert [attempt.number for attempt in record.attempts] == list(range(4, KEPT_ATTEMPTS + 4))
    assert [attempt.error for attempt in record.attempts] == [str(number) for number in range(4, KEPT_ATTEMPTS + 4)]


# Events, and who is told of them.


async def test_what_happens_to_a_job_is_numbered_and_can_be_read_from_any_number_on(store: Store) -> None:
    await added(store)
    await begun(store)
    store.jobs.note("f", b"run", JobEvent(EventKind.PROGRESS, 2100, fraction=0.5, text="half"))
    store.jobs.note("f", b"run", JobEvent(EventKind.LOG, 2200, text="a line"))
    store.jobs.note("f", b"stale", JobEvent(EventKind.LOG, 2300, text="of another run"))
    await ended(store)
    store.jobs.note("f", b"run", JobEvent(EventKind.LOG, 3100, text="behind the end"))
    record = await store.jobs.read("f")
    assert record is not None and record.progress == JobEvent(EventKind.PROGRESS, 2100, fraction=0.5, text="half")
    assert list(await store.jobs.events("f")) == [
        (1, JobEvent(EventKind.STATE, 1000, "queued")),
        (2, JobEvent(EventKind.STATE, 2000, "running")),
        (3, JobEvent(EventKind.PROGRESS, 2100, fraction=0.5, text="half")),
        (4, JobEvent(EventKind.LOG, 2200, text="a line")),
        (5, JobEvent(EventKind.STATE, 3000, "succeeded")),
    ]
    assert [seq for seq, _ in await store.jobs.events("f", 3)] == [4, 5]


async def test_only_the_latest_events_are_kept(store: Store) -> None:
    await begun(store)
    for number in range(KEPT_EVENTS + 500):
        store.jobs.note("f", b"run", JobEvent(EventKind.LOG, number))
    await ended(store)
    events = await store.jobs.events("f")
    assert [seq for seq, _ in events] == list(range(503, KEPT_EVENTS + 503))
    for after in (1, 700, KEPT_EVENTS + 490, KEPT_EVENTS + 501, KEPT_EVENTS + 502, KEPT_EVENTS + 600):
        assert [seq for seq, _ in await store.jobs.events("f", after)] == list(range(max(503, after + 1), KEPT_EVENTS + 503))


async def test_who_waits_is_told_of_the_end_and_so_is_the_sender_each_once(store: Store, keys: StoreKeys) -> None:
    async with (
        reading(store, keys.inbox("p")) as waiting,
        reading(store, keys.inbox("s")) as sending,
        reading(store, keys.inbox("q")) as other,
    ):
        await added(store)
        assert (record := await store.jobs.wait("f", keys.inbox("p"))) is not None and record.state is JobState.QUEUED
        await store.jobs.wait("f", keys.inbox("p"))
        await store.jobs.wait("f", keys.inbox("s"))
        await store.jobs.wait("g", keys.inbox("q"))
        await begun(store)
        await ended(store, inbox=keys.inbox("s"))
        await until(lambda: waiting and sending)
        await ended(store, result=b"too late")
        await ended(store, "g")
        await until(lambda: other)
    assert (waiting, sending, other) == ([b"note of result"], [b"note of result"], [b"note of result"])


async def test_who_waits_for_a_job_that_is_not_known_yet_is_told_all_the_same(store: Store, keys: StoreKeys) -> None:
    async with reading(store, keys.inbox("p")) as notes:
        assert await store.jobs.wait("f", keys.inbox("p")) is None
        assert await store.jobs.follow("f", keys.inbox("p")) is None
        assert await store.jobs.read("f") is None
        await begun(store)
        await ended(store)
        await until(lambda: b"note of result" in notes)


async def test_who_waits_for_a_job_that_has_ended_learns_it_at_once(store: Store, keys: StoreKeys) -> None:
    await ended(store)
    record = await store.jobs.wait("f", keys.inbox("p"))
    assert record is not None and record.state is JobState.SUCCEEDED and record.has_result


async def test_who_follows_a_job_is_told_of_each_event_with_its_number(store: Store, keys: StoreKeys) -> None:
    id = "a longer id than thirty-one bytes, as a publisher may have/\N{GREEK SMALL LETTER ALPHA}"
    async with reading(store, keys.inbox("p")) as notes:
        await added(store, id)
        assert (record := await store.jobs.follow(id, keys.inbox("p"))) is not None and record.state is JobState.QUEUED
        await begun(store, id=id)
        for number in range(200):
            store.jobs.note(id, b"run", JobEvent(EventKind.LOG, 7, text="x" * number))
        await ended(store, id)
        await until(lambda: len(notes) == 202)
    entries = [entry for note in notes if (entry := read_entry(note)) is not None]
    assert [(entry.id, entry.kind, entry.seq) for entry in entries] == [(id, EVENT_KIND, seq) for seq in range(2, 204)]
    assert [JobEvent.from_bytes(entry.payload) for entry in entries] == [event for _, event in await store.jobs.events(id, 1)]


# Places and lists.


async def test_the_place_of_a_job_is_by_priority_and_then_by_time(store: Store) -> None:
    for name, priority, created_ms, backend in [
        ("a", 0, 10, "b"),
        ("c", 0, 30, "b"),
        ("d", 4, 40, "b"),
        ("e", 0, 5, "other"),
        ("f", 0, 20, "b"),
    ]:
        await added(store, name, JobFacts(backend, created_ms=created_ms, priority=priority))
    assert [await store.jobs.place(name, JobFacts("b")) for name in "dafc"] == [0, 1, 2, 3]
    await begun(store, id="d", facts=JobFacts("b"))
    await ended(store, "a")
    assert [await store.jobs.place(name, JobFacts("b")) for name in "dafc"] == [None, None, 0, 1]


async def test_a_job_that_waits_again_has_a_place_again(store: Store) -> None:
    first, second, third = (JobFacts("b", created_ms=created_ms) for created_ms in (10, 20, 30))
    for name, facts in (("given back", first), ("tried again", second), ("waits", third)):
        await added(store, name, facts)
        if facts is not third:
            await begun(store, id=name, facts=facts)
    await store.jobs.give_back("given back", b"run", first)
    assert await store.jobs.try_again("tried again", b"run", Attempt(1, ended_ms=50, error="no", again_ms=70), second)
    assert [await store.jobs.place(name, FACTS) for name in ("given back", "waits", "tried again")] == [0, 1, 2]
    await begun(store, b"another", "given back", first)
    await ended(store, "tried again", state=JobState.CANCELLED)
    assert [await store.jobs.place(name, FACTS) for name in ("given back", "waits", "tried again")] == [None, 0, None]


async def test_a_job_that_waits_for_its_time_stands_behind_those_before_it(store: Store) -> None:
    await added(store, "later", JobFacts("b", created_ms=10, not_before_ms=500))
    await added(store, "now", JobFacts("b", created_ms=400))
    assert [await store.jobs.place(name, JobFacts("b")) for name in ("now", "later")] == [0, 1]


async def test_jobs_are_listed_latest_first_and_by_backend_tag_and_state(store: Store) -> None:
    for number in range(230):
        await added(store, f"job-{number}", JobFacts("b" if number % 2 else "a", created_ms=number + 1, tag="t" if number == 10 else ""))
    await begun(store, id="job-3", facts=JobFacts("b", created_ms=4))
    await ended(store, "job-5")
    assert [record.id for record in await store.jobs.list(at_most=3)] == ["job-229", "job-228", "job-227"]
    assert len(await store.jobs.list(at_most=1000)) == 230
    assert [record.id for record in await store.jobs.list(tag="t")] == ["job-10"]
    assert [record.id for record in await store.jobs.list(backend="a", at_most=2)] == ["job-228", "job-226"]
    assert [record.id for record in await store.jobs.list(states=["running", "succeeded"])] == ["job-5", "job-3"]
    assert not await store.jobs.list(backend="a", states=["running"])


async def test_a_list_has_each_job_once_though_others_come_and_go_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [f"job-{number}" for number in range(300)]
    for number, name in enumerate(before):
        await added(store, name, JobFacts("b", created_ms=1000 + number // 120))  # many at one time
    for name in before[:100:10]:
        await ended(store, name)
    read, reads = store.jobs.read, 0

    async def reading_slowly(future_id: str) -> JobRecord | None:
        nonlocal reads
        reads += 1
        if reads % 50 == 0:
            await added(store, f"new-{reads}", JobFacts("b", created_ms=2000 + reads))
        return await read(future_id)

    monkeypatch.setattr(store.jobs, "read", reading_slowly)
    found = [record.id for record in await store.jobs.list(at_most=1000)]
    assert reads >= 300 and len(set(found)) == len(found)
    assert {name for name in found if name.startswith("job-")} == set(before)


# What is no record.


@pytest.mark.parametrize(
    "fields",
    [
        {b"facts": b"\xc1"},
        {b"state": b"unheard of"},
        {b"state": b"\xff"},
        {b"run:x": Attempt().to_bytes()},
        {b"run:1": b""},
        {b"state": b"failed", b"status": b"many"},
        {b"progress": msgspec.msgpack.encode({"kind": "smell"})},
    ],
)
def test_what_is_no_record_is_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(BadEnvelope, match="another program or version"):
        record_of("f", fields, has_result=False)


async def test_the_backend_of_a_run_is_that_of_its_facts(store: Store) -> None:
    await store.jobs.begin(Run("f", b"run", "r", JobFacts("of the run"), now_ms=5))
    assert [record.id for record in await store.jobs.list(backend="of the run")] == ["f"]


# Pipelines.


WHOLE = JobFacts("", "p", created_ms=7, tag="t", stages=("one", "two"))


async def stage_begun(store: Store, index: int, token: bytes = b"run") -> None:
    pipeline = Pipeline("whole", WHOLE, f"stage {index}")
    run = Run(f"stage-{index}", token, "r", FACTS, 1000 + index, result_ttl_s=60, pipeline=pipeline)
    assert isinstance(await store.jobs.begin(run), Leased)


async def told(store: Store) -> list[str]:
    return [event.event.state or event.event.text for event in await store.jobs.events("whole")]


async def test_a_pipeline_waits_in_no_queue(store: Store) -> None:
    await added(store, "whole", WHOLE)
    record = await store.jobs.read("whole")
    assert record is not None and (record.state, record.facts) == (JobState.QUEUED, WHOLE)
    assert await store.jobs.place("whole", WHOLE) is None


async def test_a_pipeline_runs_from_the_first_run_of_a_stage_on_and_tells_of_each_stage_once(store: Store, keys: StoreKeys) -> None:
    await added(store, "whole", WHOLE)
    async with reading(store, keys.inbox("p")) as notes:
        await store.jobs.follow("whole", keys.inbox("p"))
        await stage_begun(store, 1)
        await stage_begun(store, 1)  # its answer was lost
        assert await store.jobs.try_again("stage-1", b"run", Attempt(1, error="no"), FACTS)
        await stage_begun(store, 1, b"second")
        await stage_begun(store, 2)
        await until(lambda: len(notes) == 3)
    record = await store.jobs.read("whole")
    assert record is not None and (record.state, record.has_begun) == (JobState.RUNNING, True)
    assert record.attempts == (Attempt(1, "r", 1001, result_ttl_s=60),)
    assert await told(store) == ["queued", "running", "stage 1", "stage 2"]


async def test_a_stage_writes_the_record_of_its_pipeline_where_it_is_missing(store: Store) -> None:
    await stage_begun(store, 1)
    record = await store.jobs.read("whole")
    assert record is not None and (record.state, record.facts) == (JobState.RUNNING, WHOLE)
    await added(store, "whole", WHOLE)
    assert await store.jobs.read("whole") == record


async def test_a_stage_that_begins_late_changes_nothing_of_a_pipeline_that_has_ended(store: Store) -> None:
    await added(store, "whole", WHOLE)
    await ended(store, "whole", state=JobState.CANCELLED)
    await stage_begun(store, 1)
    record = await store.jobs.read("whole")
    assert record is not None and (record.state, record.attempts) == (JobState.CANCELLED, ())
    assert await told(store) == ["queued", "cancelled"]


async def test_the_end_of_a_stage_is_in_the_outbox_and_that_of_another_job_is_not(store: Store) -> None:
    await ended(store)
    for number in range(3):
        for _ in range(2):
            await ended(store, f"stage-{number}", stage=Stage(b"plan", number))
    first, second, third = await store.jobs.ends(10)
    assert [EndNote.from_bytes(end.note).id for end in (first, second, third)] == ["stage-0", "stage-1", "stage-2"]
    assert EndNote.from_bytes(second.note).stage == Stage(b"plan", 1)
    assert await store.jobs.ends(1, first.place) == [second]
    await store.jobs.drop_ends(second.place)
    assert await store.jobs.ends(10) == [first, third]
    assert await store.jobs.ends(10, third.place) == []


# Groups.


def member(number: int, group: str = "g") -> Member:
    return Member(group, number)


async def counts_of(store: Store, group: str = "g") -> tuple[int, int, int, int]:
    record = await store.jobs.group(group)
    assert record is not None
    ended = record.ended
    return ended[JobState.SUCCEEDED], ended[JobState.FAILED], ended[JobState.CANCELLED], ended[JobState.EXPIRED]


async def test_the_ends_of_a_group_s_jobs_are_counted_by_state(store: Store) -> None:
    facts = GroupFacts(5, "e", 1000, 2000, "the id of another job")
    await store.jobs.keep_group("g", facts)
    for number, state in enumerate([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]):
        assert await ended(store, f"m{number}", state=state, member=member(number))
    assert await counts_of(store) == (1, 1, 1, 1)
    record = await store.jobs.group("g")
    assert record is not None and (record.facts, record.call) == (facts, b"")
    assert dict(await store.jobs.group_ends("g")) == {
        0: JobState.SUCCEEDED, 1: JobState.FAILED, 2: JobState.CANCELLED, 3: JobState.EXPIRED,
    }  # fmt: skip
    assert await store.jobs.ends(10) == [], "nothing follows from it"


async def test_an_end_is_counted_once_however_often_it_is_written(store: Store, keys: StoreKeys) -> None:
    await store.jobs.keep_group("g", GroupFacts(2), b"call")
    await asyncio.gather(*(ended(store, "m1", member=member(1)) for _ in range(10)))
    assert not await ended(store, "m1", b"another", state=JobState.FAILED, member=member(1))
    assert await counts_of(store) == (1, 0, 0, 0)
    await ended(store, "m0", member=member(0), result_ttl_ms=50)
    assert [EndNote.from_bytes(entry.note).group for entry in await store.jobs.ends(10)] == ["g"]

    async def is_forgotten() -> bool:
        return await store.jobs.read("m0") is None

    await until(is_forgotten)
    await ended(store, "m0", state=JobState.FAILED, member=member(0))
    assert await counts_of(store) == (2, 0, 0, 0), "also once its record has gone"
    assert len(await store.jobs.ends(10)) == 1, "and nothing follows from it again"


async def test_the_last_end_of_a_group_with_a_call_is_in_the_outbox(store: Store) -> None:
    await store.jobs.keep_group("g", GroupFacts(300), b"call")
    await asyncio.gather(*(ended(store, f"m{number}", member=member(number)) for number in reversed(range(1, 300))))
    assert await store.jobs.ends(10) == []
    await ended(store, "m0", state=JobState.FAILED, callback="https://hooks.example/", member=member(0))
    found = [EndNote.from_bytes(entry.note) for entry in await store.jobs.ends(10)]
    assert [(note.id, note.callback, note.group) for note in found] == [("m0", "https://hooks.example/", ""), ("m0", "", "g")]
    assert await counts_of(store) == (299, 1, 0, 0)


async def test_a_group_is_written_once_and_one_that_is_not_known_counts_nothing(store: Store) -> None:
    await ended(store, "m0", member=member(0))
    assert await store.jobs.group("g") is None and dict(await store.jobs.group_ends("g")) == {}
    await store.jobs.keep_group("g", GroupFacts(2), b"call")
    await ended(store, "m1", member=member(1))
    await store.jobs.keep_group("g", GroupFacts(1), b"another")
    record = await store.jobs.group("g")
    assert record is not None and (record.facts.total, record.call) == (2, b"call")
    assert await counts_of(store) == (1, 0, 0, 0)
    await ended(store, "m7", member=member(7))
    assert await counts_of(store) == (1, 0, 0, 0), "the group has no such member"


async def test_a_job_that_is_held_is_queued_without_a_place_until_it_is_sent(store: Store) -> None:
    held = JobFacts("", "e", 1000, tag="t")
    for _ in range(2):
        await store.jobs.hold("f", held)
    record = await store.jobs.read("f")
    assert record is not None and (record.state, record.facts) == (JobState.QUEUED, held)
    assert [one.event.state for one in await store.jobs.events("f")] == ["queued"], "the second time is that of an answer that was lost"
    assert await store.jobs.place("f", held) is None
    assert [found.id for found in await store.jobs.list(tag="t")] == ["f"]
    sent = JobFacts("b", "e", 1000, tag="t")
    await added(store, facts=sent)
    await added(store, facts=JobFacts("c", "e", 1000))
    record = await store.jobs.read("f")
    assert record is not None and record.facts == sent and await store.jobs.place("f", sent) == 0
    assert await begun(store, facts=sent) == Leased(1)
    await store.jobs.hold("f", held)
    record = await store.jobs.read("f")
    assert record is not None and record.facts == sent and record.state is JobState.RUNNING


async def test_a_job_that_is_held_may_end_before_it_is_sent(store: Store) -> None:
    await store.jobs.hold("f", JobFacts("", "e", 1000))
    assert await ended(store, state=JobState.CANCELLED, backend="")
    assert await begun(store) == Done(b"result")


async def test_a_replica_may_find_a_held_job_before_its_sender_has_written_that_it_was_sent(store: Store) -> None:
    await store.jobs.hold("f", JobFacts("", "e", 1000))
    assert await begun(store) == Leased(1)
    record = await store.jobs.read("f")
    assert record is not None and record.facts == FACTS
