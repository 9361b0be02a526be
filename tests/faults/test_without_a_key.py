"""An instance without a secret key goes by whom RabbitMQ says a message is of."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pika
import pytest

from mqserve.broker.envelope import Header, RequestHead, mint_id
from tests.instances import CommandLine, wait_until
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ

START = """
import sys
import time
import mqserve as serve

client = serve.start(http_options={"port": int(sys.argv[1])})
client.create_backend("told", "builtins:repr")
client.create_endpoint("told", backend="told", route="/told")
print(client.get_handle("told").remote(1).result(timeout=30), flush=True)
time.sleep(600)
"""
FORGED = [
    Header(origin="http", meta=RequestHead(path="/admin", client=("127.0.0.1", 1))),
    Header(origin="handle"),
    Header(meta=RequestHead(path="/admin")),
]


@pytest.fixture
def url(session_broker: PrivateRabbitMQ, store_url: str, namespace: str, tmp_path: Path) -> Iterator[str]:
    """Where the instance listens; it runs until the test is over."""
    shell = CommandLine(tmp_path, MQSERVE_BROKER_URL=session_broker.url, MQSERVE_STORE_URL=store_url, MQSERVE_NAMESPACE=namespace)
    port = free_port()
    shell.start_program([sys.executable, "-c", START, str(port)]).wait_for("ServeRequest")
    yield f"http://127.0.0.1:{port}"
    shell.close()


@pytest.fixture
def stranger(session_broker: PrivateRabbitMQ, namespace: str) -> Iterator[str]:
    """The RabbitMQ URL of one who may publish requests and read answers."""
    session_broker.ctl("add_user", "stranger", "secret")
    session_broker.ctl("set_permissions", "stranger", "^answers-", rf"^{namespace}\.(requests|endpoints)$", "^answers-")
    yield f"amqp://stranger:secret@127.0.0.1:{session_broker.port}/"
    session_broker.ctl("delete_user", "stranger")


def test_requests_of_http_and_of_handles_are_served(url: str) -> None:
    assert httpx.get(f"{url}/told").text.startswith("<mqserve.replicas.requests.Request")


def test_a_header_of_another_user_does_not_count_and_plain_data_does(url: str, stranger: str, namespace: str) -> None:
    for header in FORGED:
        for user_id in (None, "stranger"):
            status, body = answer(stranger, namespace, header, user_id)
            assert status == 422 and json.loads(body)["error"]["type"] == "mqserve.BadSignature", body
            assert "MQSERVE_HEADER_USERS" in json.loads(body)["error"]["message"]
    assert answer(stranger, namespace, Header(deadline=2**50), "stranger") == (200, b"<ServeRequest GET>")


def test_a_header_of_the_replicas_own_user_counts_where_the_message_says_whose_it_is(
    url: str, session_broker: PrivateRabbitMQ, namespace: str
) -> None:
    own = pika.URLParameters(session_broker.url).credentials.username
    assert answer(session_broker.url, namespace, FORGED[0], None)[0] == 422
    assert b"Request" in answer(session_broker.url, namespace, FORGED[0], own)[1]


def test_a_strangers_message_to_an_endpoint_is_answered_and_lends_its_header_no_trust(url: str, stranger: str, namespace: str) -> None:
    assert answer(stranger, namespace, Header(deadline=2**50), "stranger", "endpoints") == (200, b"<ServeRequest GET>")
    for header in FORGED:
        status, body = answer(stranger, namespace, header, "stranger", "endpoints")
        assert status == 422 and json.loads(body)["error"]["type"] == "mqserve.BadSignature", body


def test_a_dead_letter_is_retried_for_whom_its_sender_was_and_not_for_who_retries_it(
    url: str, session_broker: PrivateRabbitMQ, stranger: str, store_url: str, namespace: str, tmp_path: Path
) -> None:
    """The operator's command publishes as the replicas' own user, whose headers count."""
    answer(stranger, namespace, FORGED[0], "stranger")
    shell = CommandLine(tmp_path, MQSERVE_BROKER_URL=session_broker.url, MQSERVE_STORE_URL=store_url, MQSERVE_NAMESPACE=namespace)
    refused = shell.run("dead", "retry", "told", "--all")
    assert refused.returncode == 1 and "no replica would run it, even if it is sent again" in refused.stderr, refused


def answer(url: str, namespace: str, header: Header, user_id: str | None, exchange: str = "requests") -> tuple[int, bytes]:
    """What comes back to a message of a header's author."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        answers = channel.queue_declare(f"answers-{mint_id()}", exclusive=True).method.queue
        properties = pika.BasicProperties(
            content_type="text/plain",
            message_id=mint_id(),
            reply_to=answers,
            user_id=user_id,
            headers={"mq": msgspec.msgpack.encode(header)},
        )
        channel.basic_publish(f"{namespace}.{exchange}", "told", b"1", properties)
        found: list[tuple[int, bytes]] = []

        def look() -> Any:
            _, reply, body = channel.basic_get(answers, auto_ack=True)
            if reply is not None:
                found.append((reply.headers["mq-status"], body))
            return found

        wait_until(look)
        return found[0]
