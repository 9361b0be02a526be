"""What any AMQP client may publish to an endpoint: its traffic chooses the backend. docs/protocol.md in tests, with plain pika."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pika
import pytest
import redis
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, new_name, wait_until
from tests.test_direct_publishing import own_queue, receive

pytestmark = distributed_only

DIRECT_REPLY = "amq.rabbitmq.reply-to"


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def exchange(client: serve.Client, environment: dict[str, str]) -> str:
    return f"{environment['MQSERVE_NAMESPACE']}.endpoints"


class Naming:
    """Answers with its own name and the data."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, request: serve.ServeRequest) -> list[Any]:
        if request.data == "fail":
            raise LookupError("no such number")
        return [self._name, request.data]

    def other(self, request: serve.ServeRequest) -> str:
        return "other"


@pytest.fixture(scope="module")
def split(client: serve.Client) -> Iterator[str]:
    """An endpoint whose traffic goes to two backends in equal parts."""
    endpoint, names = new_name("e"), [new_name("half") for _ in range(2)]
    for name in names:
        client.create_backend(name, Naming, name)
    client.create_endpoint(endpoint, backend=names[0])
    client.set_traffic(endpoint, dict.fromkeys(names, 0.5))
    yield endpoint
    client.delete_endpoint(endpoint)
    for name in names:
        client.delete_backend(name)


def as_json(**properties: Any) -> pika.BasicProperties:
    return pika.BasicProperties(content_type="application/json", **properties)


def test_a_message_to_an_endpoint_is_answered_like_any_rpc(channel: BlockingChannel, exchange: str, split: str) -> None:
    replies = own_queue(channel)
    channel.basic_publish(exchange, split, b"[1, 2]", as_json(reply_to=replies, correlation_id="question 7", message_id=uuid.uuid4().hex))
    reply, body = receive(channel, replies)
    assert ((reply.headers or {})["mq-status"], reply.correlation_id, json.loads(body)[1]) == (200, "question 7", [1, 2])


def test_an_answer_comes_without_a_queue_by_rabbitmqs_direct_reply_to(channel: BlockingChannel, exchange: str, split: str) -> None:
    answers: list[Any] = []
    channel.basic_consume(DIRECT_REPLY, lambda *answer: answers.append(json.loads(answer[3])), auto_ack=True)
    channel.basic_publish(exchange, split, b"3", as_json(reply_to=DIRECT_REPLY))
    wait_until(lambda: (channel.connection.process_data_events(0.05), answers)[1])
    assert answers[0][1] == 3


def test_a_message_with_an_id_is_a_job_that_is_found_by_endpoint_and_id(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str
) -> None:
    key = f"order-{uuid.uuid4().hex[:6]}"
    channel.basic_publish(exchange, split, b"4", as_json(message_id=key, priority=2))
    job = client.job(key, endpoint=split)
    name, data = job.result(timeout=30)
    status = job.status()
    assert (data, str(status.state), status.endpoint, status.priority) == (4, "succeeded", split, "normal")
    assert client.future(key, endpoint=split).result(timeout=30) == [name, 4]
    url = f"{client.http_url()}/-/futures/@{split}@{key}"
    view = httpx.get(url).json()
    assert (view["status"], view["endpoint"], view["backend"], view["attempts"]) == ("succeeded", split, name, 1)
    assert httpx.get(f"{url}/result").json() == [name, 4]


def test_both_halves_of_the_traffic_get_messages_and_one_id_always_the_same(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str
) -> None:
    keys = [uuid.uuid4().hex for _ in range(60)]
    for _ in range(2):
        for key in keys:
            channel.basic_publish(exchange, split, b"1", as_json(message_id=key))
    names = [client.job(key, endpoint=split).result(timeout=30)[0] for key in keys]
    assert 10 < names.count(names[0]) < 50
    assert {client.job(key, endpoint=split).status().attempts for key in keys} == {1}


def test_messages_without_an_id_are_split_too(channel: BlockingChannel, exchange: str, split: str) -> None:
    replies = own_queue(channel)
    for _ in range(40):
        channel.basic_publish(exchange, split, b"1", as_json(reply_to=replies))
    names = [json.loads(receive(channel, replies)[1])[0] for _ in range(40)]
    assert len(set(names)) == 2


def test_one_id_runs_once_although_the_traffic_has_moved_to_another_backend(
    client: serve.Client, channel: BlockingChannel, exchange: str, deploy: Deploy, tmp_path: Path
) -> None:
    gate, replies = Gate(tmp_path), own_queue(channel)
    gate.open()

    def count(request: serve.ServeRequest) -> int:
        gate.pass_through()
        return gate.came

    first, second = deploy(count), deploy(count)
    for backend in (first, second):
        client.set_traffic(first, {backend: 1.0})
        wait_until(lambda: client.list_endpoints()[first]["traffic"])
        channel.basic_publish(exchange, first, b"{}", as_json(message_id="order-17", reply_to=replies))
        assert receive(channel, replies)[1] == b"1"
    assert gate.came == 1
    client.set_traffic(first, {first: 1.0})


