"""What a direct publisher gets of a handler that yields, with plain pika: a message for each chunk, or one body in Redis."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pika
import pytest
import redis
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from tests.instances import Deploy, distributed_only, wait_until
from tests.test_direct_publishing import own_queue, receive

pytestmark = distributed_only

Reply = tuple[pika.BasicProperties, bytes]


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def exchange(client: serve.Client, environment: dict[str, str]) -> str:
    return f"{environment['MQSERVE_NAMESPACE']}.requests"


def count(request: serve.ServeRequest) -> Iterator[Any]:
    for number in range(request.data):
        yield {"number": number}
    if request.data == 3:
        raise LookupError("three is odd")


def ask(channel: BlockingChannel, exchange: str, backend: str, number: int) -> tuple[str, list[Reply]]:
    """Returns the id and all messages of the answer."""
    replies, name = own_queue(channel), uuid.uuid4().hex
    properties = pika.BasicProperties(content_type="application/json", message_id=name, reply_to=replies, correlation_id="question 7")
    channel.basic_publish(exchange, backend, str(number).encode(), properties)
    messages = [receive(channel, replies)]
    while not (messages[-1][0].headers or {}).get("mq-end"):
        messages.append(receive(channel, replies))
    return name, messages


@pytest.mark.parametrize("number", [0, 5, 500])
def test_each_chunk_is_a_message_and_the_last_one_says_that_it_is_the_end(
    channel: BlockingChannel, exchange: str, deploy: Deploy, number: int, store_url: str, environment: dict[str, str]
) -> None:
    backend = deploy(count)
    name, messages = ask(channel, exchange, backend, number)
    *chunks, (end, body) = messages
    assert [json.loads(chunk) for _, chunk in chunks] == [{"number": each} for each in range(number)]
    numbers = [properties.headers["mq-seq"] for properties, _ in messages]
    assert numbers == sorted(set(numbers)) and {properties.correlation_id for properties, _ in messages} == {"question 7"}
    assert all(properties.content_type == "application/json" and "mq-status" not in properties.headers for properties, _ in chunks)
    assert end.headers["mq-status"] == 200 and not body
    with redis.Redis.from_url(store_url) as store:
        key = f"mqserve:{environment['MQSERVE_NAMESPACE']}:future:{{{backend}/{name}}}"
        raw = wait_until(lambda: store.get(key))
        assert "error" not in msgspec.msgpack.decode(raw) and not list(store.scan_iter(f"*:stream:{{{backend}/{name}}}"))


def test_the_end_of_a_handler_that_fails_says_so(channel: BlockingChannel, exchange: str, deploy: Deploy) -> None:
    _, [*chunks, (end, body)] = ask(channel, exchange, deploy(count), 3)
    assert len(chunks) == 3 and end.headers["mq-status"] == 500
    assert json.loads(body)["error"] == {"type": "LookupError", "message": "three is odd"}


def test_without_reply_to_the_chunks_are_one_body_in_redis(channel: BlockingChannel, exchange: str, deploy: Deploy) -> None:
    def words(request: serve.ServeRequest) -> Iterator[str]:
        yield from ["one ", "two ", "three"]

    backend, name = deploy(words), uuid.uuid4().hex[:8]
    channel.basic_publish(exchange, backend, b"{}", pika.BasicProperties(content_type="application/json", message_id=name))
    assert serve.future(name, backend=backend).result(timeout=30) == "one two three"
