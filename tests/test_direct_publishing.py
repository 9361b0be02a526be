"""What any AMQP client may do, with plain pika: docs/protocol.md in tests. Only the distributed form has a broker to publish to."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pika
import pytest
import redis
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from mqserve.broker.envelope import Header
from tests.apps import plain_app
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, wait_until
from tests.sealed import sealed

pytestmark = distributed_only


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def exchange(client: serve.Client, environment: dict[str, str]) -> str:
    return f"{environment['MQSERVE_NAMESPACE']}.requests"


@pytest.fixture(scope="module")
def summing(client: serve.Client) -> Iterator[str]:
    """A backend that sums what is published to it."""

    def add(request: serve.ServeRequest) -> dict[str, Any]:
        if request.data == "fail":
            raise LookupError("no such number")
        return {"sum": sum(request.data)}

    deploy = Deploy(client)
    yield deploy(add)
    deploy.undo()


def receive(channel: BlockingChannel, queue: str) -> tuple[pika.BasicProperties, bytes]:
    """The next message of a queue, taken off it."""

    def look() -> tuple[pika.BasicProperties, bytes] | None:
        _, properties, body = channel.basic_get(queue, auto_ack=True)
        return None if properties is None else (properties, body)

    found = wait_until(look)
    assert found is not None
    return found


def own_queue(channel: BlockingChannel) -> str:
    return str(channel.queue_declare("", exclusive=True).method.queue)


def test_a_json_message_is_served_and_answered_like_any_rpc(channel: BlockingChannel, exchange: str, summing: str) -> None:
    replies = own_queue(channel)
    properties = pika.BasicProperties(
        content_type="application/json", message_id=uuid.uuid4().hex, reply_to=replies, correlation_id="question 7"
    )
    channel.basic_publish(exchange, summing, b"[1, 2, 3.5]", properties)
    reply, body = receive(channel, replies)
    assert (reply.correlation_id, reply.content_type, json.loads(body)) == ("question 7", "application/json", {"sum": 6.5})


def test_a_message_to_an_app_is_unprocessable_and_no_dead_letter(
    channel: BlockingChannel, exchange: str, client: serve.Client, joining: CommandLine
) -> None:
    client.mount("/unpublished", plain_app)
    replies = own_queue(channel)
    channel.basic_publish(exchange, "unpublished", b"1", pika.BasicProperties(content_type="application/json", reply_to=replies))
    reply, body = receive(channel, replies)
    assert (reply.headers or {})["mq-status"] == 422 and b"a direct publisher sends none" in body
    assert joining.run("dead", "list", "unpublished", "--json").stdout.strip() in ("", "[]")
    client.delete_endpoint("unpublished")
    client.delete_backend("unpublished")


def test_the_result_stands_in_redis_under_the_callers_own_key(
    channel: BlockingChannel, exchange: str, summing: str, store_url: str, environment: dict[str, str]
) -> None:
    key = f"order-{uuid.uuid4().hex[:6]}"
    channel.basic_publish(exchange, summing, b"[1, 2]", pika.BasicProperties(content_type="application/json", message_id=key))
    assert serve.future(key, backend=summing).result(timeout=30) == {"sum": 3}
    with redis.Redis.from_url(store_url) as store:
        name = f"mqserve:{environment['MQSERVE_NAMESPACE']}:future:{{{summing}/{key}}}"
        stored = msgspec.msgpack.decode(store.get(name))
        assert 0 < int(store.ttl(name)) <= 600
    assert (stored.get("v", 1), stored.get("status", 200), stored["backend"], json.loads(stored["body"])) == (1, 200, summing, {"sum": 3})


def test_the_same_message_id_runs_once_and_is_answered_twice(
    channel: BlockingChannel, exchange: str, deploy: Deploy, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    gate.open()

    def count(request: serve.ServeRequest) -> int:
        gate.pass_through()
        return gate.came

    backend, replies = deploy(count), own_queue(channel)
    properties = pika.BasicProperties(content_type="application/json", message_id="order-17", reply_to=replies)
    for _ in range(2):
        channel.basic_publish(exchange, backend, b"{}", properties)
        assert receive(channel, replies)[1] == b"1"
    assert gate.came == 1


def test_one_message_id_for_two_backends_is_two_requests(channel: BlockingChannel, exchange: str, summing: str, deploy: Deploy) -> None:
    def echo(request: serve.ServeRequest) -> Any:
        return request.data

    backend = deploy(echo)
    key = uuid.uuid4().hex[:8]
    for target in (summing, backend):
        channel.basic_publish(exchange, target, b"[1, 2]", pika.BasicProperties(content_type="application/json", message_id=key))
    assert serve.future(key, backend=backend).result(timeout=30) == [1, 2]
    assert serve.future(key, backend=summing).result(timeout=30) == {"sum": 3}


def test_a_message_without_any_property_is_fire_and_forget(channel: BlockingChannel, exchange: str, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.open()

    def take(request: serve.ServeRequest) -> None:
        gate.pass_through(repr(request.data))

    channel.basic_publish(exchange, deploy(take), b"raw")
    wait_until(lambda: gate.came == 1)
    assert gate.names == ["b'raw'"]


@pytest.mark.parametrize(
    ("content_type", "body", "data"),
    [
        ("application/json", b'{"a": 1}', {"a": 1}),
        ("application/msgpack", msgspec.msgpack.encode({"a": [1.5]}), {"a": [1.5]}),
        ("text/plain", "grüße".encode(), "grüße"),
        ("application/octet-stream", b"raw", "raw"),
    ],
)
def test_the_content_type_says_how_the_body_is_read(
    channel: BlockingChannel, exchange: str, echoing: str, content_type: str, body: bytes, data: object
) -> None:
    replies = own_queue(channel)
    properties = pika.BasicProperties(content_type=content_type, message_id=uuid.uuid4().hex, reply_to=replies)
    channel.basic_publish(exchange, echoing, body, properties)
    assert json.loads(receive(channel, replies)[1]) == {"data": data}


@pytest.fixture(scope="module")
def echoing(client: serve.Client) -> Iterator[str]:
    def echo(request: serve.ServeRequest) -> Any:
        return {"data": request.data}

    deploy = Deploy(client)
    yield deploy(echo)
    deploy.undo()


def test_a_users_exception_is_answered_as_json(channel: BlockingChannel, exchange: str, summing: str) -> None:
    replies = own_queue(channel)
    properties = pika.BasicProperties(content_type="application/json", message_id=uuid.uuid4().hex, reply_to=replies)
    channel.basic_publish(exchange, summing, b'"fail"', properties)
    reply, body = receive(channel, replies)
    assert json.loads(body)["error"]["type"] == "LookupError" and reply.headers["mq-status"] == 500


GARBAGE = {
    "an mq header that is no bytes": (pika.BasicProperties(headers={"mq": "text"}), b"{}", "mq header"),
    "an mq header that does not parse": (pika.BasicProperties(headers={"mq": b"\xc1\xff"}), b"{}", "does not parse"),
    "an mq header of an unknown version": (
        pika.BasicProperties(headers={"mq": msgspec.msgpack.encode({"v": 99})}),
        b"{}",
        "version 99",
    ),
    "a body that is no JSON": (pika.BasicProperties(content_type="application/json"), b'{"a": ', "does not parse"),
    "a pickle from a stranger": (
        pika.BasicProperties(content_type="application/x-python-pickle"),
        b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
        "pickle",
    ),
    "a reply to one of our own queues": (pika.BasicProperties(content_type="application/json", reply_to="OURS"), b"{}", "reply_to"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_goes_to_the_dead_letters_and_the_replica_lives(
    channel: BlockingChannel, exchange: str, echoing: str, environment: dict[str, str], kind: str
) -> None:
    namespace = environment["MQSERVE_NAMESPACE"]
    properties, body, reason = GARBAGE[kind]
    if properties.reply_to:
        properties.reply_to = f"{namespace}.backend.{echoing}.1"
    properties.message_id = uuid.uuid4().hex
    channel.basic_publish(exchange, echoing, body, properties)
    dead, dead_body = receive(channel, f"{namespace}.dead.{echoing}")
    assert dead_body == body and dead.message_id == properties.message_id
    assert reason in dead.headers["mq-reason"] and dead.headers["mq-backend"] == echoing
    assert serve.get_handle(echoing).remote("alive").result(timeout=30) == {"data": "alive"}


def test_a_publisher_of_garbage_that_gave_an_id_finds_the_refusal_there(channel: BlockingChannel, exchange: str, echoing: str) -> None:
    key = uuid.uuid4().hex[:8]
    channel.basic_publish(exchange, echoing, b"{", pika.BasicProperties(content_type="application/json", message_id=key))
    with pytest.raises(serve.RemoteError, match="does not parse"):
        serve.future(key, backend=echoing).result(timeout=30)


@pytest.mark.parametrize("with_header", ["a stranger's", "one of ours"])
def test_a_pickle_is_not_opened_without_its_own_seal(
    channel: BlockingChannel, broker_url: str, exchange: str, echoing: str, tmp_path: Path, with_header: str
) -> None:
    mark, name, kind = tmp_path / "opened", uuid.uuid4().hex, "application/x-python-pickle"
    body = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    headers = {"mq": msgspec.msgpack.encode({"v": 1, "origin": "handle"})}
    if with_header == "one of ours":
        headers = sealed(exchange.removesuffix(".requests"), echoing, name, Header(origin="handle"), body=body, content_type=kind)
    user = pika.URLParameters(broker_url).credentials.username
    properties = pika.BasicProperties(content_type=kind, message_id=name, headers=headers, user_id=user)
    channel.basic_publish(exchange, echoing, body, properties)
    assert serve.get_handle(echoing).remote("alive").result(timeout=30) == {"data": "alive"}
    assert not mark.exists()


# The mq header.


class Methods:
    def __call__(self, request: serve.ServeRequest) -> str:
        return "called"

    def predict(self, request: serve.ServeRequest) -> Any:
        return [request.data, request.method, dict(request.headers)]


@pytest.fixture(scope="module")
def predicting(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(Methods)
    deploy.undo()


def test_a_deadline_and_a_method_count_from_anybody(channel: BlockingChannel, exchange: str, predicting: str) -> None:
    replies = own_queue(channel)
    for header, status in (
        ({"meta": {"call": "predict"}, "deadline": 2**60}, 200),
        ({"meta": {"call": "missing"}}, 404),
        ({"meta": {"call": "predict"}, "deadline": 1}, 504),
        ({"v": 1, "origin": "", "shadow": False, "meta": {"call": "predict", "method": "GET", "size": 3}, "colour": "red"}, 200),
    ):
        properties = pika.BasicProperties(
            content_type="application/json", reply_to=replies, headers={"mq": msgspec.msgpack.encode(header), "mq-seal": "of nobody"}
        )
        channel.basic_publish(exchange, predicting, b"1", properties)
        reply, body = receive(channel, replies)
        assert reply.headers["mq-status"] == status, (header, body)
        assert status != 200 or json.loads(body) == [1, "GET", {}]


def test_a_deadline_in_the_far_future_is_one_of_25_minutes(
    channel: BlockingChannel, exchange: str, deploy: Deploy, environment: dict[str, str], tmp_path: Path
) -> None:
    gate, key = Gate(tmp_path), uuid.uuid4().hex

    def wait(request: Any) -> None:
        gate.pass_through()

    name = deploy(wait, delivery="at_most_once")
    header = {"mq": msgspec.msgpack.encode({"deadline": 2**61})}
    channel.basic_publish(exchange, name, b"1", pika.BasicProperties(content_type="application/json", message_id=key, headers=header))
    wait_until(lambda: gate.came == 1)
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        (mark,) = store.scan_iter(f"mqserve:{environment['MQSERVE_NAMESPACE']}:start:*{key}*")
        assert 0 < store.pttl(mark) < 60 * 60 * 1000
    gate.open()


CLAIMS = {
    "HTTP": {"origin": "http", "meta": {"path": "/x", "client": ["127.0.0.1", 1]}},
    "a handle": {"origin": "handle"},
    "a header": {"meta": {"headers": [[b"cookie", b"x"]]}},
    "an inbox": {"inbox": "mqserve:x:inbox:client-1"},
    "another's body": {"ref": "mqserve:x:body:{x}"},
    "a shadow": {"shadow": True},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_only_our_own_processes_may_say_is_refused_under_the_publishers_own_key(
    client: serve.Client, channel: BlockingChannel, exchange: str, predicting: str, claim: str
) -> None:
    """Also under the id of a request of ours, whose result it must not be taken for."""
    replies, ours = own_queue(channel), client.get_handle(predicting).remote(1)
    assert ours.result(timeout=30) == "called"
    for name in (ours.id, uuid.uuid4().hex, "order-1"):
        headers = {"mq": msgspec.msgpack.encode(CLAIMS[claim])}
        properties = pika.BasicProperties(
            content_type="application/json", message_id=name, reply_to=replies, correlation_id=name, headers=headers
        )
        channel.basic_publish(exchange, predicting, b"1", properties)
        reply, body = receive(channel, replies)
        assert (reply.headers["mq-status"], reply.correlation_id) == (422, name)
        assert json.loads(body)["error"]["type"] == "mqserve.BadSignature"
    with pytest.raises(serve.RemoteError, match="says more than a direct publisher may"):
        serve.future("order-1", backend=predicting).result(timeout=30)
    assert serve.future(ours.id).result(timeout=30) == serve.future(ours.id, backend=predicting).result(timeout=30) == "called"


def test_a_sealed_message_that_is_repeated_for_its_answer_is_refused(channel: BlockingChannel, exchange: str, predicting: str) -> None:
    replies, name = own_queue(channel), uuid.uuid4().hex
    headers = sealed(exchange.removesuffix(".requests"), predicting, name, Header(origin="http"), body=b"1")
    properties = pika.BasicProperties(content_type="application/json", message_id=name, reply_to=replies, headers=headers)
    channel.basic_publish(exchange, predicting, b"1", properties)
    reply, body = receive(channel, replies)
    assert reply.headers["mq-status"] == 422 and "repeats it to have the answer" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("slashed", ["{backend}/order", "a/{backend}", "/", "{hex}.result"])
def test_slashes_and_dots_in_an_id_lead_to_no_key_but_its_own(
    channel: BlockingChannel, exchange: str, summing: str, store_url: str, environment: dict[str, str], slashed: str
) -> None:
    name = slashed.format(backend=summing, hex=uuid.uuid4().hex)
    channel.basic_publish(exchange, summing, b"[1, 2]", pika.BasicProperties(content_type="application/json", message_id=name))
    assert serve.future(name, backend=summing).result(timeout=30) == {"sum": 3}
    with redis.Redis.from_url(store_url) as store:
        root = f"mqserve:{environment['MQSERVE_NAMESPACE']}:future"
        assert store.exists(f"{root}:{{{summing}/{name}}}") and not store.exists(f"{root}:{{{name}}}")