def test_an_endpoint_is_known_as_soon_as_it_is_created(client: serve.Client, channel: BlockingChannel, exchange: str, split: str) -> None:
    replies, backend = own_queue(channel), next(iter(client.list_endpoints()[split]["traffic"]))
    for _ in range(10):
        endpoint = new_name("fresh")
        client.create_endpoint(endpoint, backend=backend)
        channel.basic_publish(exchange, endpoint, b"1", as_json(reply_to=replies))
        assert json.loads(receive(channel, replies)[1]) == [backend, 1]
        client.delete_endpoint(endpoint)


def test_a_message_to_an_unknown_endpoint_is_answered_ended_and_set_aside(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str]
) -> None:
    replies, key, missing = own_queue(channel), uuid.uuid4().hex, new_name("missing")
    channel.basic_publish(exchange, missing, b"1", as_json(reply_to=replies, correlation_id="c", message_id=key, headers={"mine": "kept"}))
    channel.basic_publish(exchange, split, b"2", as_json(reply_to=replies, correlation_id="d"))
    answers = {
        reply.correlation_id: (reply.headers["mq-status"], json.loads(body)) for reply, body in (receive(channel, replies) for _ in "ab")
    }
    assert answers["d"][0] == 200
    assert answers["c"][0] == 404 and answers["c"][1]["error"]["type"] == "mqserve.UnknownEndpoint"
    assert f"there is no endpoint '{missing}'" in answers["c"][1]["error"]["message"]
    job = client.job(key, endpoint=missing)
    with pytest.raises(serve.RemoteError, match="there is no endpoint"):
        job.result(timeout=30)
    assert str(job.status().state) == "failed"
    assert httpx.get(f"{client.http_url()}/-/futures/@{missing}@{key}/result").status_code == 404
    dead, body = receive(channel, dead_queue(environment))
    assert (body, dead.message_id, dead.headers["mine"], dead.headers["mq-endpoint"]) == (b"1", key, "kept", missing)
    assert "there is no endpoint" in dead.headers["mq-reason"]


def dead_queue(environment: dict[str, str]) -> str:
    return f"{environment['MQSERVE_NAMESPACE']}.dead.@endpoints"


REFUSED: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "a header that claims a sender": ({"headers": {"mq": msgspec.msgpack.encode({"origin": "handle"})}}, b"1", "says more than"),
    "a header that claims an endpoint": ({"headers": {"mq": msgspec.msgpack.encode({"meta": {"endpoint": "x"}})}}, b"1", "says more than"),
    "a header that claims a job": ({"headers": {"mq": msgspec.msgpack.encode({"job": {"tag": "x"}})}}, b"1", "says more than"),
    "a pickle": ({"content_type": "application/x-python-pickle"}, b"cos\nsystem\n(S'true'\ntR.", "pickle"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_direct_publisher_may_send_is_refused_under_its_own_key(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str], kind: str
) -> None:
    given, body, reason = REFUSED[kind]
    replies, key = own_queue(channel), uuid.uuid4().hex
    channel.basic_publish(exchange, split, body, pika.BasicProperties(**{"message_id": key, "reply_to": replies, **given}))
    reply, answer = receive(channel, replies)
    assert (reply.headers or {})["mq-status"] == 422 and reason in json.loads(answer)["error"]["message"]
    with pytest.raises(serve.RemoteError, match=reason):
        client.future(key, endpoint=split).result(timeout=30)
    assert reason in receive(channel, dead_queue(environment))[0].headers["mq-reason"]


def test_an_answer_to_a_queue_of_the_instance_is_refused_and_the_job_has_its_end(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str]
) -> None:
    key, ours = uuid.uuid4().hex, f"{environment['MQSERVE_NAMESPACE']}.due"
    channel.basic_publish(exchange, split, b"1", as_json(message_id=key, reply_to=ours))
    with pytest.raises(serve.RemoteError, match="a queue of this instance"):
        client.job(key, endpoint=split).result(timeout=30)
    assert receive(channel, dead_queue(environment))[0].reply_to == ours


def test_a_pipeline_takes_no_published_message_and_says_so(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str]
) -> None:
    pipeline, replies = new_name("p"), own_queue(channel)
    client.create_pipeline(pipeline, [split])
    channel.basic_publish(exchange, pipeline, b"1", as_json(reply_to=replies))
    reply, body = receive(channel, replies)
    assert (reply.headers or {})["mq-status"] == 422 and b"is a pipeline" in body
    assert "is a pipeline" in receive(channel, dead_queue(environment))[0].headers["mq-reason"]
    client.delete_pipeline(pipeline)


@pytest.mark.parametrize("raw", [b"\xc1\xff", "text"])
def test_a_header_that_does_not_parse_makes_a_dead_letter(
    channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str], raw: bytes | str
) -> None:
    channel.basic_publish(exchange, split, b"1", as_json(message_id="x", headers={"mq": raw}))
    dead, body = receive(channel, dead_queue(environment))
    assert (body, dead.headers["mq-endpoint"], dead.headers["mq"]) == (b"1", split, raw)


