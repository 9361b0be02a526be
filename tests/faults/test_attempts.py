"""Runs that end with their replica are counted, whether the message has an id or not, and however quickly it kills."""

import json
import os
from pathlib import Path
from typing import Any

import pika
import pytest

import mqserve as serve
from tests.instances import CommandLine, Deploy, distributed_only, wait_until
from tests.tallies import Tally

pytestmark = [distributed_only, pytest.mark.row(16)]

TWO_COUNTED_RUNS = (2, 3)  # the first run is not counted, but where its end took so long that it left a mark


def deadly(tally: Tally) -> Any:
    def handler(request: Any) -> str:
        if request.data == "poison":
            tally.note("run")
            os._exit(1)  # at once
        return "fine"

    return handler


def dead_letters(shell: CommandLine, backend: str) -> list[dict[str, Any]]:
    done = shell.run("dead", "list", backend, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def operator(environment: dict[str, str], tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, **{name: value for name, value in environment.items() if name.startswith("MQSERVE_")})


def test_what_kills_at_once_costs_one_replica_more_than_max_attempts(
    client: serve.Client, deploy: Deploy, tally: Tally, operator: CommandLine
) -> None:
    name = deploy(deadly(tally), max_attempts=2)
    ref = client.get_handle(name).remote("poison")
    with pytest.raises(serve.RemoteError, match="Poison"):
        ref.result(60)
    assert len(tally) in TWO_COUNTED_RUNS
    (letter,) = dead_letters(operator, name)
    assert len(letter["attempts"]) == 2 and {attempt["replica"].partition("#")[0] for attempt in letter["attempts"]} == {name}
    assert client.get_handle(name).remote("bread").result(60) == "fine"


def test_a_message_without_an_id_is_counted_by_what_it_says(
    deploy: Deploy, tally: Tally, operator: CommandLine, environment: dict[str, str]
) -> None:
    name = deploy(deadly(tally), max_attempts=2)
    with pika.BlockingConnection(pika.URLParameters(environment["MQSERVE_BROKER_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        properties = pika.BasicProperties(content_type="text/plain", delivery_mode=2)
        channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.requests", name, b"poison", properties, mandatory=True)
    wait_until(lambda: dead_letters(operator, name))
    assert len(tally) in TWO_COUNTED_RUNS


def test_what_waits_beside_a_poison_is_not_blamed(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    name = deploy(deadly(tally), max_attempts=1, max_concurrent_queries=8)
    handle = client.get_handle(name)
    innocent = [handle.remote("bread") for _ in range(20)]
    poison = [handle.remote("poison") for _ in range(2)]
    innocent += [handle.remote("bread") for _ in range(20)]
    assert serve.get(innocent, timeout=60) == ["fine"] * 40
    for ref in poison:
        with pytest.raises(serve.RemoteError, match="Poison"):
            ref.result(60)
