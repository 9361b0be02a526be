"""`mqserve jobs` and `mqserve call`."""

import asyncio
import json
import signal
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, new_name, wait_until
from tests.tallies import Tally

pytestmark = distributed_only


def double(request: serve.ServeRequest) -> Any:
    if request.data == "odd":
        raise ValueError("that is odd")
    serve.progress(0.5, "half of it")
    return request.data * 2


@pytest.fixture(scope="module")
def doubling(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(double)
    deploy.undo()


@pytest.fixture
def held(deploy: Deploy, gate: Gate) -> Iterator[serve.Job]:
    """A job that runs until the test ends."""

    async def hold(request: serve.ServeRequest) -> str:
        await gate.pass_through_async()
        return "let go"

    job = serve.get_handle(deploy(hold)).submit()
    wait_until(lambda: gate.came == 1)
    yield job
    gate.open()
    job.cancel()


def printed(shell: CommandLine, *arguments: str) -> str:
    done = shell.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_json(shell: CommandLine, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed(shell, *arguments, "--json").splitlines()]


def test_jobs_are_listed_by_what_is_asked_for(joining: CommandLine, doubling: str) -> None:
    tag = new_name("tag")
    good, bad = (serve.get_handle(doubling).options(tag=tag).submit(data) for data in (21, "odd"))
    serve.wait([good, bad], num_returns=2, timeout=30)
    assert [job["id"] for job in as_json(joining, "jobs", "list", "--tag", tag)] == [bad.id, good.id]
    [failed] = as_json(joining, "jobs", "list", "--backend", doubling, "--state", "failed", "--state", "expired")
    assert (failed["id"], failed["status"], failed["http_status"], failed["attempts"], failed["tag"]) == (bad.id, "failed", 500, 1, tag)
    table = printed(joining, "jobs", "list", "--tag", tag)
    assert good.id in table and "succeeded" in table and "half of it" in table
    assert printed(joining, "jobs", "list", "--tag", "nobodys") == "There are no such jobs.\n"


def test_a_job_is_shown_with_its_runs_and_events(joining: CommandLine, doubling: str) -> None:
    job = serve.get_handle(doubling).options(delay_s=0.1).submit(21)  # it might begin before it is known to be queued
    assert job.result(timeout=30) == 42
    [shown] = as_json(joining, "jobs", "show", job.id)
    assert shown["status"] == "succeeded" and shown["progress"]["fraction"] == 0.5 and shown["history"][0]["number"] == 1
    assert [event.get("status", event["event"]) for event in shown["events"]] == ["queued", "running", "progress", "succeeded"]
    assert "half of it" in printed(joining, "jobs", "show", job.id)


def test_an_unknown_job_gets_one_sentence(joining: CommandLine, client: serve.Client) -> None:
    for command in ("show", "watch", "cancel", "retry", "purge"):
        done = joining.run("jobs", command, "nobodys")
        assert done.returncode == 1 and "nothing is known of" in done.stderr and "Traceback" not in done.stderr, command


def test_where_no_instance_runs_the_list_of_jobs_says_so(joining: CommandLine, client: serve.Client) -> None:
    done = joining.run("jobs", "list", "--namespace", new_name("nobodys"))
    assert done.returncode == 1 and "no instance runs under this namespace" in done.stderr


def test_a_list_of_jobs_does_without_rabbitmq_and_a_retry_says_that_it_is_away(joining: CommandLine, doubling: str) -> None:
    tag, away = new_name("tag"), joining.with_variables(MQSERVE_BROKER_URL="amqp://guest:guest@127.0.0.1:1/")
    job = serve.get_handle(doubling).options(tag=tag).submit(21)
    assert job.result(timeout=30) == 42
    listed = away.run("jobs", "list", "--tag", tag)
    assert job.id in listed.stdout and not listed.stderr
    refused = away.run("jobs", "retry", job.id)
    assert refused.returncode == 1 and "is it running, and is MQSERVE_BROKER_URL right?" in refused.stderr and "<" not in refused.stderr


def test_a_job_is_cancelled_by_its_id(joining: CommandLine, held: serve.Job) -> None:
    assert printed(joining, "jobs", "cancel", held.id) == "1 cancelled.\n"
    assert held.status().state == "cancelled"
    again = joining.run("jobs", "cancel", held.id)
    assert again.returncode == 1 and "has ended already" in again.stderr


def test_jobs_are_cancelled_by_their_tag(joining: CommandLine, doubling: str) -> None:
    tag = new_name("tag")
    jobs = [serve.get_handle(doubling).options(tag=tag, delay_s=600).submit(number) for number in range(11)]
    refused = joining.run("jobs", "cancel", "--tag", tag)
    assert refused.returncode == 1 and "add --yes" in refused.stderr
    assert printed(joining, "jobs", "cancel", "--tag", tag, "--yes") == "11 cancelled.\n"
    assert {job.status().state for job in jobs} == {"cancelled"}
    assert printed(joining, "jobs", "cancel", "--tag", tag) == "0 cancelled: there are 11 such jobs, and none that is queued or running.\n"
    assert printed(joining, "jobs", "cancel", "--tag", "nobodys") == "There are no such jobs.\n"


def test_the_id_of_a_group_shows_its_counts_and_cancels_its_jobs(joining: CommandLine, doubling: str) -> None:
    group = serve.submit_many(serve.get_handle(doubling).options(delay_s=600), [1, 2, 3])
    [shown] = as_json(joining, "jobs", "show", group.id)
    assert (shown["group"], shown["total"], shown["pending"], shown["cancelled"]) == (group.id, 3, 3, 0)
    refused = joining.run("jobs", "retry", group.id)
    assert refused.returncode == 1 and "is the id of a group" in refused.stderr
    assert printed(joining, "jobs", "cancel", group.id) == "3 cancelled.\n"
    assert group.status().cancelled == 3 and printed(joining, "jobs", "cancel", group.id) == "0 cancelled.\n"
    assert "cancelled: 3" in printed(joining, "jobs", "show", group.id)


def test_a_job_that_failed_is_retried(joining: CommandLine, doubling: str) -> None:
    tag = new_name("tag")
    job = serve.get_handle(doubling).options(tag=tag).submit("odd")
    serve.wait([job], timeout=30)
    again = printed(joining, "jobs", "retry", "--tag", tag)
    assert f"{job.id} again as " in again and again.endswith("1 retried.\n")
    new = serve.job(again.split()[3])
    with pytest.raises(ValueError, match="odd"):
        new.result(timeout=30)
    assert new.status().retry_of == job.id


def test_jobs_that_have_ended_are_forgotten(joining: CommandLine, doubling: str, held: serve.Job) -> None:
    job = serve.get_handle(doubling).submit(1)
    assert job.result(timeout=30) == 2
    assert printed(joining, "jobs", "purge", job.id) == "1 purged.\n"
    with pytest.raises(serve.UnknownJob):
        job.status()
    refused = joining.run("jobs", "purge", held.id)
    assert refused.returncode == 1 and "cancel it first" in refused.stderr


@pytest.mark.parametrize("arguments", [[], ["an-id", "--all"], ["an-id", "--tag", "t"]], ids=["neither", "both", "both, by a tag"])
def test_what_to_act_on_has_to_be_said_in_one_way(joining: CommandLine, client: serve.Client, arguments: list[str]) -> None:
    done = joining.run("jobs", "cancel", *arguments)
    assert done.returncode == 1 and "by their ids" in done.stderr


def test_a_job_is_watched_by_its_id_or_chosen_by_a_filter(joining: CommandLine, client: serve.Client) -> None:
    done = joining.run("jobs", "watch", "an-id", "--tag", "t")
    assert done.returncode == 1 and "leave out" in done.stderr


def test_a_job_is_watched_to_its_end(joining: CommandLine, doubling: str) -> None:
    handle = serve.get_handle(doubling).options(delay_s=0.1)
    good, bad = handle.submit(21), handle.submit("odd")
    assert [line.split()[1] for line in printed(joining, "jobs", "watch", good.id).splitlines()] == [
        "queued",
        "running",
        "50%",
        "succeeded",
    ]
    watched = joining.run("jobs", "watch", bad.id, "--json")
    assert watched.returncode == 1 and "that is odd" in watched.stderr and "Traceback" not in watched.stderr
    assert as_json(joining, "jobs", "show", bad.id)[0]["error"] == {"type": "ValueError", "message": "that is odd"}
    assert [json.loads(line)["status"] for line in watched.stdout.splitlines()] == ["queued", "running", "failed"]


def test_what_a_job_yields_is_watched_by_lines(joining: CommandLine, deploy: Deploy) -> None:
    def write(request: serve.ServeRequest) -> Iterator[Any]:
        yield from ("one ", "line\nand ", "\x1b[31mred", b"\xff", "the end")
        yield {1, 2}

    name = deploy(write)
    job = serve.get_handle(name).submit()
    job.result(30)
    lines = [line.split(" ", 1)[1] for line in printed(joining, "jobs", "watch", job.id).splitlines()]
    assert lines[-5:] == ["one line", "and \\x1b[31mred(1 B)", "the end", "(only the result has the rest)", "succeeded"]
    watched = [json.loads(line) for line in joining.run("jobs", "watch", job.id, "--json").stdout.splitlines()]
    chunks = [event for event in watched if event["event"] == "chunk"]
    sizes = [len(chunk.get("text", "") or b64decode(chunk.get("base64", ""))) for chunk in chunks]
    assert [chunk["offset"] for chunk in chunks] == [sum(sizes[:number]) for number in range(len(chunks))] and chunks[-1]["cut"]
    assert "one line" not in joining.run("call", name, "--later").stderr, "the answer says it"


def test_the_latest_jobs_are_watched_until_ctrl_c(joining: CommandLine, doubling: str) -> None:
    tag = new_name("tag")
    watching = joining.start("jobs", "watch", "--tag", tag)
    job = serve.get_handle(doubling).options(tag=tag).submit(21)
    assert watching.wait_for(f"{job.id} succeeded").endswith(f"{doubling} {tag}")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 130 and "Traceback" not in watching.output


# Calls.


def test_a_call_prints_the_answer(joining: CommandLine, doubling: str) -> None:
    assert printed(joining, "call", doubling, "--data", "21") == "42\n"
    assert printed(joining, "call", doubling, "--data", '"ab"') == "abab\n"
    unknown = joining.run("call", "nobodys").stderr
    assert unknown.startswith("Error: Endpoint 'nobodys' does not exist. Known: ") and doubling in unknown and "Deploy it first." in unknown
    joining.file("list.json", '["é"]')
    assert printed(joining, "call", doubling, "--data", "@list.json") == '["é", "é"]\n'


def test_a_call_that_fails_gets_the_error(joining: CommandLine, doubling: str) -> None:
    for later in ((), ("--later",)):
        done = joining.run("call", doubling, "--data", '"odd"', *later)
        assert done.returncode == 1 and "that is odd" in done.stderr and done.stdout == "", done.stderr


@pytest.mark.parametrize(("data", "words"), [("odd", "is no JSON"), ("@nowhere.json", "cannot be read")])
def test_data_that_is_none_is_refused_in_one_sentence(joining: CommandLine, doubling: str, data: str, words: str) -> None:
    done = joining.run("call", doubling, "--data", data)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", [("--tag", "t"), ("--delay", "60")], ids=["tag", "delay"])
def test_an_option_of_jobs_is_refused_for_a_call_that_is_none(joining: CommandLine, doubling: str, option: tuple[str, str]) -> None:
    done = joining.run("call", doubling, "--data", "21", *option)
    assert done.returncode == 1 and done.stdout == "" and "--later" in done.stderr


def test_a_call_for_later_is_a_job(joining: CommandLine, doubling: str) -> None:
    done = joining.run("call", doubling, "--data", "21", "--later", "--tag", "from-the-shell")
    assert done.stdout == "42\n"
    name, job_id = done.stderr.splitlines()[0].split()
    assert name == "Job" and serve.job(job_id).status().tag == "from-the-shell"
    assert "half of it" in done.stderr


def test_ctrl_c_leaves_a_job_and_says_how_to_find_it(joining: CommandLine, deploy: Deploy, gate: Gate) -> None:
    async def hold(request: serve.ServeRequest) -> str:
        await gate.pass_through_async()
        return "let go"

    calling = joining.start("call", deploy(hold), "--later")
    job_id = calling.wait_for("Job ").split()[1]
    calling.wait_for("running")
    calling.signal(signal.SIGINT)
    assert calling.wait() == 130
    assert f"mqserve jobs watch {job_id}" in calling.output and "Traceback" not in calling.output
    gate.open()
    assert serve.job(job_id).result(timeout=30) == "let go"
    assert "let go" not in calling.output


def test_ctrl_c_cancels_a_call_that_is_waited_for(joining: CommandLine, deploy: Deploy, tally: Tally) -> None:
    async def hold(request: serve.ServeRequest) -> None:
        tally.note("began")
        try:
            await asyncio.Event().wait()
        finally:
            tally.note("ended")

    calling = joining.start("call", deploy(hold))
    wait_until(lambda: tally.lines == ["began"])
    calling.signal(signal.SIGINT)
    assert calling.wait() == 130
    wait_until(lambda: tally.lines == ["began", "ended"])
