"""Schedules, in both forms: an endpoint's jobs at the times of a cron expression."""

import json
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette

import mqserve as serve
from tests.instances import CommandLine, Deploy, distributed_only, new_name, wait_until
from tests.ports import free_port

EVERY_SECOND = "* * * * * *"
NIGHTLY = "0 3 * * *"


async def tell(request: serve.ServeRequest) -> Any:
    return request.data, request.headers.get("x-schedule"), request.headers.get("x-scheduled-for")


@pytest.fixture(scope="module")
def telling(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(tell)
    for name in client.list_schedules():
        client.delete_schedule(name)
    deploy.undo()


@pytest.fixture
def name() -> Iterator[str]:
    chosen = new_name("s")
    yield chosen
    serve.delete_schedule(chosen)


def fired(name: str, than: str = "") -> serve.ScheduleStatus:
    """The status once it has fired, another time than for that job."""

    def has_fired() -> serve.ScheduleStatus | None:
        status = serve.list_schedules()[name]
        return status if status.last_job not in ("", than) else None

    status = wait_until(has_fired)
    assert status is not None
    return status


def test_a_schedule_sends_a_job_at_each_of_its_times(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=EVERY_SECOND, data={"batch": 7})
    first = fired(name)
    second = fired(name, than=first.last_job)
    for status in (first, second):
        assert status.last_at is not None and status.next_at is not None and status.next_at > status.last_at
        data, schedule, at = serve.job(status.last_job).result(timeout=30)
        assert (data, schedule) == ({"batch": 7}, name)
        assert datetime.fromisoformat(at) == status.last_at
    assert serve.job(first.last_job).status().tag == name


def test_no_time_is_left_out_and_none_is_fired_for_twice(client: serve.Client, name: str) -> None:
    seen: list[str] = []

    async def note(request: serve.ServeRequest) -> list[str]:
        seen.append(request.headers["x-scheduled-for"])
        return seen

    deploy = Deploy(client)
    endpoint = deploy(note)
    serve.schedule(name, endpoint, cron=EVERY_SECOND)

    def enough() -> list[str] | None:
        job = serve.list_schedules()[name].last_job
        noted: list[str] = serve.job(job).result(timeout=30) if job else []
        return noted if len(noted) >= 4 else None

    noted = wait_until(enough)
    assert noted is not None
    times = sorted(map(datetime.fromisoformat, noted))
    assert times == [times[0] + timedelta(seconds=number) for number in range(len(times))]
    serve.delete_schedule(name)
    deploy.undo()


def test_any_object_may_be_its_data(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=EVERY_SECOND, data=np.arange(3))
    assert serve.job(fired(name).last_job).result(timeout=30)[0].tolist() == [0, 1, 2]


def test_a_handle_says_how_its_jobs_are_treated(telling: str, name: str) -> None:
    handle = serve.get_handle(telling).options(priority="low", tag="night", http_headers={"X-Who": "cron"})
    serve.schedule(name, handle, cron=EVERY_SECOND)
    job = serve.job(fired(name).last_job)
    assert job.result(timeout=30)[1] == name
    assert (job.status().priority, job.status().tag) == ("low", "night")


def test_a_paused_schedule_does_not_fire_until_it_is_resumed(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=EVERY_SECOND, catch_up="once")
    fired(name)
    serve.pause_schedule(name)
    paused = serve.list_schedules()[name]
    assert paused.paused and paused.next_at is None
    other = new_name("s")
    serve.schedule(other, telling, cron=EVERY_SECOND)  # what is fired behind the pause shows that the leader knows it
    later = fired(other, than=fired(other).last_job)
    serve.delete_schedule(other)
    quiet = serve.list_schedules()[name]
    serve.resume_schedule(name)
    resumed = fired(name, than=quiet.last_job)
    assert quiet.last_at is not None and later.last_at is not None and resumed.last_at is not None
    assert quiet.last_at <= later.last_at < resumed.last_at


def test_a_schedule_is_run_at_once_when_it_is_asked_for(telling: str, name: str) -> None:
    before = datetime.now(UTC) - timedelta(minutes=5)  # the store's clock is another one
    serve.schedule(name, serve.get_handle(telling).options(priority="high"), cron=NIGHTLY, data={1, 2})
    serve.pause_schedule(name)
    jobs = [serve.run_schedule(name), serve.run_schedule(name)]
    assert jobs[0].id != jobs[1].id
    for job in jobs:
        data, schedule, at = job.result(timeout=30)
        assert (data, schedule) == ({1, 2}, name) and datetime.fromisoformat(at) > before
        assert (job.status().priority, job.status().tag) == ("high", name)
    assert serve.list_schedules()[name].last_job == ""
    with pytest.raises(serve.BadValue, match="there is no schedule 'nothing'"):
        serve.run_schedule("nothing")


def test_a_schedule_that_is_declared_again_goes_on(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=NIGHTLY, timezone="Europe/Berlin")
    serve.pause_schedule(name)
    serve.schedule(name, telling, cron=NIGHTLY, timezone="Europe/Berlin", data=2, catch_up="once")
    status = serve.list_schedules()[name]
    assert status.paused and status.catch_up == "once"
    assert (status.endpoint, status.cron, status.timezone, status.last_job) == (telling, NIGHTLY, "Europe/Berlin", "")


def test_its_next_time_is_that_of_its_time_zone(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=NIGHTLY, timezone="Asia/Kolkata")
    status = serve.list_schedules()[name]
    assert status.next_at is not None and status.next_at.tzinfo is UTC
    assert (status.next_at.hour, status.next_at.minute) == (21, 30)


@distributed_only
def test_the_status_shows_schedules(telling: str, name: str, joining: CommandLine) -> None:
    serve.schedule(name, telling, cron=EVERY_SECOND)
    last = fired(name)
    serve.pause_schedule(name)
    shown = joining.run("status").stdout
    row = next(line for line in shown.splitlines() if line.startswith(name))
    assert telling in row and "* * * * * * (UTC)" in row and "paused" in row
    [facts] = [facts for facts in json.loads(joining.run("status", "--json").stdout)["schedules"] if facts["name"] == name]
    assert (facts["paused"], facts["next_at"], facts["trouble"]) == (True, None, "") and facts["last_job"]
    assert last.last_at is not None and datetime.fromisoformat(facts["last_at"]) >= last.last_at
    serve.resume_schedule(name)
    assert wait_until(lambda: serve.list_schedules()[name].next_at)


def test_an_endpoint_with_a_schedule_is_not_deleted(telling: str, name: str) -> None:
    serve.schedule(name, telling, cron=NIGHTLY)
    with pytest.raises(serve.BadValue, match=rf"is called by schedule '{name}'"):
        serve.delete_endpoint(telling)
    assert telling in serve.list_endpoints()


def test_what_cannot_be_scheduled_is_refused(telling: str) -> None:
    with pytest.raises(serve.BadValue, match="there is no endpoint 'nowhere'"):
        serve.schedule("s", "nowhere", cron=NIGHTLY)
    with pytest.raises(serve.BadValue, match="is no cron expression"):
        serve.schedule("s", telling, cron="at three")
    with pytest.raises(serve.BadValue, match="no time zone 'Mars'"):
        serve.schedule("s", telling, cron=NIGHTLY, timezone="Mars")
    with pytest.raises(serve.BadValue, match="catch_up is"):
        serve.schedule("s", telling, cron=NIGHTLY, catch_up="all")  # type: ignore[arg-type]
    with pytest.raises(serve.BadValue, match="no name for a schedule"):
        serve.schedule("every night", telling, cron=NIGHTLY)
    with pytest.raises(serve.BadType, match="takes the name of an endpoint"):
        serve.schedule("s", tell, cron=NIGHTLY)  # type: ignore[arg-type]
    with pytest.raises(serve.BadValue, match="no delay_s or eta"):
        serve.schedule("s", serve.get_handle(telling).options(delay_s=1), cron=NIGHTLY)
    with pytest.raises(serve.BadType, match="cron is a text"):
        serve.schedule("s", telling, cron=["@daily"])  # type: ignore[arg-type]
    with pytest.raises(serve.BadType, match="timezone is the name"):
        serve.schedule("s", telling, cron=NIGHTLY, timezone=["UTC"])  # type: ignore[arg-type]
    with pytest.raises(serve.NotEncodable, match="cannot travel"):
        serve.schedule("s", telling, cron=NIGHTLY, data=threading.Lock())
    with pytest.raises(serve.BadValue, match="calls nobody back"):
        serve.schedule("s", serve.get_handle(telling).options(callback_url="https://e.example/"), cron=NIGHTLY)
    with pytest.raises(serve.BadValue, match="no idempotency_key"):
        serve.schedule("s", serve.get_handle(telling).options(idempotency_key="k"), cron=NIGHTLY)
    with pytest.raises(serve.TooLarge, match="give a reference to it"):
        serve.schedule("s", telling, cron=NIGHTLY, data="x" * 20_000)
    with pytest.raises(serve.BadValue, match="there is no schedule 's'"):
        serve.pause_schedule("s")
    serve.delete_schedule("s")
    assert "s" not in serve.list_schedules()


def test_an_asgi_app_is_not_scheduled(client: serve.Client) -> None:
    app = new_name("app")
    serve.create_backend(app, Starlette, factory=True)
    serve.create_endpoint(app, backend=app, route=f"/{app}")
    with pytest.raises(serve.BadValue, match="answers HTTP requests, and a schedule sends none"):
        serve.schedule("s", app, cron=NIGHTLY)
    serve.delete_endpoint(app)
    serve.delete_backend(app)


def test_a_schedule_is_declared_together_with_its_endpoint(client: serve.Client, name: str) -> None:
    backend = new_name("b")
    with serve.deploying():
        serve.create_backend(backend, tell)
        serve.create_endpoint(backend, backend=backend)
        serve.schedule(name, backend, cron=EVERY_SECOND, data=1)
        assert name in serve.list_schedules()
    assert serve.job(fired(name).last_job).result(timeout=30)[0] == 1
    with serve.deploying():
        serve.delete_schedule(name)
        serve.delete_endpoint(backend)
    serve.delete_backend(backend)


def test_a_deployment_that_fails_leaves_no_schedule(client: serve.Client, telling: str, name: str) -> None:
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no model here")

    with pytest.raises(serve.BackendFailed, match="no model here"), serve.deploying():
        serve.create_backend(new_name("b"), Broken)
        serve.schedule(name, telling, cron=NIGHTLY)
    assert name not in serve.list_schedules()


FILE = """
import mqserve as serve

@serve.endpoint("/clean")
def clean(request):
    print("cleaned", request.data, flush=True)

serve.schedule("often", "clean", cron="* * * * * *", data="all")
assert "often" in serve.list_schedules()
"""


def test_a_file_of_run_schedules_what_it_decorates(shell: CommandLine) -> None:
    program = shell.start("run", shell.file("app.py", FILE), "--port", str(free_port()))
    wait_until(lambda: "cleaned all" in program.output, told=lambda: program.output)


def test_a_file_of_run_that_is_started_again_goes_on_where_its_schedule_was(distributed_shell: CommandLine) -> None:
    file = distributed_shell.file("app.py", FILE.replace("request.data", 'request.headers["x-scheduled-for"], request.id'))
    ids: dict[datetime, set[str]] = {}  # of the jobs that ran: one that runs when its instance ends may run again in the next one
    for _ in range(2):
        program = distributed_shell.start("run", file, "--port", str(free_port()))
        wait_until(lambda: program.output.count("cleaned") >= 3, told=lambda: program.output)  # noqa: B023
        program.signal(signal.SIGINT)
        program.wait()
        for _, at, id in (line.split() for line in program.output.splitlines() if line.startswith("cleaned")):
            ids.setdefault(datetime.fromisoformat(at), set()).add(id)
    assert sorted(ids) == [min(ids) + timedelta(seconds=number) for number in range(len(ids))]
    assert {len(jobs) for jobs in ids.values()} == {1}


def test_a_file_of_run_that_schedules_what_is_not_there_is_refused(shell: CommandLine) -> None:
    file = shell.file("app.py", FILE.replace('"often", "clean"', '"often", "cleam"'))
    ended = shell.run("run", file, "--port", str(free_port()))
    assert ended.returncode == 1 and "schedule('often'): there is no endpoint 'cleam'" in ended.stderr
