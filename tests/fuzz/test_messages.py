"""Real servers: whatever a stranger publishes is answered or set aside, and whatever becomes of a document, what runs goes on."""

import random
import struct
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
from mqserve.broker.envelope import Header, RequestHead, mint_id
from mqserve.broker.values.codecs import JSON, MSGPACK, PICKLE, TEXT
from tests.fuzz.material import CORPUS, bomb
from tests.instances import Deploy, distributed_only, wait_until
from tests.sealed import sealed

pytestmark = distributed_only
PUBLISHED = 300


class RawProperties(pika.BasicProperties):  # type: ignore[misc]
    """Properties as bytes of the wire, which pika would not write."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def encode(self) -> list[bytes]:
        return [self._raw]


def short(raw: bytes) -> bytes:
    return bytes((len(raw),)) + raw


def properties(content_type: bytes, mq: bytes | None, message_id: bytes, reply_to: bytes) -> RawProperties:
    """Content type, the `mq` header, `reply_to` and message id: any bytes in each."""
    table = b"" if mq is None else b"\x02mqx" + struct.pack(">I", len(mq)) + mq
    flags = 1 << 15 | 1 << 13 | 1 << 9 | 1 << 7
    return RawProperties(
        struct.pack(">H", flags) + short(content_type) + struct.pack(">I", len(table)) + table + short(reply_to) + short(message_id)
    )


class Stranger:
    """Publishes what nobody should: the same messages every time."""

    def __init__(self, channel: BlockingChannel, exchange: str, pickled: bytes) -> None:
        self._channel, self._exchange, self._pickled = channel, exchange, pickled
        self._random = random.Random(17)
        self._mqs = [path.read_bytes() for path in sorted((CORPUS / "mq").iterdir())]
        self._strange = [path.read_bytes() for path in sorted((CORPUS / "properties").iterdir())]
        meta = RequestHead("POST", "/a", params=(("n", "int", "x"), ("m", "no-such-convertor", "1")))
        self._valid = [
            msgspec.msgpack.encode(header) for header in (Header(origin="http", meta=meta), Header(origin="handle"), Header(once=True))
        ]

    def publish(self, backend: str, number: int) -> None:
        pick = self._random.choice
        bodies = [
            b"{",
            b"\xff",
            b"[" * 5000,
            self._pickled,
            b"{}",
            self._accident(b'{"a": [1, 2.5, null]}'),
            msgspec.msgpack.encode(self._pickled),
        ]
        if number % 10 == 0:
            return self._channel.basic_publish(self._exchange, backend, pick(bodies), RawProperties(pick(self._strange)))  # type: ignore[no-any-return]
        mq = pick(
            [None, None, pick(self._mqs), self._accident(pick(self._valid)), pick(self._valid), self._random.randbytes(20), self._pickled]
        )
        types = [JSON.encode(), MSGPACK.encode(), TEXT.encode(), PICKLE.encode(), b"", b"\xff", b"t" * 255, self._accident(JSON.encode())]
        ids = [b"%d" % number, b"%032x" % number, b"", b"\xc3\x28 %d" % number, f"№ {number}".encode()]
        replies = [b"", b"", b"nobody", f"{self._exchange}".encode(), b"amq.rabbitmq.reply-to.x", b"\x80", b"q" * 255]
        return self._channel.basic_publish(self._exchange, backend, pick(bodies), properties(pick(types), mq, pick(ids), pick(replies)))  # type: ignore[no-any-return]

    def _accident(self, valid: bytes) -> bytes:
        raw = bytearray(valid)
        for _ in range(self._random.randint(1, 3)):
            raw[self._random.randrange(len(raw))] ^= self._random.randint(1, 255)
        return bytes(raw)


def read_all(request: serve.ServeRequest) -> str:
    return repr([request.data, request.path_params, request.query_params, request.headers])


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def store(store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(store_url) as store:
        yield store


def replicas_of(store: redis.Redis, namespace: str, backend: str) -> list[dict[str, Any]]:
    """The beats of a backend's replicas."""
    fields: Any = store.hgetall(f"mqserve:{namespace}:beats")
    beats = [msgspec.json.decode(raw) for raw in fields.values()]
    return [beat for beat in beats if beat.get("backend") == backend]


def test_what_strangers_publish_is_answered_or_set_aside_and_the_replica_lives(
    channel: BlockingChannel, store: redis.Redis, environment: dict[str, str], deploy: Deploy, tmp_path: Path
) -> None:
    namespace, mark = environment["MQSERVE_NAMESPACE"], tmp_path / "opened"
    backend = deploy(read_all)
    (before,) = replicas_of(store, namespace, backend)
    stranger = Stranger(channel, f"{namespace}.requests", bomb(mark))
    channel.confirm_delivery()
    for number in range(PUBLISHED):
        stranger.publish(backend, number)

    def told() -> str:
        return f"{replicas_of(store, namespace, backend)}, {waiting(channel, f'{namespace}.backend.{backend}.1')} waiting"

    def is_over() -> bool:
        (now,) = replicas_of(store, namespace, backend)
        return waiting(channel, f"{namespace}.backend.{backend}.1") == 0 and now.get("running", 0) == 0 and now.get("served", 0) > 0

    wait_until(is_over, told=told)
    assert serve.get_handle(backend).remote("alive").result(timeout=30).startswith("['alive'")
    (after,) = replicas_of(store, namespace, backend)
    assert (after["id"], after["pid"]) == (before["id"], before["pid"]) and not mark.exists()
    dead = waiting(channel, f"{namespace}.dead.{backend}")
    assert PUBLISHED / 3 < dead < PUBLISHED


