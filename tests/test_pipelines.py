"""Pipelines, in both forms: a request that is a job of several stages, each of which gets the result of the one before it."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, new_name, wait_until
from tests.tallies import Tally
from tests.test_events import events_of
from tests.test_jobs_over_http import ASYNC, state_of

LARGE = 1_500_000  # bytes: beyond what travels in a message or in a result


def clean(request: Any) -> Any:
    return request.data.strip() if isinstance(request.data, str) else request.data


def measure(request: Any) -> Any:
    return {"of": request.data, "size": len(request.data)}


def wrap(request: Any) -> Any:
    return [request.data]


@pytest.fixture(scope="module")
def stages(client: serve.Client) -> Iterator[list[str]]:
    deploy = Deploy(client)
    yield [deploy(clean), deploy(measure), deploy(wrap)]
    for name in client.list_pipelines():
        client.delete_pipeline(name)
    deploy.undo()


@contextmanager
def made_of(stages: list[str], route: str | None = None) -> Iterator[str]:
    name = new_name("p")
    serve.create_pipeline(name, stages, route=route)
    try:
        yield name
    finally:
        serve.delete_pipeline(name)


@pytest.fixture
def pipeline(stages: list[str]) -> Iterator[str]:
    with made_of(stages) as name:
        yield name


def counting(tally: Tally, word: str, work: Callable[[Any], Any] = lambda data: data) -> Any:
    def handler(request: Any) -> Any:
        tally.note(word)
        return work(request.data)

    return handler


def failing_once(tally: Tally) -> Callable[[Any], Any]:
    def work(data: Any) -> Any:
        if tally.lines.count("fails") == 1:
            raise OSError("not the first time")
        return data

    return work


def ended(job: serve.Job) -> serve.JobStatus | None:
    status = job.status()
    return status if status.state.is_final else None


# Through all stages.


def test_a_job_goes_through_all_stages_under_one_id(pipeline: str, stages: list[str]) -> None:
    job = serve.get_handle(pipeline).submit(" abc ")
    assert job.result(timeout=30) == serve.job(job.id).result(timeout=30) == [{"of": "abc", "size": 3}]
    status = job.status()
    assert (status.state, status.endpoint, status.status, status.position) == ("succeeded", pipeline, 200, None)
    assert [stage.endpoint for stage in status.stages] == stages
    assert [serve.job(stage.id).status().state for stage in status.stages] == ["succeeded"] * 3
    assert serve.job(status.stages[1].id).result(timeout=30) == {"of": "abc", "size": 3}


def test_its_events_tell_of_each_stage(pipeline: str, stages: list[str]) -> None:
    job = serve.get_handle(pipeline).submit("abc")
    told = [event.state or event.text for event in job.events() if event.state != "queued"]  # which one that begins at once never was
    lines = [f"stage {name} ({number} of 3)" for number, name in enumerate(stages, start=1)]
    assert told == ["running", *lines, "succeeded"]


def test_a_plain_call_waits_for_the_last_stage(pipeline: str) -> None:
    assert serve.get_handle(pipeline).remote("abc").result(timeout=30) == [{"of": "abc", "size": 3}]

    async def main() -> Any:
        return await (await serve.get_handle(pipeline, sync=False).remote("ab"))

    assert asyncio.run(main()) == [{"of": "ab", "size": 2}]
    assert list(serve.get_handle(pipeline).map(["a", "bc"])) == [[{"of": "a", "size": 1}], [{"of": "bc", "size": 2}]]


def test_no_stage_waits_for_somebody_to_look(pipeline: str) -> None:
    handle = serve.get_handle(pipeline)
    began = time.monotonic()
    for _ in range(10):
        handle.submit("abc").result(timeout=30)
    assert time.monotonic() - began < 10, "20 times the leader has passed a result on"


def test_many_of_them_are_a_group(pipeline: str) -> None:
    group = serve.submit_many(serve.get_handle(pipeline), ["a", "bc"])
    assert group.results(timeout=30) == [[{"of": "a", "size": 1}], [{"of": "bc", "size": 2}]]


def test_a_pipeline_of_one_stage_is_that_stage(stages: list[str]) -> None:
    with made_of(stages[1:2]) as name:
        assert serve.get_handle(name).submit("abc").result(timeout=30) == {"of": "abc", "size": 3}


def test_an_endpoint_may_be_several_stages(stages: list[str]) -> None:
    with made_of([stages[2]] * 3) as name:
        assert serve.get_handle(name).submit(1).result(timeout=30) == [[[1]]]


@pytest.mark.parametrize("value", [(1, 2), date(2026, 1, 2), {"a": {1, 2}}, None, b"\x00"], ids=repr)
def test_any_object_goes_from_stage_to_stage(stages: list[str], value: Any) -> None:
    with made_of([stages[0], stages[0], stages[2]]) as name:
        assert serve.get_handle(name).submit(value).result(timeout=30) == [value]


def test_large_results_go_from_stage_to_stage(stages: list[str]) -> None:
    with made_of([stages[0], stages[0]]) as name:
        array = np.arange(LARGE // 8)
        assert serve.get_handle(name).submit(array).result(timeout=60).tolist() == array.tolist()


def test_a_web_client_waits_for_the_last_stage(stages: list[str], url: str) -> None:
    route = f"/{new_name('r')}"
    with made_of(stages, route):
        with httpx.Client(timeout=30) as connection:
            for path in (route, route.replace("r", "%72", 1), route):  # what is plain until its route is known, one after the other
                answer = connection.post(f"{url}{path}", json="abc ")
                assert (answer.status_code, answer.json()) == (200, [{"of": "abc", "size": 3}])
                assert connection.get(f"{url}/-/routes").status_code in (200, 403)
        assert state_of(url, answer.headers["x-request-id"])["status"] == "succeeded"


def test_a_web_client_may_send_its_body_in_parts_and_ask_for_the_head_alone(stages: list[str], url: str) -> None:
    route = f"/{new_name('r')}"
    with made_of(stages, route):
        answer = httpx.post(f"{url}{route}", content=iter([b"a", b"bc"]), headers={"Content-Type": "text/plain"}, timeout=30)
        assert answer.json() == [{"of": "abc", "size": 3}]
        assert (answer := httpx.head(f"{url}{route}", headers={"Content-Type": "text/plain"}, timeout=30)).status_code == 200
        assert not answer.content and int(answer.headers["content-length"]) > 0
        assert httpx.put(f"{url}{route}").status_code == 405


def test_a_web_clients_job_is_found_by_its_id_with_its_stages(stages: list[str], url: str) -> None:
    route = f"/{new_name('r')}"
    with made_of(stages, route) as name:
        answer = httpx.post(f"{url}{route}", content="abc", headers={**ASYNC, "Content-Type": "text/plain"})
        assert answer.status_code == 202
        found = state_of(url, answer.json()["id"], wait_s=30)
        assert (found["status"], found["endpoint"]) == ("succeeded", name)
        assert [(stage["endpoint"], stage["status"]) for stage in found["stages"]] == [(stage, "succeeded") for stage in stages]
        assert httpx.get(f"{url}{found['result_url']}").json() == [{"of": "abc", "size": 3}]
        lines = [event.data for event in events_of(httpx.get(f"{url}{found['events_url']}")) if event.kind == "log"]
        assert len(lines) == 3


@pytest.mark.parametrize(
    ("answer", "arrives"),
    [
        (b"\xff\x00", "b'\\xff\\x00'"),
        ("grüße", "'grüße'"),
        (None, "None"),
        ([1, None], "[1, None]"),
    ],
    ids=repr,
)
def test_what_a_stage_answers_a_web_client_arrives_at_the_next_as_a_handle_would_get_it(
    deploy: Deploy, url: str, answer: Any, arrives: str
) -> None:
    route = f"/{new_name('r')}"
    with made_of([deploy(lambda _: answer), deploy(lambda request: repr(request.data))], route):
        assert httpx.get(f"{url}{route}", timeout=30).text == arrives


def test_large_bodies_of_web_clients_go_from_stage_to_stage(stages: list[str], url: str) -> None:
    route = f"/{new_name('r')}"
    with made_of([stages[0], stages[0]], route):
        text = "x" * LARGE
        answer = httpx.post(f"{url}{route}", content=text, headers={"Content-Type": "text/plain"}, timeout=60)
        assert answer.text == text


def test_a_key_has_one_pipeline_run_for_two_requests(deploy: Deploy, stages: list[str], url: str, tally: Tally) -> None:
    route, headers = f"/{new_name('r')}", {"Idempotency-Key": new_name("k")}
    with made_of([deploy(counting(tally, "first")), stages[2]], route):
        first, second = (httpx.post(f"{url}{route}", json=1, headers=headers, timeout=30) for _ in range(2))
    assert first.json() == second.json() == [1]
    assert second.headers["idempotent-replayed"] == "true"
    assert tally.lines == ["first"]


# A stage fails.


def test_a_stage_that_fails_ends_the_pipeline_with_its_error(deploy: Deploy, stages: list[str], tally: Tally) -> None:
    def refuse(data: Any) -> Any:
        raise LookupError(f"no {data}")

    with made_of([stages[0], deploy(counting(tally, "refuses", refuse)), deploy(counting(tally, "never"))]) as name:
        job = serve.get_handle(name).submit("abc")
        with pytest.raises(LookupError, match="no abc"):
            job.result(timeout=30)
        status = job.status()
        assert (status.state, status.status) == ("failed", 500)
        assert [stage.state for stage in status.stages] == ["succeeded", "failed", None]
    assert tally.lines == ["refuses"]


def test_a_retry_goes_on_from_the_stage_that_failed(deploy: Deploy, stages: list[str], tally: Tally) -> None:
    before, fails = deploy(counting(tally, "before")), deploy(counting(tally, "fails", failing_once(tally)))
    with made_of([before, fails, stages[2]]) as name:
        job = serve.get_handle(name).submit((1, 2))
        with pytest.raises(OSError, match="not the first time"):
            job.result(timeout=30)
        again = job.retry()
        assert again.result(timeout=30) == [(1, 2)]
        status = again.status()
        assert (status.retry_of, [stage.state for stage in status.stages]) == (job.id, ["succeeded"] * 3)
        assert status.stages[0] == job.status().stages[0] and status.stages[1] != job.status().stages[1]
        with pytest.raises(serve.BadValue, match="is a stage of pipeline"):
            serve.job(job.status().stages[1].id).retry()
    assert tally.lines == ["before", "fails", "fails"]


def test_a_web_client_retries_from_the_stage_that_failed(deploy: Deploy, stages: list[str], url: str, tally: Tally) -> None:
    route = f"/{new_name('r')}"
    before, fails = deploy(counting(tally, "before")), deploy(counting(tally, "fails", failing_once(tally)))
    with made_of([before, fails, stages[2]], route):
        answer = httpx.post(f"{url}{route}", json={"a": 1}, timeout=30)
        assert answer.status_code == 500 and answer.json()["stage"] == fails
        retried = httpx.post(f"{url}/-/futures/{answer.headers['x-request-id']}/retry")
        assert retried.status_code == 202
        assert state_of(url, retried.json()["id"], wait_s=30)["status"] == "succeeded"
        assert httpx.get(f"{url}{retried.json()['result_url']}").json() == [{"a": 1}]
    assert tally.lines == ["before", "fails", "fails"]


def test_a_pipeline_that_has_succeeded_is_retried_from_its_beginning(deploy: Deploy, tally: Tally) -> None:
    with made_of([deploy(counting(tally, "one")), deploy(counting(tally, "two"))]) as name:
        job = serve.get_handle(name).submit(1)
        assert job.result(timeout=30) == job.retry().result(timeout=30) == 1
    assert tally.lines == ["one", "two", "one", "two"]


def test_a_stage_is_tried_again_as_its_backend_says(deploy: Deploy, stages: list[str], tally: Tally) -> None:
    retry = serve.Retry(attempts=3, on=(OSError,), backoff_s=0.01)
    with made_of([stages[0], deploy(counting(tally, "fails", failing_once(tally)), retry=retry), stages[2]]) as name:
        assert serve.get_handle(name).submit("abc").result(timeout=30) == ["abc"]
    assert tally.lines == ["fails", "fails"]


def test_an_answer_that_is_no_success_goes_to_no_other_stage(deploy: Deploy, url: str, tally: Tally) -> None:
    def refuse(data: Any) -> Any:
        raise serve.HTTPException(404, "no such thing")

    route = f"/{new_name('r')}"
    refusing = deploy(counting(tally, "refuses", refuse))
    with made_of([refusing, deploy(counting(tally, "never"))], route):
        answer = httpx.get(f"{url}{route}", timeout=30)
        assert (answer.status_code, answer.json()["detail"]) == (404, "no such thing")
        assert answer.json()["stage"] == refusing
    assert tally.lines == ["refuses"]


# Its end.


def test_cancelling_it_cancels_the_stage_under_way_and_no_other_begins(deploy: Deploy, stages: list[str], gate: Gate, tally: Tally) -> None:
    async def wait(request: Any) -> Any:
        await gate.pass_through_async()

    with made_of([stages[0], deploy(wait), deploy(counting(tally, "never"))]) as name:
        job = serve.get_handle(name).submit("abc")
        wait_until(lambda: gate.came)
        assert job.status().state == "running"
        assert job.cancel()
        with pytest.raises(serve.Cancelled):
            job.result(timeout=30)
        assert [stage.state for stage in job.status().stages] == ["succeeded", "cancelled", None]
        gate.open()
        assert not job.cancel()
    assert not tally.lines


def test_cancelling_the_stage_ends_its_pipeline(deploy: Deploy, stages: list[str], gate: Gate) -> None:
    async def wait(request: Any) -> Any:
        await gate.pass_through_async()

    with made_of([deploy(wait), stages[0]]) as name:
        job = serve.get_handle(name).submit(1)
        wait_until(lambda: gate.came)
        assert serve.job(job.status().stages[0].id).cancel()
        with pytest.raises(serve.Cancelled):
            job.result(timeout=30)
        gate.open()


def test_a_call_that_is_cancelled_cancels_its_pipeline(deploy: Deploy, stages: list[str], gate: Gate) -> None:
    async def wait(request: Any) -> Any:
        await gate.pass_through_async()

    with made_of([deploy(wait), stages[0]]) as name:
        ref = serve.get_handle(name).remote(1)
        wait_until(lambda: gate.came)
        assert ref.cancel()
        wait_until(lambda: serve.job(ref.id).status().state == "cancelled")
        wait_until(lambda: serve.job(ref.id).status().stages[0].state == "cancelled")
        gate.open()


def test_a_call_that_is_cancelled_while_it_is_sent_leaves_no_pipeline_behind(deploy: Deploy, stages: list[str], gate: Gate) -> None:
    async def wait(request: Any) -> Any:
        await gate.pass_through_async()

    def has_ended(job_id: str) -> bool:
        try:
            return serve.job(job_id).status().state == "cancelled"
        except serve.UnknownJob:
            return True  # it was never sent

    with made_of([deploy(wait), stages[0]]) as name:
        handle = serve.get_handle(name)
        refs = []
        for number in range(40):
            refs.append(handle.remote(number))
            time.sleep(0.0002 * (number % 20))  # so that some of them are on their way to the broker, and not there yet
            assert refs[-1].cancel()
        handle.submit("the last one").status()  # what was sent before is known by now
        wait_until(lambda: all(has_ended(ref.id) for ref in refs))
        gate.open()


def test_a_pipeline_begins_at_its_time(pipeline: str) -> None:
    job = serve.get_handle(pipeline).options(delay_s=0.5).submit("abc")
    status = job.status()
    assert (status.state, status.not_before is not None) == ("queued", True)
    assert job.result(timeout=30) == [{"of": "abc", "size": 3}]


def test_what_its_sender_says_holds_for_all_stages(pipeline: str) -> None:
    tag = new_name("t")
    job = serve.get_handle(pipeline).options(tag=tag, priority="low").submit("abc")
    job.result(timeout=30)
    for one in (job, *(serve.job(stage.id) for stage in job.status().stages)):
        assert (one.status().tag, one.status().priority) == (tag, "low")


# What is declared.


def test_pipelines_are_listed_beside_the_endpoints(pipeline: str, stages: list[str]) -> None:
    assert serve.list_pipelines()[pipeline] == {"route": None, "methods": ["GET", "POST"], "stages": stages}
    assert pipeline not in serve.list_endpoints()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ([], serve.BadValue, "has 0 stages"),
        ("clean", serve.BadType, "as a list"),
        ([1], serve.BadType, "as a list"),
        (["nowhere"], serve.BadValue, "there is no endpoint 'nowhere'"),
    ],
)
def test_stages_that_are_none_are_refused(client: serve.Client, given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        serve.create_pipeline(new_name("p"), given)


def test_names_and_routes_that_are_taken_are_refused(pipeline: str, stages: list[str]) -> None:
    with pytest.raises(serve.BadValue, match=f"there is a pipeline '{pipeline}' already"):
        serve.create_pipeline(pipeline, stages)
    with pytest.raises(serve.BadValue, match=f"there is an endpoint '{stages[0]}' already"):
        serve.create_pipeline(stages[0], stages)
    with pytest.raises(serve.BadValue, match="is a pipeline itself"):
        serve.create_pipeline(new_name("p"), [pipeline])
    route = f"/{new_name('r')}"
    with made_of(stages, route), pytest.raises(serve.BadValue, match="belongs to endpoint"):
        serve.create_pipeline(new_name("p"), stages, route=route)


def test_endpoints_and_pipelines_are_each_deleted_by_their_own(pipeline: str, stages: list[str]) -> None:
    with pytest.raises(serve.BadValue, match=f"is a stage of pipeline '{pipeline}'"):
        serve.delete_endpoint(stages[0])
    with pytest.raises(serve.BadValue, match="delete it with delete_pipeline"):
        serve.delete_endpoint(pipeline)
    with pytest.raises(serve.BadValue, match="no pipeline"):
        serve.delete_pipeline(stages[0])
    with pytest.raises(serve.BadValue, match="has no traffic of its own"):
        serve.set_traffic(pipeline, {stages[0]: 1.0})
    serve.delete_pipeline("nothing")


def test_a_pipeline_answers_in_one_piece(pipeline: str) -> None:
    with pytest.raises(serve.BadValue, match="in one piece"):
        serve.get_handle(pipeline).stream("abc")


def test_backends_and_their_pipeline_are_declared_together(client: serve.Client) -> None:
    names = [new_name("b") for _ in range(2)]
    pipeline = new_name("p")
    with serve.deploying():
        for name in names:
            serve.create_backend(name, wrap)
            serve.create_endpoint(name, backend=name)
        serve.create_pipeline(pipeline, names)
    assert serve.get_handle(pipeline).submit(1).result(timeout=30) == [[1]]
    with serve.deploying():
        serve.delete_pipeline(pipeline)
        for name in names:
            serve.delete_endpoint(name)
            serve.delete_backend(name)
    assert pipeline not in serve.list_pipelines()


def test_a_schedule_may_call_a_pipeline(pipeline: str) -> None:
    schedule = new_name("s")
    serve.schedule(schedule, pipeline, cron="* * * * * *", data="abc")
    try:
        wait_until(lambda: serve.list_schedules()[schedule].last_job)
        assert serve.job(serve.list_schedules()[schedule].last_job).result(timeout=30) == [{"of": "abc", "size": 3}]
    finally:
        serve.delete_schedule(schedule)


@distributed_only
def test_a_dead_stage_that_is_sent_again_has_its_pipeline_go_on(
    deploy: Deploy, stages: list[str], tally: Tally, environment: dict[str, str], tmp_path: Path
) -> None:
    def fail_twice(data: Any) -> Any:
        if tally.lines.count("fails") <= 2:
            raise OSError("not yet")
        return data

    retry = serve.Retry(attempts=2, on=(OSError,), backoff_s=0.01)
    first, fails = deploy(counting(tally, "first")), deploy(counting(tally, "fails", fail_twice), retry=retry)
    with made_of([first, fails, stages[2]]) as name:
        job = serve.get_handle(name).submit("abc")
        with pytest.raises(OSError, match="not yet"):
            job.result(timeout=30)
        done = CommandLine(tmp_path, **environment).run("dead", "retry", fails, "--all")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: serve.job(job.id).status().state == "succeeded", told=lambda: job.status())
        assert serve.job(job.id).result(timeout=30) == ["abc"]
        assert [stage.state for stage in job.status().stages] == ["succeeded"] * 3
    assert tally.lines == ["first", "fails", "fails", "fails"]


@distributed_only
def test_the_command_line_shows_them(pipeline: str, stages: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    shell = CommandLine(tmp_path, **environment)
    job = serve.get_handle(pipeline).submit("abc")
    job.result(timeout=30)
    shown = json.loads(shell.run("jobs", "show", job.id, "--json").stdout)
    assert [stage["endpoint"] for stage in shown["stages"]] == stages
    assert " → ".join(stages[:1]) in shell.run("status").stdout
