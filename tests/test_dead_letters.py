"""Operators and what was set aside: `mqserve dead`, on a running instance."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pika
import pytest
from click.testing import CliRunner, Result
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from mqserve.broker.envelope import Header, JobHead, RequestHead, mint_id
from mqserve.commands.cli import cli
from tests.instances import CommandLine, Deploy, distributed_only, new_name, wait_until
from tests.sealed import sealed
from tests.tallies import Tally

pytestmark = distributed_only

Dead = Callable[..., Result]
Send = Callable[..., None]
Count = Callable[[str], int]


@pytest.fixture
def dead(environment: dict[str, str]) -> Dead:
    """`mqserve dead …`, to its end; in this process, since it takes a second to make one."""
    return lambda *arguments: CliRunner(env=environment).invoke(cli, ["dead", *arguments])


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


@pytest.fixture
def send(channel: BlockingChannel, shared_namespace: str) -> Send:
    """Publishes a body to a backend, as a stranger does."""
    return lambda backend, body, **properties: channel.basic_publish(
        f"{shared_namespace}.requests", backend, body, pika.BasicProperties(**properties)
    )


@pytest.fixture
def bury(channel: BlockingChannel, shared_namespace: str) -> Send:
    """Puts a message among the dead letters of a backend, as a replica does."""
    return lambda backend, body, **properties: channel.basic_publish(
        f"{shared_namespace}.dead", backend, body, pika.BasicProperties(**{"content_type": "application/json", **properties})
    )


@pytest.fixture
def letters(channel: BlockingChannel, shared_namespace: str) -> Count:
    """The number of dead letters of a backend that nobody has in hand."""
    return lambda backend: channel.queue_declare(f"{shared_namespace}.dead.{backend}", passive=True).method.message_count


def doubling(tally: Tally) -> Any:
    """Notes what it was asked, and doubles it."""

    def handle(request: Any) -> Any:
        tally.note(request.data)
        return request.data * 2

    return handle


def fragile(request: Any) -> None:
    """Dies of what it is asked, after long enough to have it counted."""
    time.sleep(0.2)
    os._exit(1)


def test_poison_is_answered_under_its_id_once_its_handler_is_mended(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], send: Send, letters: Count, tmp_path: Path
) -> None:
    shell, tally = CommandLine(tmp_path), Tally(tmp_path)
    shell.env = environment
    backend = deploy(fragile, max_attempts=1)
    ref = client.get_handle(backend).remote(21)
    send(backend, b"4", content_type="application/json", message_id="theirs")
    with pytest.raises(serve.MQServeError, match="max_attempts"):
        ref.result(60)
    with pytest.raises(serve.RemoteError, match="Poison"):
        serve.future("theirs", backend=backend).result(timeout=60)
    wait_until(lambda: letters(backend) == 2)

    listed = {fact["id"]: fact for fact in map(json.loads, shell.run("dead", "list", backend, "--json").stdout.splitlines())}
    assert listed.keys() == {ref.id, "theirs"} and "max_attempts" in listed[ref.id]["reason"]
    assert abs(listed[ref.id]["died_at_ms"] / 1000 - time.time()) < 120

    client.update_backend(backend, doubling(tally))
    retried = shell.run("dead", "retry", backend, ref.id, "theirs")
    assert (retried.returncode, retried.stdout) == (0, "2 retried.\n"), retried
    assert serve.future(ref.id, backend=backend).result(timeout=30) == 42
    assert serve.future("theirs", backend=backend).result(timeout=30) == 8
    assert sorted(tally.lines) == ["21", "4"] and letters(backend) == 0


def test_garbage_is_shown_without_harm_and_dropped(deploy: Deploy, dead: Dead, send: Send, letters: Count, tmp_path: Path) -> None:
    backend = deploy(doubling(Tally(tmp_path)))
    send(backend, b"\x1b[31mred\xff", content_type="application/json", message_id="bad\x1b[2J", headers={"x": "[bold]\x07"})
    send(backend, b"{", content_type="application/json")
    wait_until(lambda: letters(backend) == 2)
    named, nameless = sorted(lines_of(dead("list", backend, "--json")), key=lambda fact: len(fact["id"]))
    assert named["id"] == "bad\x1b[2J" and len(nameless["id"]) == 32

    shown, listed = dead("show", backend, r"bad\x1b[2J"), dead("list", backend)
    assert r"\x1b[31mred\xff" in shown.stdout and "x: [bold]" in shown.stdout and "sent by: an AMQP client" in shown.stdout
    assert nameless["id"] in listed.stdout and "does not parse" in listed.stdout
    assert "\x1b" not in shown.stdout + listed.stdout and "\x07" not in shown.stdout

    assert dead("drop", backend, nameless["id"]).stdout == "1 dropped.\n"
    assert letters(backend) == 1
    assert dead("drop", backend, named["id"], "no such").stderr.startswith("Error: dropped: 1; backend")
    assert letters(backend) == 0


def test_all_that_a_death_left_is_shown_and_no_pickle_opened(deploy: Deploy, dead: Dead, bury: Send, tmp_path: Path) -> None:
    backend, mark = deploy(doubling(Tally(tmp_path))), tmp_path / "opened"
    run = {"replica": "r#1", "started_ms": 1_700_000_000_000, "ended": "killed by signal 9"}
    headers = {
        "mq-reason": "it kills",
        "mq-traceback": "Traceback\n  line",
        "mq-attempts": json.dumps([run]),
        "mq-died-at": 1_700_000_001_000,
    }
    pickled = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    bury(backend, pickled, headers={**headers, "mq": msgspec.msgpack.encode({"origin": "handle"})}, message_id="full", reply_to="r")
    bury(backend, b"", headers={"mq": "text", "mq-reason": 1, "mq-attempts": "no JSON", "mq-died-at": 10**18}, message_id="odd")

    (full,) = lines_of(dead("show", backend, "full", "--json"))
    assert full.items() >= {"reason": "it kills", "traceback": "Traceback\n  line", "attempts": [run], "reply_to": "r"}.items()
    shown = dead("show", backend, "full").stdout
    assert "r#1: killed by signal 9" in shown and "died at: 2023-11-14 22:13:21 UTC" in shown and "touch" in shown
    odd = dead("show", backend, "odd")
    assert odd.exit_code == 0 and "the mq header is a str" in odd.stdout, odd.stderr
    assert dead("list", backend).exit_code == 0
    assert not mark.exists()


def test_the_query_of_an_http_request_is_counted_and_not_shown(deploy: Deploy, dead: Dead, bury: Send, tmp_path: Path) -> None:
    backend = deploy(doubling(Tally(tmp_path)))
    meta = {"method": "POST", "path": "/pay", "query": b"token=secret"}
    bury(backend, b"1", headers={"mq": msgspec.msgpack.encode({"v": 1, "origin": "http", "meta": meta})}, message_id="paid")
    shown, printed = dead("show", backend, "paid"), dead("show", backend, "paid", "--json")
    (facts,) = lines_of(printed)
    assert (facts["request"], facts["query_bytes"]) == ("POST /pay", 12)
    assert "request: POST /pay\nquery bytes: 12\n" in shown.stdout
    assert "secret" not in shown.stdout + printed.stdout


def test_many_are_not_touched_without_a_yes_and_can_be_listed_in_part(
    deploy: Deploy, dead: Dead, bury: Send, letters: Count, tmp_path: Path
) -> None:
    backend = deploy(doubling(Tally(tmp_path)))
    for number in range(11):
        bury(backend, b"1", message_id=f"bad-{number}")
    refused = dead("drop", backend, "--all")
    assert refused.exit_code == 1 and "has 11 dead letters: add --yes to drop them all" in refused.stderr
    assert "3 of 11" in dead("list", backend, "--limit", "3").stdout
    assert letters(backend) == 11
    assert dead("drop", backend, "--all", "--yes").stdout == "11 dropped.\n"
    assert letters(backend) == 0
    for none in (dead("drop", backend, "--all"), dead("list", backend)):
        assert none.exit_code == 0 and none.stdout == f"Backend '{backend}' has no dead letters.\n"


def test_letters_that_another_consumer_holds_are_spoken_of(
    deploy: Deploy, dead: Dead, bury: Send, channel: BlockingChannel, shared_namespace: str, tmp_path: Path
) -> None:
    backend = deploy(doubling(Tally(tmp_path)))
    channel.basic_consume(f"{shared_namespace}.dead.{backend}", lambda *_: None)
    assert "has no dead letters, except those that another command holds." in dead("list", backend).stdout


TWO_AT_ONCE = 20


def test_two_who_retry_at_once_run_each_message_once(
    deploy: Deploy, environment: dict[str, str], bury: Send, letters: Count, tmp_path: Path
) -> None:
    shell, tally = CommandLine(tmp_path), Tally(tmp_path)
    shell.env = environment
    backend = deploy(doubling(tally))
    for number in range(TWO_AT_ONCE):
        bury(backend, b"%d" % number, message_id=f"id-{number}")
    with ThreadPoolExecutor(2) as both:
        ended = list(both.map(lambda _: shell.run("dead", "retry", backend, "--all", "--yes"), range(2)))
    assert [done.returncode for done in ended] == [0, 0], ended
    assert [serve.future(f"id-{number}", backend=backend).result(timeout=30) for number in range(TWO_AT_ONCE)] == [
        2 * number for number in range(TWO_AT_ONCE)
    ]
    assert sorted(map(int, tally.lines)) == list(range(TWO_AT_ONCE))
    assert letters(backend) == 0


DIES_BEFORE_REMOVING = """
import os, signal
from mqserve.broker.rabbitmq.dead_letters import RabbitDeadLetters
from mqserve.commands.cli import main