def test_properties_that_cannot_be_read_make_a_dead_letter(
    channel: BlockingChannel, exchange: str, split: str, environment: dict[str, str]
) -> None:
    channel.basic_publish(exchange, split, b"1", as_json(message_id=b"\xff\xfe"))
    dead, body = receive(channel, dead_queue(environment))
    assert (body, dead.headers["mq-endpoint"]) == (b"1", split) and "cannot be read" in dead.headers["mq-reason"]


@pytest.mark.parametrize("key", ["", "a@b", "x" * 200, "snow \N{SNOWMAN}"])
def test_a_routing_key_that_is_no_name_is_refused_and_no_other_key_gets_its_end(
    client: serve.Client, channel: BlockingChannel, exchange: str, environment: dict[str, str], key: str
) -> None:
    replies = own_queue(channel)
    channel.basic_publish(exchange, key, b"1", as_json(message_id="y", reply_to=replies))
    assert (receive(channel, replies)[0].headers or {})["mq-status"] == 404
    assert receive(channel, dead_queue(environment))[0].headers["mq-endpoint"] == key
    assert httpx.get(f"{client.http_url()}/-/futures/@a@b@y").status_code == 404


def test_a_body_that_does_not_parse_is_a_dead_letter_of_the_backend(
    client: serve.Client, channel: BlockingChannel, exchange: str, deploy: Deploy, environment: dict[str, str]
) -> None:
    name, key = deploy(lambda request: request.data), uuid.uuid4().hex
    channel.basic_publish(exchange, name, b"{", as_json(message_id=key))
    with pytest.raises(serve.RemoteError, match="does not parse"):
        client.job(key, endpoint=name).result(timeout=30)
    assert receive(channel, f"{environment['MQSERVE_NAMESPACE']}.dead.{name}")[0].message_id == key


def test_a_deadline_and_a_method_count_as_for_jobs_to_a_backend(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str
) -> None:
    replies, late = own_queue(channel), uuid.uuid4().hex
    for header, status in (({"meta": {"call": "other"}}, 200), ({"meta": {"call": "missing"}}, 404), ({"deadline": 1}, 504)):
        properties = as_json(reply_to=replies, headers={"mq": msgspec.msgpack.encode(header)}, message_id=late if status == 504 else None)
        channel.basic_publish(exchange, split, b"1", properties)
        reply, body = receive(channel, replies)
        assert reply.headers["mq-status"] == status, body
    assert str(client.job(late, endpoint=split).status().state) == "expired"


def test_what_the_handler_says_comes_first_where_the_message_asks_for_it(channel: BlockingChannel, exchange: str, deploy: Deploy) -> None:
    def speak(request: serve.ServeRequest) -> str:
        serve.log("a line")
        return "done"

    name, replies = deploy(speak), own_queue(channel)
    channel.basic_publish(exchange, name, b"1", as_json(message_id=uuid.uuid4().hex, reply_to=replies, headers={"mq-events": True}))
    received = [receive(channel, replies) for _ in range(2)]
    assert [(reply.headers.get("mq-event"), body) for reply, body in received] == [("log", b"a line"), (None, b"done")]


def test_a_callback_url_of_the_publisher_stands_in_the_record(
    client: serve.Client, channel: BlockingChannel, exchange: str, split: str, store_url: str, environment: dict[str, str]
) -> None:
    key, header = uuid.uuid4().hex, {"job": {"callback": "https://example.com/told"}}
    channel.basic_publish(exchange, split, b"1", as_json(message_id=key, headers={"mq": msgspec.msgpack.encode(header)}))
    client.job(key, endpoint=split).result(timeout=30)
    with redis.Redis.from_url(store_url) as store:
        facts = store.hget(f"mqserve:{environment['MQSERVE_NAMESPACE']}:job:{{@{split}@{key}}}", "facts")
    assert isinstance(facts, bytes) and msgspec.msgpack.decode(facts)["callback"] == "https://example.com/told"


def test_a_job_that_waits_is_known_and_can_be_cancelled(
    client: serve.Client, channel: BlockingChannel, exchange: str, deploy: Deploy, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.ServeRequest) -> None:
        gate.pass_through(request.data)

    name = deploy(wait, max_concurrent_queries=1, job_slots=1)
    for key in ("first", "second"):
        channel.basic_publish(exchange, name, key.encode(), pika.BasicProperties(content_type="text/plain", message_id=key))
    wait_until(lambda: gate.came == 1)
    second = client.job("second", endpoint=name)
    wait_until(lambda: httpx.get(f"{client.http_url()}/-/futures/@{name}@second").status_code == 200)
    assert str(second.status().state) == "queued"
    assert second.cancel()
    gate.open()
    assert client.job("first", endpoint=name).result(timeout=30) is None
    assert str(second.status().state) == "cancelled" and gate.names == ["first"]


def test_backend_and_endpoint_together_are_refused(client: serve.Client) -> None:
    for find in (client.job, client.future):
        with pytest.raises(serve.BadValue, match="not both"):
            find("x", "backend", endpoint="endpoint")
