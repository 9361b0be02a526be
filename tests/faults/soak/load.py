"""The load: every way into the system at a steady rate, each request entered in the ledger with how it ended."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import aio_pika
import httpx
import msgspec
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage
from redis.exceptions import RedisError

from tests.faults.soak.backends import REQUEST_TIMEOUT_S, body_of, word_in, word_in_refusal
from tests.faults.soak.cluster import Client, Cluster
from tests.faults.soak.handle_client import GRACE_S
from tests.faults.soak.jobs import JobSender
from tests.faults.soak.ledger import SESSION, End, Entry, Ledger
from tests.faults.soak.sessions import Talker
from tests.faults.soak.streams import STREAM_KINDS, StreamReader

PUBLISH_S = 5.0  # one try
ACCEPT_S = 120.0  # all tries: longer than any server is away
READ_EVERY_S = 1.0
READ_AFTER_S = 2.0

HANDLE_SHARE = 0.22
MIX = {  # of the rest
    "get quick": 0.28,
    "get patient": 0.15,
    "flow flowing": 0.02,
    "flow replayed": 0.01,
    "events flowing": 0.02,
    "events replayed": 0.01,
    f"{SESSION} talking": 0.03,
    "post batched": 0.12,
    "post raising": 0.05,
    "post big": 0.03,
    "publish quick": 0.06,
    "publish batched": 0.04,
    "publish raising": 0.02,
    "publish transient patient": 0.05,
    "publish big": 0.01,
    "forget patient": 0.06,
    "forget batched": 0.04,
    "job quick": 0.05,
    "job patient": 0.03,
    "job raising": 0.02,
    "job retried": 0.04,
    "job piped": 0.04,
    "keep quick": 0.03,
    "keep raising": 0.01,
    "keep retried": 0.02,
}
DIRECT_JOB = "keep"  # the kind of a job that a direct publisher sends


class Load:
    """Numbers its requests from 1."""

    def __init__(self, cluster: Cluster, ledger: Ledger, chance: random.Random) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._chance = chance
        self._numbers = itertools.count(1)
        # Idle connections end before uvicorn ends them, at 5 s: a request must not meet that.
        self._http = httpx.AsyncClient(
            timeout=REQUEST_TIMEOUT_S + GRACE_S, limits=httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=2)
        )
        streams, talker = StreamReader(cluster.urls, ledger, self._http, chance), Talker(cluster.urls, ledger)
        self._by_proxy: dict[str, Callable[[Entry], Coroutine[Any, Any, None]]] = {
            "get": self._call,
            "post": self._call,
            **dict.fromkeys(STREAM_KINDS, streams.read),
            SESSION: talker.talk,
            "job": JobSender(cluster.urls, ledger, self._http, chance).send,
        }
        self._direct = DirectPublisher(cluster, ledger)

    async def run(self, rate: float, seconds: float) -> None:
        """Sends for so long, then waits until each request has ended, but for the results that stand in the store."""
        kinds, weights = list(MIX), list(MIX.values())
        async with self._http, asyncio.TaskGroup() as requests:
            until = due = time.monotonic()
            until += seconds
            while (due := due + self._chance.expovariate(rate)) < until:
                await asyncio.sleep(max(0, due - time.monotonic()))
                requests.create_task(self._request(self._chance.choices(kinds, weights)[0]))

    async def keep_direct(self) -> None:
        """The direct publisher's connection and the reading of its results, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._direct.keep_connected())
            tasks.create_task(self._direct.read_results())

    def _request(self, kind: str) -> Any:
        way, *durability, backend = kind.split()
        number = next(self._numbers)
        if way in self._by_proxy:
            proxy = self._chance.choice(list(self._cluster.urls))
            return self._by_proxy[way](self._ledger.send(Entry(number, way, backend, time.monotonic(), proxy=proxy)))
        kind = " ".join([way, *durability])
        entry = Entry(number, kind, backend, time.monotonic(), key=f"{backend}/soak-{number}", persistent=not durability)
        return self._direct.publish(self._ledger.send(entry), reply=way == "publish")

    async def _call(self, entry: Entry) -> None:
        url = f"{self._cluster.urls[entry.proxy]}/{entry.backend}"
        try:
            if entry.kind == "get":
                answer = await self._http.get(f"{url}/{entry.number}")
            else:
                answer = await self._http.post(url, json=body_of(entry.backend, entry.number))
        except httpx.ConnectError:
            return self._end(entry, End.FAILED, "refused")
        except httpx.TimeoutException as error:
            return self._end(entry, End.HANGING, repr(error))
        except httpx.TransportError:
            return self._end(entry, End.FAILED, "reset")
        entry.key = answer.headers.get("x-request-id", "")
        match answer.status_code:
            case 200:
                self._ledger.hear(entry, lambda: word_in(entry.backend, entry.number, answer.json()))
                self._end(entry, End.ANSWERED)
            case 500 if "Refused" in answer.text:
                self._end(entry, End.USER_ERROR)  # its word stands in the store only
            case 504:
                self._end(entry, End.EXPIRED, "504")
            case status:
                self._end(entry, End.FAILED, f"{status}")

    def _end(self, entry: Entry, end: End, detail: str = "") -> None:
        self._ledger.end(entry, end, time.monotonic(), detail)