async def remove(letters, letter):
    os.kill(os.getpid(), signal.SIGKILL)

RabbitDeadLetters.remove = remove
main()
"""


def test_a_retry_that_is_killed_before_it_removes_loses_nothing_and_can_be_repeated(
    deploy: Deploy, dead: Dead, environment: dict[str, str], bury: Send, letters: Count, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    backend = deploy(doubling(tally))
    bury(backend, b"21", message_id="one")
    bury(backend, b"22", message_id="other")
    killed = subprocess.run([sys.executable, "-c", DIES_BEFORE_REMOVING, "dead", "retry", backend, "one"], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert serve.future("one", backend=backend).result(timeout=30) == 42, "it was published"
    wait_until(lambda: letters(backend) == 2)
    assert dead("retry", backend, "one").stdout == "1 retried.\n"
    wait_until(lambda: tally.lines == ["21", "21"])
    assert letters(backend) == 1


def test_a_body_that_is_gone_from_the_store_stays_and_is_said(
    deploy: Deploy, dead: Dead, bury: Send, letters: Count, shared_namespace: str, tmp_path: Path
) -> None:
    backend, name = deploy(doubling(Tally(tmp_path))), mint_id()
    header = Header(origin="http", ref=f"mqserve:{shared_namespace}:body:{{{name}}}")
    bury(backend, b"", message_id=name, headers=sealed(shared_namespace, backend, name, header))
    refused = dead("retry", backend, name)
    assert refused.exit_code == 1 and f"retried: 0; {name} stays: its body" in refused.stderr
    assert letters(backend) == 1


def test_a_job_is_tried_again_as_a_job(
    client: serve.Client, deploy: Deploy, dead: Dead, bury: Send, letters: Count, shared_namespace: str, tmp_path: Path
) -> None:
    backend, name = deploy(doubling(Tally(tmp_path))), mint_id()
    body = msgspec.msgpack.encode([21, {}])
    header = Header(origin="handle", deadline=1, job=JobHead(created_ms=1, tries=4, tag="night"))
    headers = sealed(shared_namespace, backend, name, header, body=body, content_type="application/msgpack")
    bury(backend, body, message_id=name, headers={**headers, "mq-job": True}, content_type="application/msgpack")
    retried = dead("retry", backend, name)
    assert retried.stdout == "1 retried.\n", retried.stderr
    job = serve.job(name)
    assert job.result(timeout=30) == 42
    assert (job.status().state, job.status().attempts) == ("succeeded", 1)
    assert letters(backend) == 0


# Whose letters they are.


def test_a_request_of_ours_is_sealed_anew_with_the_key_of_today(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], bury: Send, letters: Count, shared_namespace: str, tmp_path: Path
) -> None:
    """Its letter is from before the key was rotated: who retries it holds both keys, the replicas only the new one."""
    backend, name, before = deploy(doubling(Tally(tmp_path))), mint_id(), "the key before the one of the tests"
    body = msgspec.msgpack.encode([21, {}])
    headers = sealed(
        shared_namespace, backend, name, Header(origin="handle", deadline=1), body=body, content_type="application/msgpack", keys=[before]
    )
    bury(backend, body, message_id=name, headers=headers, content_type="application/msgpack")
    both = CliRunner(env={**environment, "MQSERVE_SECRET_KEY_PREVIOUS": before})
    retried = both.invoke(cli, ["dead", "retry", backend, name])
    assert retried.stdout == "1 retried.\n", retried.stderr
    assert serve.future(name).result(timeout=30) == 42
    assert letters(backend) == 0


def test_what_a_stranger_said_in_our_name_stays_and_harms_nobody(
    client: serve.Client, deploy: Deploy, dead: Dead, send: Send, letters: Count, shared_namespace: str, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    backend = deploy(doubling(tally))
    theirs = client.get_handle(backend).remote("x" * 600_000)
    assert len(theirs.result(timeout=30)) == 1_200_000
    ref = f"mqserve:{shared_namespace}:body:{{{theirs.id}.result}}"
    forged = [
        (theirs.id, Header(origin="http", meta=RequestHead(client=("127.0.0.1", 1)))),
        (f"{theirs.id}.result", Header(origin="handle", ref=ref)),
        ("mine", Header(inbox=f"mqserve:{shared_namespace}:inbox:client-1")),
    ]
    for name, header in forged:
        send(backend, b"1", content_type="application/json", message_id=name, headers={"mq": msgspec.msgpack.encode(header)})
    wait_until(lambda: letters(backend) == len(forged))

    shown = dead("show", backend, theirs.id)
    assert "seal: it has none" in shown.stdout and "sent by: HTTP" in shown.stdout
    refused = dead("retry", backend, "--all")
    assert refused.exit_code == 1 and refused.stderr.startswith("Error: retried: 0; "), refused.stderr
    assert refused.stderr.count("no replica would run it, even if it is sent again") == len(forged)
    assert letters(backend) == len(forged)
    assert len(serve.future(theirs.id).result(timeout=30)) == 1_200_000
    assert len(tally.lines) == 1


@pytest.mark.parametrize("with_seal", [b"\0" * 20, b"short", "text", 7, {"a": 1}], ids=str)
def test_an_odd_seal_makes_nothing_ours(deploy: Deploy, dead: Dead, bury: Send, letters: Count, tmp_path: Path, with_seal: Any) -> None:
    backend, name = deploy(doubling(Tally(tmp_path))), mint_id()
    bury(backend, b"1", message_id=name, headers={"mq": msgspec.msgpack.encode(Header(origin="http")), "mq-seal": with_seal})
    refused = dead("retry", backend, name)
    assert refused.exit_code == 1 and f"{name} stays: no replica would run it" in refused.stderr
    assert letters(backend) == 1


def test_a_command_without_the_key_says_that_it_needs_it(
    deploy: Deploy, environment: dict[str, str], bury: Send, letters: Count, shared_namespace: str, tmp_path: Path, broker_url: str
) -> None:
    backend, name = deploy(doubling(Tally(tmp_path))), mint_id()
    user = pika.URLParameters(broker_url).credentials.username
    headers = sealed(shared_namespace, backend, name, Header(origin="http"), body=b"1")
    bury(backend, b"1", message_id=name, headers={**headers, "mq-user": user})
    refused = CliRunner(env={**environment, "MQSERVE_SECRET_KEY": None}).invoke(cli, ["dead", "retry", backend, name])
    assert refused.exit_code == 1 and "set MQSERVE_SECRET_KEY for this command, too" in refused.stderr, refused.output
    assert letters(backend) == 1


@pytest.mark.parametrize("arguments", [("list",), ("show", "id"), ("retry", "--all"), ("drop", "--all")])
def test_an_unknown_backend_gets_a_sentence(dead: Dead, arguments: tuple[str, ...]) -> None:
    refused = dead(arguments[0], "nobody", *arguments[1:])
    assert refused.exit_code == 1 and refused.stderr.startswith("Error: there is no backend 'nobody'"), refused.stderr


def test_an_unknown_id_gets_a_sentence(deploy: Deploy, dead: Dead, tmp_path: Path) -> None:
    backend = deploy(doubling(Tally(tmp_path)))
    for refused in (dead("show", backend, "x"), dead("retry", backend, "x"), dead("drop", backend, "x")):
        assert refused.exit_code == 1 and "has no dead letter 'x'" in refused.stderr, refused.stderr


@pytest.mark.parametrize("arguments", [("retry", "b"), ("drop", "b", "x", "--all")])
def test_neither_ids_nor_all_or_both_get_a_sentence(dead: Dead, arguments: tuple[str, ...]) -> None:
    refused = dead(*arguments)
    assert refused.exit_code == 1 and "name them by their ids" in refused.stderr, refused.stderr


def lines_of(done: Result) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Of endpoints.


def test_a_message_to_an_unknown_endpoint_is_listed_and_sent_again_once_there_is_one(
    client: serve.Client, channel: BlockingChannel, shared_namespace: str, dead: Dead, deploy: Deploy, environment: dict[str, str]
) -> None:
    name, endpoint = deploy(lambda request: request.data * 2), new_name("later")
    for key, headers in (("good", None), ("claims", {"mq": msgspec.msgpack.encode({"origin": "handle"})})):
        properties = pika.BasicProperties(content_type="application/json", message_id=key, headers=headers)
        channel.basic_publish(f"{shared_namespace}.endpoints", endpoint, b"21", properties)
        with pytest.raises(serve.RemoteError):
            client.job(key, endpoint=endpoint).result(timeout=30)
    wait_until(lambda: "messages to endpoints refused: 2" in CliRunner(env=environment).invoke(cli, ["status"]).stdout)
    shown = json.loads(dead("show", "@endpoints", "good", "--json").stdout)
    assert (shown["endpoint"], shown["body"], shown["sent_by"]) == (endpoint, "21", "an AMQP client")
    refused = dead("retry", "@endpoints", "good")
    assert refused.exit_code == 1 and "create it first" in refused.output
    client.create_endpoint(endpoint, backend=name)
    assert dead("retry", "@endpoints", "good").stdout == "1 retried.\n"
    assert client.job("good", endpoint=endpoint).result(timeout=30) == 42
    refused = dead("retry", "@endpoints", "--all")
    assert refused.exit_code == 1 and "no endpoint takes it" in refused.output
    assert dead("drop", "@endpoints", "--all").stdout == "1 dropped.\n"
    client.delete_endpoint(endpoint)
