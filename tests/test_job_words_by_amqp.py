"""What the handler of a job says, as a direct publisher hears it with plain pika: at its own queue, before the reply, if it asks."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only
from tests.test_direct_publishing import own_queue, receive

pytestmark = distributed_only

ASKS = {"mq-events": True}


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def jobs(environment: dict[str, str]) -> str:
    return f"{environment['MQSERVE_NAMESPACE']}.jobs"


def speak(request: serve.ServeRequest) -> Any:
    serve.log("begun")
    serve.progress(0.25, "first quarter")
    if request.data == "fail":
        raise LookupError("no")
    return {"data": request.data}


def send(channel: BlockingChannel, exchange: str, backend: str, replies: str, data: Any, headers: dict[str, Any], id: str | None) -> None:
    properties = pika.BasicProperties(
        content_type="application/json", message_id=id, reply_to=replies, correlation_id="7", delivery_mode=2, headers=headers
    )
    channel.basic_publish(exchange, backend, json.dumps(data).encode(), properties)


@pytest.mark.parametrize("data", ["well", "fail"])
@pytest.mark.parametrize("has_id", [True, False])
def test_who_asks_hears_it_before_the_reply(channel: BlockingChannel, jobs: str, deploy: Deploy, data: str, has_id: bool) -> None:
    replies, id = own_queue(channel), uuid.uuid4().hex if has_id else None
    send(channel, jobs, deploy(speak), replies, data, ASKS, id)
    log, progress, reply = (receive(channel, replies) for _ in range(3))
    assert (log[0].headers, log[1]) == ({"mq-event": "log"}, b"begun")
    assert (progress[0].headers, progress[1]) == ({"mq-event": "progress", "mq-fraction": "0.25"}, b"first quarter")
    for properties, _ in (log, progress):
        assert (properties.correlation_id, properties.message_id) == ("7", id)
        assert properties.content_type == "text/plain; charset=utf-8"
    assert reply[0].headers == {"mq-status": 200 if data == "well" else 500} and reply[0].correlation_id == "7"


def test_it_is_heard_while_the_job_runs_and_kept_for_others(channel: BlockingChannel, jobs: str, deploy: Deploy, gate: Gate) -> None:
    def speak_and_wait(request: serve.ServeRequest) -> str:
        serve.progress(1 / 3, "waiting")
        gate.pass_through()
        serve.log("left")
        return "done"

    backend, replies = deploy(speak_and_wait), own_queue(channel)
    send(channel, jobs, backend, replies, 1, ASKS, "speaking")
    properties, body = receive(channel, replies)
    assert (properties.headers, body) == ({"mq-event": "progress", "mq-fraction": "0.333333"}, b"waiting")
    gate.open()
    assert [receive(channel, replies)[1] for _ in range(2)] == [b"left", b"done"]
    events = [(str(event.kind), event.text) for event in serve.job("speaking", backend=backend).events() if event.text]
    assert events == [("progress", "waiting"), ("log", "left")]


def test_what_a_job_yields_is_heard_as_it_comes_and_the_reply_has_all(
    channel: BlockingChannel, jobs: str, deploy: Deploy, gate: Gate
) -> None:
    def write(request: serve.ServeRequest) -> Any:
        yield request.data
        gate.pass_through()
        yield "x" * 2_000_000

    replies = own_queue(channel)
    send(channel, jobs, deploy(write), replies, "first", ASKS, "writing")
    properties, body = receive(channel, replies)
    assert (properties.headers, properties.content_type, body) == (
        {"mq-event": "chunk", "mq-offset": 0},
        "text/plain; charset=utf-8",
        b"first",
    )
    gate.open()
    assert receive(channel, replies)[0].headers == {"mq-event": "chunk", "mq-offset": 5, "mq-cut": True}
    properties, body = receive(channel, replies)
    assert properties.headers == {"mq-status": 200} and body == b"first" + b"x" * 2_000_000


@pytest.mark.parametrize("headers", [{}, {"mq-events": False}, {"mq-events": "true"}, {"mq-event": True}])
def test_who_does_not_ask_gets_only_the_reply(channel: BlockingChannel, jobs: str, deploy: Deploy, headers: dict[str, Any]) -> None:
    backend, replies = deploy(speak), own_queue(channel)
    for number in range(3):
        send(channel, jobs, backend, replies, number, headers, uuid.uuid4().hex)
    answers = [receive(channel, replies) for _ in range(3)]
    assert [json.loads(body)["data"] for _, body in answers] == [0, 1, 2]
    assert channel.basic_get(replies)[0] is None


def test_a_request_that_is_no_job_says_nothing(channel: BlockingChannel, jobs: str, deploy: Deploy) -> None:
    backend, replies = deploy(speak), own_queue(channel)
    send(channel, jobs.replace(".jobs", ".requests"), backend, replies, 1, ASKS, uuid.uuid4().hex)
    assert json.loads(receive(channel, replies)[1]) == {"data": 1} and channel.basic_get(replies)[0] is None
