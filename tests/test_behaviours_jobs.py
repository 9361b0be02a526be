"""How jobs run, in both forms: their places beside requests, what their handlers may say, how they are tried again, and how they end."""

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import mqserve as serve
from mqserve.broker.jobs import EventKind, JobState
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally


def ended(job: serve.Job) -> serve.JobStatus:
    """The status of a job once it has ended."""
    return wait_until(lambda: status if (status := job.status()).state.is_final else None, told=job.status) or job.status()


def test_a_job_runs_once_and_its_record_says_so(client: serve.Client, deploy: Deploy) -> None:
    def double(request: serve.ServeRequest) -> int:
        return 2 * int(request.data)

    job = client.get_handle(deploy(double)).submit(21)
    assert job.result(30) == 42
    status = ended(job)
    assert (status.state, status.attempts, status.status) == (JobState.SUCCEEDED, 1, 200)
    assert status.started_at is not None and status.ended_at is not None and status.started_at <= status.ended_at


def test_a_job_may_run_for_longer_than_request_timeout_s(client: serve.Client, deploy: Deploy, gate: Gate) -> None:
    async def wait(request: serve.ServeRequest) -> str:
        began = time.monotonic()
        await gate.pass_through_async()
        assert serve.cancelled() is False
        return "done" if time.monotonic() - began > 0.5 else "too early"

    job = client.get_handle(deploy(wait, request_timeout_s=0.2)).submit()
    wait_until(lambda: gate.came == 1)
    time.sleep(0.6)
    gate.open()
    assert job.result(30) == "done"


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_run_that_takes_longer_than_job_timeout_s_fails_and_can_notice_it(
    client: serve.Client, deploy: Deploy, tally: Tally, kind: str
) -> None:
    def plain(request: serve.ServeRequest) -> None:
        while not serve.cancelled():
            time.sleep(0.01)
        tally.note("noticed")

    async def coroutine(request: serve.ServeRequest) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            tally.note("noticed")

    job = client.get_handle(deploy(plain if kind == "plain" else coroutine, job_timeout_s=0.3)).submit()
    with pytest.raises(serve.RequestTimeout, match="job_timeout_s"):
        job.result(30)
    status = ended(job)
    assert (status.state, status.status, status.attempts) == (JobState.FAILED, 504, 1)
    wait_until(lambda: tally.lines == ["noticed"])


def test_a_handler_knows_the_number_and_the_deadline_of_its_run(client: serve.Client, deploy: Deploy) -> None:
    def handler(request: serve.ServeRequest) -> Any:
        return [request.attempt, (request.deadline - datetime.now(UTC)).total_seconds()]

    handle = client.get_handle(deploy(handler, job_timeout_s=1000, request_timeout_s=50))
    attempt, left_s = handle.submit().result(30)
    assert attempt == 1 and 900 < left_s <= 1000
    attempt, left_s = handle.remote().result(30)
    assert attempt == 1 and 0 < left_s <= 50


@pytest.mark.parametrize("kind", ["plain", "async", "batch", "at most once"])
def test_requests_do_not_wait_behind_a_job_that_has_all_places_of_a_replica(
    client: serve.Client, deploy: Deploy, gate: Gate, kind: str
) -> None:
    def plain(request: serve.ServeRequest) -> str:
        if request.data == "job":
            gate.pass_through()
        return serve.get_current_replica_tag()

    async def coroutine(request: serve.ServeRequest) -> str:
        if request.data == "job":
            await gate.pass_through_async()
        return serve.get_current_replica_tag()

    @serve.accept_batch
    def batch(requests: list[serve.ServeRequest]) -> list[str]:
        return [plain(request) for request in requests]

    handlers: dict[str, Any] = {"plain": plain, "async": coroutine, "batch": batch, "at most once": plain}
    config: dict[str, Any] = {
        "async": {"max_concurrent_queries": 1},
        "batch": {"max_batch_size": 2},
        "at most once": {"delivery": "at_most_once"},
    }
    handle = client.get_handle(deploy(handlers[kind], num_replicas=2, **config.get(kind, {})))
    job = handle.submit("job")
    wait_until(lambda: gate.came == 1)
    tags = {future.result(20) for future in [handle.remote("request") for _ in range(20)]}
    gate.open()
    assert len(tags) == 1 and job.result(30) not in tags


