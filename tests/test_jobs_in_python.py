"""Jobs of handles, in both forms: sent now, and found again by their ids."""

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until
from tests.tallies import Tally


class OddDigit(Exception):
    """An exception of the user's own."""


async def double(request: serve.ServeRequest) -> Any:
    if isinstance(request.data, str) and request.data == "odd":
        raise OddDigit("that is odd")
    return request.data * int(request.query_params.get("times", 2))


@pytest.fixture(scope="module")
def doubling(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(double)
    deploy.undo()


def waiting_at(gate: Gate) -> Any:
    async def wait_at_the_gate(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async(str(request.data))
        return request.data

    return wait_at_the_gate


def ended(job: serve.Job) -> serve.JobStatus | None:
    status = job.status()
    return status if status.state.is_final else None


# Sending, and reading by id.


def test_a_job_is_sent_now_and_read_by_its_id(doubling: str) -> None:
    job = serve.get_handle(doubling).submit(21)
    assert job.result(timeout=30) == serve.job(job.id).result(timeout=30) == 42
    status = job.status()
    assert (status.state, status.backend, status.endpoint, status.status, status.has_result) == ("succeeded", doubling, doubling, 200, True)
    assert (status.attempts, len(status.history), status.position) == (1, 1, None)
    assert status.created_at is not None and status.started_at is not None and status.ended_at is not None
    assert status.created_at <= status.started_at <= status.ended_at and status.ended_at.tzinfo is UTC


def test_a_job_of_an_async_handle_is_awaited(doubling: str) -> None:
    async def main() -> tuple[Any, Any]:
        job = await serve.get_handle(doubling, sync=False).submit(4, times=3)
        return await job, await serve.job(job.id)

    assert asyncio.run(main()) == (12, 12)


def test_any_object_travels_both_ways(doubling: str) -> None:
    doubled = serve.get_handle(doubling).submit(np.arange(3)).result(timeout=30)
    assert doubled.tolist() == [0, 2, 4]


def test_the_handlers_exception_is_raised_by_every_reader(doubling: str) -> None:
    job = serve.get_handle(doubling).submit("odd")
    for reader in (job, serve.job(job.id)):
        with pytest.raises(OddDigit, match="that is odd"):
            reader.result(timeout=30)
    assert (job.status().state, job.status().status) == ("failed", 500)


def test_a_job_is_a_future_to_everything_that_takes_one(doubling: str) -> None:
    handle = serve.get_handle(doubling)
    one, two = handle.submit(1), handle.submit(2)
    assert serve.get([one, two], timeout=30) == [2, 4]
    assert serve.wait([one, two], num_returns=2, timeout=30) == ([one, two], [])
    assert serve.gather(one, handle.remote(5), two).result(timeout=30) == [2, 10, 4]
    assert handle.remote(handle.submit(3)).result(timeout=30) == 12


def test_a_job_that_runs_is_not_done_and_says_so(deploy: Deploy, gate: Gate) -> None:
    job = serve.get_handle(deploy(waiting_at(gate))).submit(7)
    wait_until(lambda: job.status().state == "running")
    assert not job.done()
    with pytest.raises(TimeoutError, match="goes on"):
        job.result(timeout=0.1)
    with pytest.raises(TimeoutError, match="goes on"):
        job.result(timeout=0)
    gate.open()
    assert job.result(timeout=30) == 7 and job.done() and job.result(timeout=0) == 7


def test_nothing_is_known_of_an_id_that_nobody_sent(client: serve.Client) -> None:
    job = serve.job("0" * 32)
    assert not job.done()
    for ask in (job.status, job.result, job.cancel, job.retry, lambda: next(iter(job.events()))):
        with pytest.raises(serve.UnknownJob, match="nothing is known"):
            ask()
    with pytest.raises(serve.BadType, match="32 characters"):
        serve.job(7)  # type: ignore[arg-type]


def test_an_unknown_endpoint_is_refused_before_anything_is_sent(client: serve.Client) -> None:
    handle = serve.get_handle("not-there-yet", missing_ok=True)
    with pytest.raises(serve.UnknownEndpoint):
        serve.get_handle("not-there")
    assert "submit" in dir(handle)


def test_a_job_is_no_job_where_it_is_unpickled_and_a_handle_is_one(doubling: str) -> None:
    handle = pickle.loads(pickle.dumps(serve.get_handle(doubling).options(tag="pickled")))
    job = handle.submit(1)
    assert job.status().tag == "pickled"
    with pytest.raises(TypeError, match=r"serve\.job"):
        pickle.dumps(job)


# Options.


def test_a_delayed_job_begins_when_its_time_has_come(doubling: str) -> None:
    job = serve.get_handle(doubling).options(delay_s=1).submit(1)
    status = job.status()
    assert status.state == "queued" and status.not_before is not None
    assert job.result(timeout=30) == 2
    started_at = job.status().started_at
    assert started_at is not None and started_at >= status.not_before


def test_an_eta_is_a_delay_by_the_clock(doubling: str) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=1)
    job = serve.get_handle(doubling).options(eta=eta).submit(1)
    not_before = job.status().not_before
    assert not_before is not None and abs(not_before - eta) < timedelta(seconds=0.5)
    assert job.result(timeout=30) == 2


def test_a_job_that_expires_before_it_begins_never_runs(deploy: Deploy, gate: Gate) -> None:
    handle = serve.get_handle(deploy(waiting_at(gate), max_concurrent_queries=1))
    first = handle.submit("first")
    wait_until(lambda: gate.came == 1)
    second = handle.options(expires_s=0.2).submit("second")
    with pytest.raises(serve.RequestTimeout, match=r"allow it more .*expires_s.*X-Request-Timeout-Seconds"):
        second.result(timeout=40)
    assert second.status().state == "expired"
    gate.open()
    assert first.result(timeout=30) == "first" and gate.names == ["first"]


def test_priority_goes_before_the_order_of_sending(deploy: Deploy, gate: Gate, tally: Tally) -> None:
    async def note(request: serve.ServeRequest) -> None:
        if request.data == "first":
            await gate.pass_through_async()
        tally.note(request.data)

    handle = serve.get_handle(deploy(note, max_concurrent_queries=1, job_slots=1))
    jobs = [handle.submit("first")]
    wait_until(lambda: gate.came == 1)
    for priority in ("low", "normal", "high"):
        jobs.append(handle.options(priority=priority).submit(priority))
    assert [job.status().position for job in jobs[1:]] == [2, 1, 0]
    gate.open()
    serve.get(jobs, timeout=30)
    assert tally.lines == ["first", "high", "normal", "low"]


def test_a_published_job_of_which_nothing_is_known_is_not_said_to_go_on(doubling: str) -> None:
    with pytest.raises(TimeoutError, match="if somebody published it"):
        serve.job("never-sent", backend=doubling).result(timeout=0.1)


def test_a_result_is_kept_as_long_as_its_sender_says(doubling: str) -> None:
    job = serve.get_handle(doubling).options(result_ttl_s=1).submit(1)
    assert job.result(timeout=30) == 2
    wait_until(lambda: not job.status().has_result)
    with pytest.raises(serve.ResultGone):
        serve.job(job.id).result(timeout=30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delay_s": -1}, "delay_s"),
        ({"delay_s": 31 * 24 * 3600}, "30 days"),
        ({"delay_s": float("nan")}, "delay_s"),
        ({"eta": datetime(2030, 1, 1)}, "time zone"),
        ({"eta": datetime.now(UTC), "delay_s": 1}, "one of them"),
        ({"expires_s": 0}, "expires_s"),
        ({"priority": "urgent"}, "'high', 'normal', 'low'"),
        ({"priority": ["high"]}, "'high', 'normal', 'low'"),
        ({"result_ttl_s": 31 * 24 * 3600}, "result_ttl_s"),
        ({"tag": "a\nb"}, "printable"),
        ({"idempotency_key": "k" * 256}, "255 bytes"),
        ({"idempotency_key": "\ud800"}, "UTF-8"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_the_way_out(doubling: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(serve.BadValue, match=words):
        serve.get_handle(doubling).options(**options)


@pytest.mark.parametrize(
    "options", [{"delay_s": 10, "expires_s": 5}, {"eta": datetime(2100, 1, 1, tzinfo=UTC)}], ids=["expires first", "too far away"]
)
def test_a_time_that_cannot_come_is_refused_when_the_job_is_sent(doubling: str, options: dict[str, Any]) -> None:
    with pytest.raises(serve.BadValue):
        serve.get_handle(doubling).options(**options).submit(1)


def test_a_job_with_a_key_is_sent_once(deploy: Deploy, tally: Tally) -> None:
    def note(request: serve.ServeRequest) -> Any:
        tally.note("ran")
        return request.data

    endpoint = deploy(note)
    handle = serve.get_handle(endpoint).options(idempotency_key="order 17")
    one, two = handle.submit(1), handle.submit(1)
    assert one.id == two.id and two.result(timeout=30) == 1
    assert handle.submit(1).id == one.id and len(tally) == 1
    with pytest.raises(serve.KeyMisused, match="method_name, data and arguments must be the same"):
        handle.submit(2)
    assert handle.options(idempotency_key="order 18").submit(2).result(timeout=30) == 2
    with pytest.raises(serve.BadValue, match="many"):
        serve.submit_many(handle, [1])


def test_jobs_with_one_key_that_are_sent_at_once_are_one(deploy: Deploy, tally: Tally) -> None:
    def note(request: serve.ServeRequest) -> Any:
        tally.note("ran")
        return len(request.data)

    endpoint = deploy(note)

    async def main() -> tuple[set[str], list[int]]:
        handle = serve.get_handle(endpoint, sync=False).options(idempotency_key="order 17")
        jobs = await asyncio.gather(*[handle.submit((1, 2)) for _ in range(20)])  # a tuple travels as a pickle
        return {job.id for job in jobs}, await serve.gather(*jobs)

    ids, values = asyncio.run(main())
    assert len(ids) == 1 and values == [2] * 20 and len(tally) == 1


def test_a_key_is_free_again_when_its_job_was_not_accepted(client: serve.Client, deploy: Deploy) -> None:
    handle = serve.get_handle(deploy(double)).options(idempotency_key="too large at first")
    with pytest.raises(serve.TooLarge):
        handle.submit(b"x" * (65 * 1024 * 1024))
    assert handle.submit(21).result(timeout=30) == 42


# Ending and repeating.


def test_a_job_that_waits_is_cancelled_and_never_runs(deploy: Deploy, gate: Gate) -> None:
    handle = serve.get_handle(deploy(waiting_at(gate), max_concurrent_queries=1))
    first = handle.submit("first")
    wait_until(lambda: gate.came == 1)
    second = handle.submit("second")
    assert serve.job(second.id).cancel() and not second.cancel()
    with pytest.raises(serve.Cancelled):
        second.result(timeout=30)
    assert second.status().state == "cancelled"
    gate.open()
    assert first.result(timeout=30) == "first" and gate.names == ["first"]


def test_a_job_that_runs_is_cancelled(deploy: Deploy, tally: Tally) -> None:
    async def hold(request: serve.ServeRequest) -> None:
        tally.note("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            tally.note("cancelled")
            raise

    job = serve.get_handle(deploy(hold)).submit()
    wait_until(lambda: tally.lines == ["began"])
    assert job.cancel()
    wait_until(lambda: tally.lines == ["began", "cancelled"])
    with pytest.raises(serve.Cancelled):
        job.result(timeout=30)


def test_whoever_waits_is_told_of_a_cancellation_at_once(deploy: Deploy, gate: Gate) -> None:
    job = serve.get_handle(deploy(waiting_at(gate))).submit("held")
    wait_until(lambda: gate.came == 1)
    outcomes: list[BaseException] = []

    def wait() -> None:
        try:
            serve.job(job.id).result(timeout=30)
        except serve.MQServeError as error:
            outcomes.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    job.cancel()
    waiter.join(30)
    gate.open()
    assert isinstance(outcomes[0], serve.Cancelled)


def test_a_job_that_failed_is_retried_as_a_new_one(deploy: Deploy, tally: Tally) -> None:
    def fail_once(request: serve.ServeRequest) -> Any:
        tally.note("ran")
        if len(tally) == 1:
            raise OddDigit("not yet")
        return request.data

    job = serve.get_handle(deploy(fail_once)).options(tag="again").submit((1, 2))  # a tuple travels as a sealed pickle
    with pytest.raises(OddDigit):
        job.result(timeout=30)
    again = serve.job(job.id).retry()
    assert again.result(timeout=30) == (1, 2)
    assert (again.status().retry_of, again.status().tag, again.id != job.id) == (job.id, "again", True)
    with pytest.raises(OddDigit):
        job.result(timeout=30)


def test_a_job_that_goes_on_is_not_retried(deploy: Deploy, gate: Gate) -> None:
    job = serve.get_handle(deploy(waiting_at(gate))).submit(1)
    with pytest.raises(serve.JobGoesOn, match="cancel it first"):
        job.retry()
    gate.open()
    assert job.result(timeout=30) == 1


# Events.


def test_events_tell_what_happened_and_what_happens(deploy: Deploy, gate: Gate) -> None:
    async def report(request: serve.ServeRequest) -> str:
        serve.progress(0.25, "begun")
        await gate.pass_through_async()
        serve.log("almost there")
        return "done"

    job = serve.get_handle(deploy(report)).options(delay_s=0.1).submit()  # it might begin before it is known to be queued
    events = job.events()
    seen = [next(events) for _ in range(3)]
    assert [(event.kind, event.state or event.text) for event in seen] == [("state", "queued"), ("state", "running"), ("progress", "begun")]
    assert job.status().progress == 0.25 and job.status().message == "begun"
    gate.open()
    seen += list(events)
    assert [(event.kind, event.state or event.text) for event in seen[3:]] == [("log", "almost there"), ("state", "succeeded")]
    numbers = [event.seq for event in seen]
    assert numbers == sorted(set(numbers)) and all(event.at is not None for event in seen)
    assert [event.seq for event in job.events(after=seen[1].seq)] == numbers[2:]


def test_events_are_read_in_coroutines_and_by_several_readers(doubling: str) -> None:
    async def states(job: serve.Job) -> list[str]:
        return [str(event.state) async for event in job.events()]

    async def main() -> list[list[str]]:
        job = await serve.get_handle(doubling, sync=False).options(delay_s=0.5).submit(1)
        return list(await asyncio.gather(states(job), states(serve.job(job.id))))

    assert asyncio.run(main()) == [["queued", "running", "succeeded"]] * 2


def test_a_number_of_an_event_that_makes_no_sense_is_refused(doubling: str) -> None:
    with pytest.raises(serve.BadValue, match="last event"):
        serve.get_handle(doubling).submit(1).events(after=-1)


# Groups.


def test_a_group_has_one_id_and_counts(deploy: Deploy, gate: Gate) -> None:
    async def wait_or_fail(request: serve.ServeRequest) -> Any:
        if request.data == "odd":
            raise OddDigit("that is odd")
        if request.data == "held":
            await gate.pass_through_async()
        return request.data

    handle = serve.get_handle(deploy(wait_or_fail))
    group = serve.submit_many(handle, [1, "odd", "held"])
    wait_until(lambda: group.status().done == 2)
    status = serve.group(group.id).status()
    assert status == serve.GroupStatus(total=3, pending=1, succeeded=1, failed=1, cancelled=0, expired=0)
    assert not group.done()
    gate.open()
    one, error, held = serve.group(group.id).results(timeout=30, return_exceptions=True)
    assert (one, str(error), held) == (1, "that is odd", "held") and group.done()
    with pytest.raises(OddDigit):
        group.results(timeout=30)


def test_a_large_group_is_sent_from_a_coroutine_and_read_in_order(doubling: str) -> None:
    async def main() -> list[int]:
        group = await serve.submit_many(serve.get_handle(doubling, sync=False), range(500))
        return await group

    assert asyncio.run(main()) == [2 * number for number in range(500)]


def test_a_group_that_is_asked_for_as_a_job_is_told_apart_from_an_unknown_one(doubling: str) -> None:
    group = serve.submit_many(serve.get_handle(doubling), [1])
    job = serve.job(group.id)
    for ask in (job.status, job.cancel, job.result):
        with pytest.raises(serve.UnknownJob, match=r"is the id of a group, not of a job: serve\.group\("):
            ask()


def test_the_jobs_of_a_group_are_jobs(doubling: str) -> None:
    group = serve.submit_many(serve.get_handle(doubling), [1, 2, 3])
    assert sorted(job.result() for job in serve.as_completed(group.jobs, timeout=30)) == [2, 4, 6]
    assert serve.job(group.jobs[2].id).result(timeout=30) == 6
    assert serve.submit_many(serve.get_handle(doubling), []).results() == []


def test_a_group_is_cancelled_as_one(deploy: Deploy, gate: Gate) -> None:
    group = serve.submit_many(serve.get_handle(deploy(waiting_at(gate))), ["a", "b"])
    assert group.cancel() == 2 and group.cancel() == 0
    assert wait_until(group.done)
    assert group.status().cancelled == 2
    gate.open()


def test_a_group_whose_sending_fails_says_how_much_was_sent(doubling: str) -> None:
    with pytest.raises(serve.NotEncodable) as caught:
        serve.submit_many(serve.get_handle(doubling), [*range(250), threading.Lock()])
    assert "200 of the 251 jobs of group" in caught.value.__notes__[0]


def test_nothing_is_known_of_a_group_that_nobody_sent(doubling: str) -> None:
    with pytest.raises(serve.UnknownJob, match="group"):
        serve.group("0" * 32)
    with pytest.raises(serve.BadType, match="handle"):
        serve.submit_many("double", [1])  # type: ignore[call-overload]


# Other processes.

READ = """
import sys
import mqserve as serve
serve.connect()
job = serve.job(sys.argv[1])
print(job.result(timeout=30), job.status().state, [str(event.state) for event in job.events()])
"""


@distributed_only
def test_a_job_is_read_in_another_process(doubling: str, environment: dict[str, str]) -> None:
    job = serve.get_handle(doubling).options(delay_s=0.5).submit(21)
    read = subprocess.run([sys.executable, "-c", READ, job.id], env=environment, capture_output=True, text=True, timeout=60)
    assert read.stdout == "42 succeeded ['queued', 'running', 'succeeded']\n", read.stderr


FORKED = """
import os, sys
import mqserve as serve
serve.connect()
handle = serve.get_handle(sys.argv[1])
job = handle.options(delay_s=0.5).submit(21)
events = job.events()
print(next(events).state, flush=True)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(job.result(timeout=30), job.status().state, [str(event.state) for event in events], handle.submit(1).result(timeout=30), flush=True)
serve.shutdown()
os._exit(0)
"""


@distributed_only
def test_a_forked_child_goes_on_with_a_job(doubling: str, environment: dict[str, str]) -> None:
    forked = subprocess.run([sys.executable, "-c", FORKED, doubling], env=environment, capture_output=True, text=True, timeout=60)
    assert forked.stdout == "queued\n42 succeeded ['running', 'succeeded'] 2\n", forked.stderr


@distributed_only
def test_a_job_of_a_handler_outlives_the_request_that_sent_it(deploy: Deploy, doubling: str) -> None:
    def send(request: serve.ServeRequest) -> str:
        return serve.get_handle(doubling).options(delay_s=1).submit(request.data).id

    job_id = serve.get_handle(deploy(send)).options(request_timeout_s=30).remote(21).result(timeout=30)
    assert serve.job(job_id).result(timeout=30) == 42
