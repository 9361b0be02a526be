"""The leader fires schedules: each time once, in spite of leaders that die, of brokers that are away, and of calls that nobody signed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec
import pytest

from mqserve.broker.calls.job_sending import NO_TERMS, JobSender, JobTerms
from mqserve.broker.calls.scheduled_calls import VERSION, ScheduledCall, encode_data
from mqserve.broker.envelope import RequestHead, is_minted
from mqserve.broker.errors import BadValue, BrokerUnavailable, MQServeError
from mqserve.broker.jobs import JobFacts
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.stopping import first_of
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.codecs import decode_value
from mqserve.broker.values.signing import MIN_KEY_BYTES, SealScope, Signer
from mqserve.controller.changes import commit, delete_endpoint
from mqserve.controller.firing import Firings
from mqserve.controller.lease import Leader, claim_instance
from mqserve.controller.schedule_changes import delete_schedule, pause_schedule, resume_schedule, set_schedule
from mqserve.controller.state.documents import Backend, CatchUp, Desired, Endpoint, Observed, Schedule
from mqserve.controller.state.firings import Firing, firings_to_bytes, read_firings
from mqserve.controller.undoing import undo
from tests.broker.traffic import Hands
from tests.controller.test_leading import HTTP, controllers

pytestmark = pytest.mark.anyio

SIGNER = Signer([b"k" * MIN_KEY_BYTES], "tests")
YEAR_MS = 366 * 24 * 3600_000
EVERY_SECOND, HOURLY, YEARLY = "* * * * * *", "0 * * * *", "0 0 1 1 *"
ENDPOINT = Endpoint("e", None, (), {"b": 1.0})


class Sent:
    """One job that was given to the sender."""

    def __init__(self, job_id: str, backend: str, body: bytes, content_type: str, head: RequestHead, terms: JobTerms, sent_ms: int) -> None:
        self.id = job_id
        self.backend = backend
        self.content_type = content_type
        self.body = body
        self.schedule = dict(head.headers)[b"x-schedule"].decode()
        self.at = dict(head.headers)[b"x-scheduled-for"].decode()
        self.at_ms = int(datetime.fromisoformat(self.at).timestamp() * 1000)
        self.sent_ms = sent_ms
        self.terms = terms


class Recorder(JobSender):
    """Takes every job, unless it is told to fail first."""

    def __init__(self, *failures: MQServeError) -> None:
        self.sent: list[Sent] = []
        self.failures = list(failures)
        self.takes = asyncio.Event()
        self.takes.set()

    def __repr__(self) -> str:
        return f"<Recorder of {len(self.sent)}>"

    def count(self, schedule: str) -> int:
        return sum(job.schedule == schedule for job in self.sent)

    async def submit(  # type: ignore[override]  # which is awaited, too
        self,
        future_id: str,
        backend: str,
        body: bytes,
        content_type: str,
        meta: RequestHead,
        *,
        origin: str,
        terms: JobTerms = NO_TERMS,
        refusal: str = "",
    ) -> JobFacts:
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append(Sent(future_id, backend, body, content_type, meta, terms, time.time_ns() // 1_000_000))
        await self.takes.wait()
        return JobFacts(backend)


def scheduled(
    cron: str,
    since_ms: int,
    *,
    catch_up: CatchUp = "skip",
    data: Any = 7,
    name: str = "s",
    endpoint: str = "e",
    signer: Signer = SIGNER,
    token: str = "t",
    expires_ms: int = 0,
    callback: str = "",
) -> Schedule:
    content_type, body = encode_data(data, signer, endpoint, name)
    call = ScheduledCall(VERSION, content_type, body, RequestHead(endpoint=endpoint), "", 2, "night", 60, expires_ms, callback)
    return Schedule(name, endpoint, cron, "UTC", call.sealed(signer, endpoint, name), token, catch_up, since_ms)


def document(*schedules: Schedule, **changes: Any) -> Desired:
    desired = Desired(backends={"b": Backend("b", "", "b")}, endpoints={"e": ENDPOINT}, schedules={one.name: one for one in schedules})
    return msgspec.structs.replace(desired, **changes)


@asynccontextmanager
async def firing(jobs: JobSender, store: Store, keys: StoreKeys, desired: Desired, name: str = "leader") -> AsyncIterator[Firings]:
    leader = Leader(store, keys, name)
    assert await leader.lead()
    firings = Firings(jobs, store, keys, SIGNER, leader)
    firings.go_on(desired, Observed())
    over = asyncio.Event()
    leading = asyncio.create_task(lead_on(leader, over))
    try:
        yield firings
    finally:
        over.set()
        await leading
        await firings.stop()
        await leader.release()


async def lead_on(leader: Leader, over: asyncio.Event) -> None:
    while not await first_of(over, timeout_s=1):
        await leader.lead()


async def until(condition: Callable[[], object], budget_s: float = 20) -> None:
    async with asyncio.timeout(budget_s):
        while not condition():
            await asyncio.sleep(0.01)


async def noted(store: Store, keys: StoreKeys, jobs: Recorder, name: str = "s", more_than: int = 0) -> None:
    """Returns once the store has the last job of the schedule, of more than so many."""
    async with asyncio.timeout(20):
        while True:
            found = read_firings(await store.get(keys.firings)).get(name)
            sent = [job.id for job in jobs.sent if job.schedule == name]
            if found is not None and len(sent) > more_than and found.job == sent[-1]:
                return
            await asyncio.sleep(0.01)


async def test_each_time_has_a_job_and_the_last_one_is_noted(store: Store, keys: StoreKeys) -> None:
    jobs = Recorder()
    async with firing(jobs, store, keys, document(scheduled(EVERY_SECOND, store.now_ms() - 3000))):
        await until(lambda: len(jobs.sent) >= 4)
        await noted(store, keys, jobs)
    ids, times = [job.id for job in jobs.sent], [job.at for job in jobs.sent]
    assert len(set(ids)) == len(ids) and all(map(is_minted, ids))
    assert times == sorted(set(times))
    first = jobs.sent[0]
    assert (first.backend, first.terms.tag, first.terms.priority, first.terms.result_ttl_s) == ("b", "night", 2, 60)


async def test_a_job_that_was_sent_and_not_noted_is_sent_once_more_under_its_id(store: Store, keys: StoreKeys) -> None:
    jobs, desired = Recorder(), document(scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once"))
    jobs.takes.clear()
    async with firing(jobs, store, keys, desired, "first"):
        await until(lambda: jobs.sent)
    jobs.takes.set()
    async with firing(jobs, store, keys, desired, "second"):
        await until(lambda: len(jobs.sent) == 2)
        await noted(store, keys, jobs)
    assert (jobs.sent[0].id, jobs.sent[0].at) == (jobs.sent[1].id, jobs.sent[1].at)


async def test_the_next_leader_sends_nothing_that_was_noted(store: Store, keys: StoreKeys) -> None:
    jobs, now = Recorder(), store.now_ms()
    often, yearly = scheduled(EVERY_SECOND, now, name="often"), scheduled(YEARLY, now - 2 * YEAR_MS, catch_up="once", name="yearly")
    async with firing(jobs, store, keys, document(yearly), "first"):
        await until(lambda: jobs.sent)
        await noted(store, keys, jobs, "yearly")
    async with firing(jobs, store, keys, document(yearly, often), "second"):
        await until(lambda: len(jobs.sent) >= 2)
    assert len({job.id for job in jobs.sent}) == len(jobs.sent)


async def test_what_was_missed_is_skipped_or_made_up_for_by_one_job(store: Store, keys: StoreKeys) -> None:
    jobs, since_ms = Recorder(), store.now_ms() - 10 * YEAR_MS
    skipping, once = scheduled(YEARLY, since_ms, name="skipping"), scheduled(YEARLY, since_ms, name="once", catch_up="once")
    marker = scheduled(EVERY_SECOND, store.now_ms(), name="marker")
    async with firing(jobs, store, keys, document(skipping, once, marker)):
        await until(lambda: len(jobs.sent) >= 3)
        await noted(store, keys, jobs, "once")
    assert [job.schedule for job in jobs.sent if job.schedule != "marker"] == ["once"]


async def test_a_broker_that_is_away_is_asked_again(store: Store, keys: StoreKeys) -> None:
    jobs = Recorder(BrokerUnavailable("RabbitMQ is away"), BrokerUnavailable("RabbitMQ is away"))
    schedule = scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once")
    async with firing(jobs, store, keys, document(schedule)) as firings:
        await until(lambda: firings.problems == {"schedule s": "it is due and was not sent: RabbitMQ is away"})
        await until(lambda: jobs.sent)
        await noted(store, keys, jobs)
        assert firings.problems == {}
    assert len(jobs.sent) == 1


async def test_a_bug_with_one_schedule_stops_no_other(store: Store, keys: StoreKeys) -> None:
    broken = scheduled(EVERY_SECOND, store.now_ms() - 1000, name="broken")
    jobs, desired = Recorder(), document(broken, scheduled(EVERY_SECOND, store.now_ms() - 1000, name="sound"))
    jobs.failures = [RuntimeError("a bug")]  # type: ignore[list-item]
    async with firing(jobs, store, keys, desired) as firings:
        await until(lambda: jobs.sent)
        assert "schedule broken" in firings.problems
        await until(lambda: len(jobs.sent) >= 2)


async def test_it_goes_on_where_that_of_an_ended_instance_was(store: Store, keys: StoreKeys) -> None:
    """What was due between the two has the ids of the earlier one, which may have sent it already."""
    jobs, now = Recorder(), store.now_ms()
    before = {"s": Firing(until=now - 2 * YEAR_MS, times=f"{YEARLY} UTC", token="old")}
    await store.set(keys.firings, firings_to_bytes(before), ttl_ms=60_000)
    desired = document(scheduled(YEARLY, now, catch_up="once"), scheduled(EVERY_SECOND, now, name="marker"))
    for leader in ("first", "second"):
        async with firing(jobs, store, keys, desired, leader):
            await noted(store, keys, jobs, "marker", more_than=jobs.count("marker"))
    [job] = [job for job in jobs.sent if job.schedule == "s"]
    assert job.id == SIGNER.derived_id("firing", "s", "old", job.at_ms)
    assert {job.id for job in jobs.sent if job.schedule == "marker"} == {
        SIGNER.derived_id("firing", "marker", "t", job.at_ms) for job in jobs.sent if job.schedule == "marker"
    }


@pytest.mark.parametrize("times", ["", f"{HOURLY} UTC", f"{YEARLY} Europe/Berlin"])
async def test_it_does_not_go_on_where_another_was_or_one_that_was_paused(store: Store, keys: StoreKeys, times: str) -> None:
    jobs, now = Recorder(), store.now_ms()
    await store.set(keys.firings, firings_to_bytes({"s": Firing(until=now - 2 * YEAR_MS, times=times, token="old")}))
    desired = document(scheduled(YEARLY, now, catch_up="once"), scheduled(EVERY_SECOND, now, name="marker"))
    async with firing(jobs, store, keys, desired):
        await noted(store, keys, jobs, "marker", more_than=0)
    assert {job.schedule for job in jobs.sent} == {"marker"}


async def test_what_the_next_instance_has_to_know_is_noted_before_the_first_firing(store: Store, keys: StoreKeys) -> None:
    jobs, now = Recorder(), store.now_ms()
    paused = msgspec.structs.replace(scheduled(YEARLY, now, name="paused"), paused=True)
    desired = document(scheduled(YEARLY, now), paused, scheduled(EVERY_SECOND, now, name="marker"))
    async with firing(jobs, store, keys, desired):
        await noted(store, keys, jobs, "marker", more_than=0)
    found = read_firings(await store.get(keys.firings))
    assert found["s"] == Firing(until=now, times=f"{YEARLY} UTC", token="t")
    assert found["paused"] == Firing(token="t")


async def test_those_of_an_ended_instance_are_kept_until_all_is_declared(store: Store, keys: StoreKeys) -> None:
    jobs, now, yet = Recorder(), store.now_ms(), Firing(until=5, times=f"{YEARLY} UTC", token="old")
    await store.set(keys.firings, firings_to_bytes({"yet to come": yet}))
    marker = scheduled(EVERY_SECOND, now, name="marker")
    async with firing(jobs, store, keys, document(marker, incomplete=True)) as firings:
        await noted(store, keys, jobs, "marker", more_than=0)
        assert read_firings(await store.get(keys.firings))["yet to come"] == yet
        firings.go_on(document(marker), Observed())
        await noted(store, keys, jobs, "marker", more_than=jobs.count("marker"))
        assert set(read_firings(await store.get(keys.firings))) == {"marker"}


async def test_one_that_cannot_be_sent_makes_no_other_late(store: Store, keys: StoreKeys) -> None:
    """One without its endpoint is tried again each second, and others go by their own times meanwhile."""
    await asyncio.sleep((1500 - store.now_ms() % 1000) / 1000)  # looked at each second from here on, all would be half a second late
    lost = scheduled(EVERY_SECOND, store.now_ms() - 1000, name="lost", endpoint="gone")
    jobs = Recorder()
    async with firing(jobs, store, keys, document(lost, scheduled(EVERY_SECOND, store.now_ms(), name="sound"))) as firings:
        await until(lambda: len(jobs.sent) >= 4)
        assert "no endpoint 'gone' any more" in firings.problems["schedule lost"]
    assert {job.schedule for job in jobs.sent} == {"sound"}
    assert min(job.sent_ms - job.at_ms for job in jobs.sent) < 400


async def test_a_clock_that_is_set_back_stops_no_schedule(store: Store, keys: StoreKeys) -> None:
    """What was fired, and what was declared, while the clock was wrong lies in the future then."""
    jobs, now = Recorder(), store.now_ms()
    fired, declared = scheduled(EVERY_SECOND, now, name="fired"), scheduled(EVERY_SECOND, now + YEAR_MS, name="declared")
    await store.set(keys.firings, firings_to_bytes({"fired": Firing(now + YEAR_MS, "j")}))
    async with firing(jobs, store, keys, document(fired, declared)):
        await until(lambda: {job.schedule for job in jobs.sent} == {"fired", "declared"})
    assert min(job.at_ms for job in jobs.sent) > now


async def test_a_clock_that_is_set_back_a_little_fires_for_no_time_twice(store: Store, keys: StoreKeys) -> None:
    jobs, until_ms = Recorder(), store.now_ms() + 2000
    await store.set(keys.firings, firings_to_bytes({"s": Firing(until_ms, "j")}))
    async with firing(jobs, store, keys, document(scheduled(EVERY_SECOND, 5))):
        await until(lambda: jobs.sent)
    assert jobs.sent[0].at_ms > until_ms


async def test_its_jobs_are_treated_as_the_call_says(store: Store, keys: StoreKeys) -> None:
    jobs = Recorder()
    jobs.store = store
    schedule = scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once", expires_ms=60_000, callback="https://e.example/hook")
    async with firing(jobs, store, keys, document(schedule)):
        await until(lambda: jobs.sent)
    [job] = jobs.sent
    assert job.terms.callback == "https://e.example/hook"
    assert 0 < job.terms.expires_ms - store.now_ms() <= 60_000


async def test_a_call_that_nobody_signed_is_not_sent(store: Store, keys: StoreKeys) -> None:
    since_ms, other = store.now_ms() - 2 * YEAR_MS, Signer([b"x" * MIN_KEY_BYTES], "tests")
    foreign = scheduled(YEARLY, since_ms, catch_up="once", name="foreign", signer=other)
    renamed = msgspec.structs.replace(scheduled(YEARLY, since_ms, catch_up="once"), name="renamed")
    jobs = Recorder()
    async with firing(jobs, store, keys, document(foreign, renamed)) as firings:
        await until(lambda: len(firings.problems) == 2)
        assert all("declare it again" in problem for problem in firings.problems.values())
    assert not jobs.sent


async def test_a_pickle_among_the_data_is_sealed_for_its_job(store: Store, keys: StoreKeys) -> None:
    jobs = Recorder()
    async with firing(jobs, store, keys, document(scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once", data={1, 2}))):
        await until(lambda: jobs.sent)
    [job] = jobs.sent
    assert decode_value(job.body, job.content_type, SIGNER, SealScope("request", "b", job.id)) == [{1, 2}, {}]


async def test_a_schedule_without_its_endpoint_says_so(store: Store, keys: StoreKeys) -> None:
    desired = document(scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once"), endpoints={})
    async with firing(Recorder(), store, keys, desired) as firings:
        await until(lambda: firings.problems)
        assert "there is no endpoint 'e' any more" in firings.problems["schedule s"]


async def test_what_is_known_of_a_schedule_goes_with_it(store: Store, keys: StoreKeys) -> None:
    jobs, since_ms = Recorder(), store.now_ms() - 2 * YEAR_MS
    kept, gone = (scheduled(YEARLY, since_ms, catch_up="once", name=name) for name in ("kept", "gone"))
    async with firing(jobs, store, keys, document(kept, gone)) as firings:
        await until(lambda: len(jobs.sent) == 2)
        firings.go_on(document(kept), Observed())
        async with asyncio.timeout(20):
            while set(read_firings(await store.get(keys.firings))) != {"kept"}:
                await asyncio.sleep(0.01)


async def test_firings_that_the_store_has_lost_are_written_again(store: Store, keys: StoreKeys) -> None:
    jobs, now = Recorder(), store.now_ms()
    yearly, often = scheduled(YEARLY, now - 2 * YEAR_MS, catch_up="once", name="yearly"), scheduled(EVERY_SECOND, now, name="often")
    async with firing(jobs, store, keys, document(yearly)) as firings:
        await until(lambda: jobs.sent)
        await noted(store, keys, jobs, "yearly")
        await store.delete(keys.firings)
        firings.go_on(document(yearly, often), Observed())
        await noted(store, keys, jobs, "yearly")


async def test_a_leader_that_leads_anew_after_the_store_has_lost_all_sends_nothing_again(store: Store, keys: StoreKeys) -> None:
    jobs, now = Recorder(), store.now_ms()
    yearly, often = scheduled(YEARLY, now - 2 * YEAR_MS, catch_up="once", name="yearly"), scheduled(EVERY_SECOND, now, name="often")
    async with firing(jobs, store, keys, document(yearly)) as firings:
        await until(lambda: jobs.sent)
        await noted(store, keys, jobs, "yearly")
        await firings.stop()
        await store.delete(keys.firings)
        firings.go_on(document(yearly, often), Observed())
        await until(lambda: jobs.count("often"))
        await noted(store, keys, jobs, "yearly")
    assert jobs.count("yearly") == 1


async def test_another_leader_knows_what_was_sent_although_the_store_has_lost_all(store: Store, keys: StoreKeys) -> None:
    jobs, now = Recorder(), store.now_ms()
    yearly, often = scheduled(YEARLY, now - 2 * YEAR_MS, catch_up="once", name="yearly"), scheduled(EVERY_SECOND, now, name="often")
    leader = Leader(store, keys, "second")
    second = Firings(jobs, store, keys, SIGNER, leader)
    async with firing(jobs, store, keys, document(yearly), "first"):
        await until(lambda: jobs.sent)
        await noted(store, keys, jobs, "yearly")
        await second.follow()
    await store.delete(keys.firings)
    await second.follow()
    assert await leader.lead()
    second.go_on(document(yearly, often), Observed())
    await until(lambda: jobs.count("often"))
    await noted(store, keys, jobs, "yearly")
    await second.stop()
    assert jobs.count("yearly") == 1


async def test_a_controller_that_waits_learns_what_its_leader_has_fired(monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys, queue, hands = EmbeddedStore(), StoreKeys("tests"), EmbeddedQueue(), Hands()
    held, signer = await claim_instance(store, keys, "", HTTP, detached=True), Signer((b"k" * MIN_KEY_BYTES,), "tests")
    yearly = scheduled(YEARLY, store.now_ms() - 2 * YEAR_MS, catch_up="once", signer=signer)
    wished = document(yearly)

    def declare(desired: Desired) -> Desired:
        return msgspec.structs.replace(desired, backends=wished.backends, endpoints=wished.endpoints, schedules=wished.schedules)

    await commit(store, keys, held.id, declare)
    looked, get = list[str](), store.get

    async def get_and_note(key: str) -> bytes | None:
        looked.append(key)
        return await get(key)

    async with controllers(store, keys) as running:
        running.start("first", queue)
        await until_stored(store, keys.firings)
        await queue.consume("b", 1, 10, hands, jobs=True)
        await hands.hold(1)
        monkeypatch.setattr(store, "get", get_and_note)
        running.start("second", queue)
        await until(lambda: looked.count(keys.firings) >= 2)
        await store.delete(keys.firings)
        running.stops["first"].set()
        await running.leads("second")
        await until_stored(store, keys.firings)
    assert len(hands) == 1


async def until_stored(store: Store, key: str) -> None:
    async with asyncio.timeout(20):
        while await store.get(key) is None:
            await asyncio.sleep(0.01)


async def test_a_controller_that_does_not_lead_fires_nothing(store: Store, keys: StoreKeys) -> None:
    desired = document(scheduled(EVERY_SECOND, store.now_ms() - 3000))
    sleeping, leading = Recorder(), Recorder()
    firings = Firings(sleeping, store, keys, SIGNER, Leader(store, keys, "it does not lead"))
    firings.go_on(desired, Observed())
    async with firing(leading, store, keys, desired):
        await until(lambda: len(leading.sent) >= 4)
    await firings.stop()
    assert not sleeping.sent


# Changes of the document.


def test_a_schedule_that_is_set_again_goes_on_if_its_times_are_the_same() -> None:
    before = document(msgspec.structs.replace(scheduled(HOURLY, 5), paused=True))
    same = set_schedule(scheduled(HOURLY, 0, token="new"), lambda: 99)(before).schedules["s"]
    assert (same.since_ms, same.token, same.paused) == (5, "t", True)
    other = set_schedule(scheduled(EVERY_SECOND, 0, token="new"), lambda: 99)(before).schedules["s"]
    assert (other.since_ms, other.token, other.paused) == (99, "new", True)


def test_a_resumed_schedule_counts_from_then_on() -> None:
    paused = pause_schedule("s")(document(scheduled(HOURLY, 5)))
    assert paused.schedules["s"].paused
    resumed = resume_schedule("s", lambda: 99)(paused).schedules["s"]
    assert (resumed.since_ms, resumed.paused) == (99, False)
    assert resume_schedule("s", lambda: 100)(document(resumed)).schedules["s"] == resumed


def test_an_endpoint_goes_only_after_its_schedules() -> None:
    desired = document(scheduled(HOURLY, 5))
    with pytest.raises(BadValue, match="delete_schedule first"):
        delete_endpoint("e")(desired)
    assert delete_endpoint("e")(delete_schedule("s")(desired)).endpoints == {}


def test_a_deployment_that_is_undone_takes_its_schedules_back() -> None:
    old, new, others = scheduled(HOURLY, 5), scheduled(EVERY_SECOND, 6), scheduled(HOURLY, 7, name="others")
    before, made = document(old), document(new)
    assert undo(before, made, "it failed")(document(new, others)).schedules == {"s": old, "others": others}
    assert undo(document(), made, "it failed")(document(new, others)).schedules == {"others": others}
    assert undo(before, made, "it failed")(document(others)).schedules == {"others": others}


def test_the_id_of_a_firing_follows_from_key_schedule_and_time() -> None:
    ids = [
        SIGNER.derived_id("firing", "s", "t", 1000),
        SIGNER.derived_id("firing", "s", "t", 2000),
        SIGNER.derived_id("firing", "s", "u", 1000),
        Signer([b"x" * MIN_KEY_BYTES], "tests").derived_id("firing", "s", "t", 1000),
        Signer([b"k" * MIN_KEY_BYTES], "others").derived_id("firing", "s", "t", 1000),
        Signer([], "tests").derived_id("firing", "s", "t", 1000),
    ]
    assert len(set(ids)) == len(ids) and all(map(is_minted, ids))
    assert SIGNER.derived_id("firing", "s", "t", 1000) == ids[0]


def test_firings_are_read_back() -> None:
    assert read_firings(None) == {}
    assert read_firings(b'{"s":{"at":5,"job":"j"}}') == {"s": Firing(5, "j")}