class Flaky(Exception):
    """Whatever a handler may raise."""


class Flakier(Flaky): ...


def failing(tally: Tally, until: int, error: Callable[[], Exception]) -> Callable[[serve.ServeRequest], int]:
    """Fails until its run of that number."""

    def handler(request: serve.ServeRequest) -> int:
        tally.note(request.attempt)
        if request.attempt < until:
            raise error()
        return request.attempt

    return handler


def test_a_job_that_failed_is_tried_again_and_its_history_says_why(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    retry = serve.Retry(attempts=3, on=(Flaky,), backoff_s=0.1)
    job = client.get_handle(deploy(failing(tally, 3, lambda: Flakier("not yet")), retry=retry)).submit()
    assert job.result(60) == 3
    status = ended(job)
    assert status.state is JobState.SUCCEEDED and tally.lines == ["1", "2", "3"]
    assert ["not yet" in run.error for run in status.history] == [True, True, False]


def test_after_its_last_attempt_a_job_has_failed_with_the_error_of_its_handler_and_is_a_dead_letter(
    client: serve.Client, deploy: Deploy, tally: Tally
) -> None:
    retry = {"attempts": 2, "on": ["OSError"], "backoff_s": 0.1}
    job = client.get_handle(deploy(failing(tally, 9, lambda: FileNotFoundError("no such file")), retry=retry)).submit()
    with pytest.raises(FileNotFoundError, match="no such file"):
        job.result(60)
    assert ended(job).state is JobState.FAILED and tally.lines == ["1", "2"]


def test_a_job_with_a_large_body_can_be_sent_once_more(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    def measure(request: serve.ServeRequest) -> int:
        tally.note()
        if len(tally) == 1:
            raise ValueError("not now")
        return len(request.data)

    job = client.get_handle(deploy(measure)).submit("x" * 1_500_000)
    with pytest.raises(ValueError, match="not now"):
        job.result(30)
    again = job.retry()
    assert again.result(30) == 1_500_000 and again.status().retry_of == job.id


def test_an_error_that_retry_does_not_name_is_the_result_at_once(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    job = client.get_handle(deploy(failing(tally, 9, lambda: KeyError("a")), retry=serve.Retry(on=(OSError,), backoff_s=0.1))).submit()
    with pytest.raises(KeyError):
        job.result(60)
    assert tally.lines == ["1"]


def test_a_request_that_somebody_waits_for_is_not_tried_again(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    handle = client.get_handle(deploy(failing(tally, 9, lambda: OSError("gone")), retry=serve.Retry(backoff_s=0.1)))
    with pytest.raises(OSError, match="gone"):
        handle.remote().result(30)
    assert tally.lines == ["1"]


def test_a_handler_may_ask_to_be_called_later(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    job = client.get_handle(deploy(failing(tally, 2, lambda: serve.RetryLater(0.1)))).submit()
    assert job.result(60) == 2
    assert tally.lines == ["1", "2"]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_a_handler_says_is_heard_by_who_follows_its_job(client: serve.Client, deploy: Deploy, kind: str) -> None:
    def speak(request: serve.ServeRequest) -> str:
        serve.progress(0.25, "reading")
        serve.log("a line")
        return "done"

    async def speak_from_a_thread(request: serve.ServeRequest) -> str:
        await asyncio.to_thread(speak, request)
        return "done"

    handle = client.get_handle(deploy(speak if kind == "plain" else speak_from_a_thread))
    job = handle.submit()
    assert job.result(30) == "done"
    events = [(event.kind, event.text, event.fraction) for event in job.events() if event.kind is not EventKind.STATE]
    assert events == [(EventKind.LOG, "a line", None), (EventKind.PROGRESS, "reading", 0.25)]
    assert ended(job).progress == 0.25
    assert handle.remote().result(30) == "done", "nobody hears it, and nothing happens"


def test_the_last_progress_is_told_and_a_flood_is_not(client: serve.Client, deploy: Deploy) -> None:
    def count(request: serve.ServeRequest) -> None:
        for step in range(1, 10_001):
            serve.progress(step / 10_000)
            serve.log(f"step {step}")

    job = client.get_handle(deploy(count)).submit()
    job.result(60)
    events = list(job.events())
    assert [event.fraction for event in events if event.kind is EventKind.PROGRESS][-1] == 1.0
    assert len(events) < 100


def test_a_job_that_waits_is_cancelled_and_never_runs(client: serve.Client, deploy: Deploy, gate: Gate) -> None:
    def wait(request: serve.ServeRequest) -> None:
        gate.pass_through(request.data)

    handle = client.get_handle(deploy(wait, max_concurrent_queries=1))
    first = handle.submit("first")
    wait_until(lambda: gate.came == 1)
    second = handle.submit("second")
    assert second.cancel()
    assert ended(second).state is JobState.CANCELLED
    gate.open()
    first.result(30)
    assert handle.submit("third").result(30) is None
    assert sorted(gate.names) == ["first", "third"]


def test_a_job_that_runs_is_cancelled(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    async def sleep(request: serve.ServeRequest) -> None:
        try:
            tally.note("begun")
            await asyncio.sleep(60)
        finally:
            tally.note("ended")

    job = client.get_handle(deploy(sleep)).submit()
    wait_until(lambda: tally.lines == ["begun"])
    assert job.cancel()
    wait_until(lambda: tally.lines == ["begun", "ended"])
    status = ended(job)
    assert status.state is JobState.CANCELLED and status.attempts == 1
    with pytest.raises(serve.Cancelled):
        job.result(30)


def test_a_job_that_was_not_begun_in_time_never_runs(client: serve.Client, deploy: Deploy, gate: Gate) -> None:
    def wait(request: serve.ServeRequest) -> None:
        gate.pass_through(request.data)

    handle = client.get_handle(deploy(wait, max_concurrent_queries=1))
    first = handle.submit("first")
    wait_until(lambda: gate.came == 1)
    late = handle.options(expires_s=0.2).submit("late")
    time.sleep(0.3)
    gate.open()
    first.result(30)
    assert ended(late).state is JobState.EXPIRED
    assert gate.names == ["first"]


def test_what_a_generator_yields_is_collected(client: serve.Client, deploy: Deploy) -> None:
    def count(request: serve.ServeRequest) -> Any:
        yield from range(request.data)

    assert client.get_handle(deploy(count)).submit(4).result(30) == [0, 1, 2, 3]


def test_what_a_job_yields_is_heard_before_it_has_ended(client: serve.Client, deploy: Deploy, gate: Gate) -> None:
    def write(request: serve.ServeRequest) -> Any:
        yield "once "
        gate.pass_through()
        yield "upon "
        yield {"a": "time"}
        yield b"\xff"

    job = client.get_handle(deploy(write)).submit()
    seen = ""
    for event in job.events():
        if event.kind is EventKind.CHUNK and not seen:
            assert (event.text, event.data, event.cut, job.status().state) == ("once ", b"", False, JobState.RUNNING)
            gate.open()
        seen += event.text or event.data.decode(errors="replace")
    assert seen == 'once upon {"a":"time"}\n\ufffd'
    assert job.result() == ["once ", "upon ", {"a": "time"}, b"\xff"]


def test_a_run_that_is_tried_again_tells_all_anew(client: serve.Client, deploy: Deploy) -> None:
    def write(request: serve.ServeRequest) -> Any:
        yield f"run {request.attempt}, "
        if request.attempt == 1:
            raise OSError
        yield "done"

    job = client.get_handle(deploy(write, retry=serve.Retry(attempts=2, backoff_s=0.1))).submit()
    job.result(30)
    seen = [str(event.state or event.text) for event in job.events()]
    assert "".join(seen).removeprefix("queued") == "runningrun 1, queuedrunningrun 2, donesucceeded"
    assert [event.offset for event in job.events() if event.text.startswith("run ")] == [0, 0]


def test_of_a_long_answer_the_beginning_is_heard_and_the_rest_is_in_the_result(client: serve.Client, deploy: Deploy) -> None:
    def write(request: serve.ServeRequest) -> Any:
        for _ in range(40):
            yield "x" * 50_000

    job = client.get_handle(deploy(write)).submit()
    assert len("".join(job.result(30))) == 2_000_000
    chunks = [event for event in job.events() if event.kind is EventKind.CHUNK]
    assert 900_000 < sum(len(event.text) for event in chunks) < 1_100_000
    assert [event.cut for event in chunks].count(True) == 1 and chunks[-1].cut


def flood(client: serve.Client, name: str, senders: int, until: threading.Event, took_s: list[float]) -> list[threading.Thread]:
    """Threads that send requests one after the other."""

    def send() -> None:
        handle = client.get_handle(name)
        while not until.is_set():
            began = time.monotonic()
            handle.remote("wait").result(60)
            took_s.append(time.monotonic() - began)

    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("kind", ["async", "plain", "plain and slow"])
def test_jobs_progress_while_requests_saturate_their_replica(client: serve.Client, deploy: Deploy, kind: str) -> None:
    async def coroutine(request: serve.ServeRequest) -> str:
        await asyncio.sleep(0.02)
        return "ok"

    def plain(request: serve.ServeRequest) -> str:
        time.sleep(0.002 if kind == "plain" else 0.1)
        return "ok"

    name = deploy(coroutine, max_concurrent_queries=2) if kind == "async" else deploy(plain)
    is_over = threading.Event()
    threads = flood(client, name, 8, is_over, [])
    try:
        handle = client.get_handle(name)
        jobs = [handle.submit("job") for _ in range(6)]
        assert [job.result(60) for job in jobs] == ["ok"] * 6
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_requests_go_on_while_jobs_saturate_their_replica(client: serve.Client, deploy: Deploy) -> None:
    async def handler(request: serve.ServeRequest) -> str:
        await asyncio.sleep(1 if request.data == "job" else 0.001)
        return "ok"

    name = deploy(handler)
    handle = client.get_handle(name)
    jobs = [handle.submit("job") for _ in range(100)]
    wait_until(lambda: any(job.status().state is JobState.RUNNING for job in jobs[:10]))
    took_s: list[float] = []
    is_over = threading.Event()
    threads = flood(client, name, 4, is_over, took_s)
    assert [job.result(60) for job in jobs] == ["ok"] * 100
    is_over.set()
    for thread in threads:
        thread.join()
    assert len(took_s) > 100 and sorted(took_s)[len(took_s) * 99 // 100] < 0.5, "they do not stand behind jobs"


def test_no_more_run_at_a_time_than_max_concurrent_queries(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    class Counting:
        def __init__(self) -> None:
            self.running = 0

        async def __call__(self, request: serve.ServeRequest) -> None:
            self.running += 1
            tally.note(self.running)
            await asyncio.sleep(0.02)
            self.running -= 1

    handle = client.get_handle(deploy(Counting, max_concurrent_queries=3, job_slots=3))
    jobs = [handle.submit() for _ in range(20)]
    refs = [handle.remote() for _ in range(20)]
    serve.get(refs, timeout=60)
    for job in jobs:
        job.result(60)
    assert len(tally) == 40 and max(map(int, tally.lines)) <= 3


def test_a_job_whose_call_never_ends_costs_its_replica_and_has_failed_before(client: serve.Client, deploy: Deploy, gate: Gate) -> None:
    def wait(request: serve.ServeRequest) -> str:
        if request.data == "stuck":
            gate.pass_through()
        return "done"

    handle = client.get_handle(deploy(wait, job_timeout_s=0.3))
    stuck = handle.submit("stuck")
    with pytest.raises(serve.RequestTimeout):
        stuck.result(10)
    assert handle.submit("next").result(60) == "done", "the replica is replaced 10 s later"
    assert ended(stuck).attempts == 1 and gate.came == 1
    gate.open()


def test_a_roll_out_loses_no_job(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    async def work(request: serve.ServeRequest) -> int:
        await asyncio.sleep(0.05)
        tally.note(request.data)
        return int(request.data)

    name = deploy(work, max_concurrent_queries=4, graceful_shutdown_timeout_s=5)
    handle = client.get_handle(name)
    jobs = [handle.submit(number) for number in range(60)]
    client.update_backend(name, work)
    assert [job.result(60) for job in jobs] == list(range(60))
    assert sorted(map(int, tally.lines)) == list(range(60)), "each ran once"
    assert {job.status().attempts for job in jobs} == {1}