def waiting(channel: BlockingChannel, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def test_one_bad_request_does_not_fail_the_batch_it_is_in(
    channel: BlockingChannel, store: redis.Redis, environment: dict[str, str], deploy: Deploy
) -> None:
    @serve.accept_batch
    def total(requests: list[serve.ServeRequest]) -> list[int]:
        return [len(requests)] * len(requests)

    backend = deploy(total, max_batch_size=2, batch_wait_timeout=0.5)
    namespace = environment["MQSERVE_NAMESPACE"]
    bad = Header(origin="http", meta=RequestHead(params=(("n", "no-such-convertor", "x"),)))
    ids = [mint_id() for _ in range(4)]
    for number, name in enumerate(ids):
        headers = sealed(namespace, backend, name, Header(origin="http") if number % 2 else bad, body=b"1")
        sent = pika.BasicProperties(content_type=JSON, message_id=name, headers=headers)
        channel.basic_publish(f"{namespace}.requests", backend, b"1", sent)

    def statuses() -> list[int]:
        found = [store.get(f"mqserve:{namespace}:future:{{{name}}}") for name in ids]
        return [msgspec.msgpack.decode(raw).get("status", 200) for raw in found if raw]  # type: ignore[arg-type]

    wait_until(lambda: len(statuses()) == 4)
    assert statuses() == [422, 200, 422, 200]


@pytest.mark.parametrize("broken", [b"\xff", b"[" * 5000], ids=["not UTF-8", "deep"])
@pytest.mark.parametrize("document", ["desired", "observed", "instance", "leader"])
def test_a_broken_document_is_survived_by_all_who_read_it(
    client: serve.Client, store: redis.Redis, environment: dict[str, str], survivor: str, document: str, broken: bytes
) -> None:
    namespace = environment["MQSERVE_NAMESPACE"]
    key = f"mqserve:{namespace}:{document}"
    before = replicas_of(store, namespace, survivor)[0]
    with httpx.Client() as http:
        store.set(key, broken)
        store.publish(f"mqserve:{namespace}:changed", b"")
        for _ in range(20):
            assert http.get(f"{client.http_url()}/{survivor}").text == "ok"
        if document == "desired":
            with pytest.raises(serve.MQServeError, match="desired state in the store"):
                client.set_traffic(survivor, {survivor: 1.0})
            store.delete(key)
        wait_until(lambda: (store.get(key) or broken) != broken, told=lambda: str(store.get(key)))  # its controller writes it anew
        assert http.get(f"{client.http_url()}/{survivor}").text == "ok"
    client.set_traffic(survivor, {survivor: 1.0})
    assert replicas_of(store, namespace, survivor)[0]["pid"] == before["pid"]


@pytest.fixture(scope="module")
def survivor(client: serve.Client) -> Iterator[str]:
    def ok(request: Any) -> str:
        return "ok"

    client.create_backend("survivor", ok)
    client.create_endpoint("survivor", backend="survivor", route="/survivor")
    yield "survivor"
    client.delete_endpoint("survivor")
    client.delete_backend("survivor")


def test_a_beat_or_a_field_that_cannot_be_read_is_left_out(
    client: serve.Client, store: redis.Redis, environment: dict[str, str], survivor: str
) -> None:
    beats = f"mqserve:{environment['MQSERVE_NAMESPACE']}:beats"
    for field, raw in ((b"node:\xff", b"{}"), (b"replica:x", b"[" * 5000), (b"proxy:y", b'{"kind": "proxy", "id": "\xff", "at": 1}')):
        store.hset(beats, field, raw)
    client.update_backend_config(survivor, {"num_replicas": 2})
    client.update_backend_config(survivor, {"num_replicas": 1})
    store.hdel(beats, b"node:\xff", b"replica:x", b"proxy:y")


def test_a_result_that_cannot_be_read_is_an_error_for_whoever_waits(store: redis.Redis, environment: dict[str, str], survivor: str) -> None:
    for number, raw in enumerate([b"{", b"\x91" * 5000, b"\x81\xa7backend\xa1\xff"]):
        store.set(f"mqserve:{environment['MQSERVE_NAMESPACE']}:future:{{{survivor}/broken-{number}}}", raw, ex=60)
        with pytest.raises(serve.MQServeError, match="does not parse"):
            serve.future(f"broken-{number}", backend=survivor).result(timeout=30)