class DirectPublisher:
    """Any AMQP client: publishes again until it is confirmed, under the same message_id; reads replies, and results from the store."""

    def __init__(self, cluster: Cluster, ledger: Ledger) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._replies = f"soak-{cluster.namespace}"  # durable, and no queue of the instance
        self._exchanges: dict[str, AbstractExchange] = {}  # of requests and of jobs, while there is a connection

    async def keep_connected(self) -> None:
        while True:
            try:
                async with await aio_pika.connect(self._cluster.broker.url, timeout=PUBLISH_S) as connection:
                    channel = await connection.channel(on_return_raises=True)
                    replies = await channel.declare_queue(self._replies, durable=True)
                    await replies.consume(self._on_reply, no_ack=True)
                    closed = asyncio.Event()
                    connection.close_callbacks.add(lambda *_, closed=closed: closed.set())
                    for kind in ("requests", "jobs"):
                        self._exchanges[kind] = await channel.get_exchange(f"{self._cluster.namespace}.{kind}", ensure=False)
                    await closed.wait()
            except (Exception, asyncio.CancelledError) as error:
                if was_cancelled(error):
                    raise
            finally:
                self._exchanges.clear()
            await asyncio.sleep(0.5)

    async def publish(self, entry: Entry, *, reply: bool) -> None:
        message = aio_pika.Message(
            json.dumps(body_of(entry.backend, entry.number)).encode(),
            content_type="application/json",
            message_id=f"soak-{entry.number}",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT if entry.persistent else aio_pika.DeliveryMode.NOT_PERSISTENT,
            reply_to=self._replies if reply else None,
            correlation_id=str(entry.number) if reply else None,
        )
        while not entry.accepted:
            try:
                exchange = self._exchanges.get("jobs" if entry.kind == DIRECT_JOB else "requests")
                if exchange is None:
                    raise ConnectionError("RabbitMQ is away")
                await exchange.publish(message, entry.backend, timeout=PUBLISH_S)
                entry.accepted = time.monotonic()
            except (Exception, asyncio.CancelledError) as error:
                if was_cancelled(error):
                    raise
                if time.monotonic() > entry.sent + ACCEPT_S:
                    return self._ledger.end(entry, End.FAILED, time.monotonic(), f"never confirmed: {error!r}")
                await asyncio.sleep(0.3)

    async def _on_reply(self, message: AbstractIncomingMessage) -> None:
        entry = self._ledger.entries.get(int(message.correlation_id or 0))
        if entry is None or message.message_id != f"soak-{entry.number}":
            self._ledger.findings.append(f"a reply that nobody asked for: {message.correlation_id}, {message.message_id}")
            return
        status, value = message.headers["mq-status"], json.loads(message.body)
        self._settle(entry, int(str(status)), value, value.get("error"))

    async def read_results(self) -> None:
        """Those that no reply has told, some of which never asked for one."""
        while True:
            await asyncio.sleep(READ_EVERY_S)
            await self.read_once()

    async def read_once(self) -> None:
        oldest = time.monotonic() - READ_AFTER_S
        entries = [entry for entry in self._ledger.entries.values() if entry.end is None and "/" in entry.key and entry.sent < oldest]
        try:
            for entry, result in zip(entries, await read_results(self._cluster, entries), strict=True):
                if result is not None and entry.end is None:
                    body = result.get("body")
                    self._settle(entry, result.get("status", 200), json.loads(body) if body else None, result.get("error"))
        except (RedisError, OSError, TimeoutError):
            pass  # the store is away

    def _settle(self, entry: Entry, status: int, value: Any, error: dict[str, Any] | None) -> None:
        if error is not None and status == 500 and error["type"].endswith("Refused"):
            self._ledger.hear(entry, lambda: word_in_refusal(entry.number, error["message"]))
            end, detail = End.USER_ERROR, ""
        elif error is not None:
            end, detail = End.FAILED, f"{status} {error['type']}"
        else:
            self._ledger.hear(entry, lambda: word_in(entry.backend, entry.number, value))
            end, detail = End.ANSWERED, ""
        if entry.end is None:  # a reply may come twice, and after the result was read
            self._ledger.end(entry, end, time.monotonic(), detail)


async def read_results(cluster: Cluster, entries: Sequence[Entry]) -> list[dict[str, Any] | None]:
    """What stands in the store, of each."""
    found: list[dict[str, Any] | None] = []
    for start in range(0, len(entries), 200):
        keys = [cluster.keys.future(entry.key) for entry in entries[start : start + 200]]
        raws: list[Any] = await cluster.redis.mget(keys)
        found += [None if raw is None else msgspec.msgpack.decode(raw) for raw in raws]
    return found


async def follow_client(client: Client, ledger: Ledger) -> None:
    """Enters what the handle client says, until it says that its load is over."""
    async for said in client.lines():
        match said:
            case {"event": "sent", "kind": str(kind), "number": int(number), "backend": str(backend), "at": float(at), "key": str(key)}:
                ledger.send(Entry(number, kind, backend, at, key=key, persistent=kind == "submit"))
            case {"event": "end", "number": int(number), "end": str(end), "detail": str(detail), "value": value, "at": float(at)}:
                entry = ledger.entries[number]
                if end == End.ANSWERED:
                    ledger.hear(entry, partial(word_in, entry.backend, number, value))
                elif end == End.USER_ERROR:
                    ledger.hear(entry, partial(word_in_refusal, number, str(value)))
                ledger.end(entry, End(end), at, detail)
            case {"event": "loaded"}:
                return
    raise RuntimeError(f"the client ended by itself:\n{client.log.read_text()}")


def was_cancelled(error: BaseException) -> bool:
    """aiormq raises CancelledError for a stuck connection too: only ours counts on the task."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
