"""`mqserve schedules`."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

import mqserve as serve
from tests.instances import CommandLine, Deploy, distributed_only, new_name

pytestmark = distributed_only

NIGHTLY = "0 3 * * *"


@pytest.fixture
def endpoint(client: serve.Client) -> Iterator[str]:
    """One that has a schedule, `nightly`."""

    def report(request: Any) -> Any:
        return [request.data, request.headers["x-schedule"]]

    deploy = Deploy(client)
    name = deploy(report)
    handle = client.get_handle(name).options(priority="low", result_ttl_s=600)
    client.schedule("nightly", handle, cron=NIGHTLY, timezone="Asia/Kolkata", data={"region": "north"}, catch_up="once")
    yield name
    for schedule in client.list_schedules():
        client.delete_schedule(schedule)
    deploy.undo()


def facts_of(joining: CommandLine, name: str) -> dict[str, Any]:
    [facts] = map(json.loads, joining.run("schedules", "show", name, "--json").stdout.splitlines())
    return dict(facts)


def test_schedules_are_listed(joining: CommandLine, client: serve.Client, endpoint: str) -> None:
    listed = joining.run("schedules", "list")
    row = next(line for line in listed.stdout.splitlines() if line.startswith("nightly"))
    assert endpoint in row and "0 3 * * * (Asia/Kolkata)" in row and "21:30:00 UTC" in row
    [facts] = map(json.loads, joining.run("schedules", "list", "--json").stdout.splitlines())
    assert (facts["name"], facts["endpoint"], facts["catch_up"], facts["paused"]) == ("nightly", endpoint, "once", False)
    client.delete_schedule("nightly")
    assert joining.run("schedules", "list").stdout == "There are no schedules.\n"


def test_a_schedule_is_shown_with_its_next_times_and_what_its_jobs_are_like(joining: CommandLine, endpoint: str) -> None:
    facts = facts_of(joining, "nightly")
    times = [datetime.fromisoformat(at) for at in facts["next_times"]]
    assert len(times) == 5 and {at.strftime("%H:%M") for at in times} == {"21:30"}
    assert (facts["priority"], facts["tag"], facts["result_ttl_s"], facts["data"]) == ("low", "nightly", 600, {"region": "north"})
    shown = joining.run("schedules", "show", "nightly").stdout
    assert 'data: {"region": "north"}' in shown and f"endpoint: {endpoint}" in shown and "priority: low" in shown


def test_a_pickle_among_the_data_is_not_opened(joining: CommandLine, client: serve.Client, endpoint: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("opened",)

    client.schedule("odd", endpoint, cron=NIGHTLY, data=Trap())
    shown = joining.run("schedules", "show", "odd")
    assert "(pickled)" in shown.stdout and "opened" not in shown.stdout + shown.stderr


def test_a_call_that_another_key_sealed_is_shown_as_that(joining: CommandLine, endpoint: str) -> None:
    joining.env["MQSERVE_SECRET_KEY"] = "x" * 40
    shown = joining.run("schedules", "show", "nightly")
    assert "was not made by a process with this instance's key" in shown.stdout


def test_schedules_are_paused_resumed_and_deleted(joining: CommandLine, client: serve.Client, endpoint: str) -> None:
    client.schedule("hourly", endpoint, cron="@hourly")
    assert joining.run("schedules", "pause", "nightly", "hourly").stdout == "2 paused.\n"
    assert all(status.paused for status in client.list_schedules().values())
    assert facts_of(joining, "nightly")["next_times"] == []
    assert joining.run("schedules", "resume", "hourly").stdout == "1 resumed.\n"
    assert [name for name, status in client.list_schedules().items() if status.paused] == ["nightly"]
    assert joining.run("schedules", "delete", "nightly", "hourly").stdout == "2 deleted.\n"
    assert client.list_schedules() == {}


@pytest.mark.parametrize("command", ["show", "pause", "resume", "delete", "run"])
def test_an_unknown_schedule_gets_one_sentence(joining: CommandLine, endpoint: str, command: str) -> None:
    ended = joining.run("schedules", command, "nothing")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("Error: there is no schedule 'nothing' (known: nightly)") and ended.stderr.count("\n") == 1


def test_of_several_names_with_an_unknown_one_nothing_is_changed(joining: CommandLine, client: serve.Client, endpoint: str) -> None:
    assert joining.run("schedules", "pause", "nightly", new_name("nothing")).returncode == 1
    assert not client.list_schedules()["nightly"].paused


def test_a_schedule_is_run_at_once(joining: CommandLine, client: serve.Client, endpoint: str) -> None:
    client.pause_schedule("nightly")
    said = joining.run("schedules", "run", "nightly").stdout
    job = client.job(said.split()[-1])
    assert said == f"nightly runs as job {job.id}\n"
    assert job.result(timeout=30) == [{"region": "north"}, "nightly"]
