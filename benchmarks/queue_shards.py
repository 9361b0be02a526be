"""What RabbitMQ carries in one queue of a backend, and in several: messages per second, and its CPU microseconds for each.

    python -m benchmarks.queue_shards --shards 1 4

The load is prepared bytes on plain sockets, so that RabbitMQ is the limit and not Python: publishers with confirms, and consumers that ack
and have one channel for each queue, as replicas do. The numbers of shards take turns: 1 4, 4 1, 1 4, … RabbitMQ is a private one unless
MQSERVE_BROKER_URL names another.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import secrets
import selectors
import socket
import statistics
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlparse

from pamqp import commands, header
from pamqp.frame import marshal, unmarshal

from mqserve.broker.queue_names import backend_queue, requests_exchange, routing_key
from mqserve.broker.rabbitmq.hot_frames import pack_publish
from mqserve.broker.rabbitmq.queue import open_rabbitmq

from .subjects import Servers, open_servers

MARK = b"<a message of the measurement>"
BODY = MARK + b"x" * 70
WINDOW = 2000  # messages on the way
GROUP = 100  # messages of one write
PREFETCH = 256
READ_BYTES = 256 * 1024
WARM_UP_S = 1.0
BACKEND = "b"
ACK_ALL = commands.Basic.Ack(delivery_tag=0, multiple=True)


@dataclass(frozen=True)
class Rate:
    """Of one round."""

    per_s: float
    broker_us: float  # of CPU, per message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--connections", type=int, default=4, help="of publishers, and as many of consumers")
    arguments = parser.parse_args()
    rates: dict[int, list[Rate]] = {shards: [] for shards in arguments.shards}
    with ExitStack() as stack:
        servers = open_servers(stack)
        for turn in range(arguments.rounds):
            for shards in reversed(arguments.shards) if turn % 2 else arguments.shards:
                rates[shards].append(measure(servers, shards, arguments.connections, arguments.seconds))
    base = statistics.median(rate.per_s for rate in rates[arguments.shards[0]])
    print(f"{'shards':>6} {'messages/s, median and spread':>32} {'ratio':>6} {'RabbitMQ µs':>12}")
    for shards, seen in rates.items():
        per_s = sorted(rate.per_s for rate in seen)
        middle = statistics.median(per_s)
        cost_us = statistics.median(rate.broker_us for rate in seen)
        print(f"{shards:>6} {f'{middle:,.0f} ({per_s[0]:,.0f} to {per_s[-1]:,.0f})':>32} {middle / base:>6.2f} {cost_us:>12.1f}")


def measure(servers: Servers, shards: int, connections: int, seconds: float) -> Rate:
    """One round, on queues of its own."""
    url, namespace = servers.urls["MQSERVE_BROKER_URL"], f"bench-{secrets.token_hex(4)}"
    asyncio.run(_declare(url, namespace, shards))
    spawn = multiprocessing.get_context("spawn")
    count = spawn.Value("Q", 0, lock=False)
    members = [spawn.Process(target=work, args=(url, namespace, shards, connections, count), daemon=True) for work in (_consume, _publish)]
    for member in members:
        member.start()
    try:
        while not count.value:
            time.sleep(0.01)
        time.sleep(WARM_UP_S)
        before, cpu_before, began = count.value, _broker_cpu_s(servers), time.monotonic()
        time.sleep(seconds)
        messages, cpu_s, took_s = count.value - before, _broker_cpu_s(servers) - cpu_before, time.monotonic() - began
    finally:
        for member in members:
            member.kill()
            member.join()
        asyncio.run(_delete(url, namespace, shards))
    return Rate(messages / took_s, cpu_s / messages * 1e6)


def _broker_cpu_s(servers: Servers) -> float:
    """0 if the broker is not ours."""
    return servers.cpu_s().get("rabbitmq", 0.0)


async def _declare(url: str, namespace: str, shards: int) -> None:
    async with open_rabbitmq(url, namespace, "controller") as queue:
        await queue.declare(BACKEND, 1, None, shards)


async def _delete(url: str, namespace: str, shards: int) -> None:
    async with open_rabbitmq(url, namespace, "controller") as queue:
        await queue.delete(BACKEND, 1, shards, only_if_empty=False)


# In processes of their own.


def _consume(url: str, namespace: str, shards: int, connections: int, count: Any) -> None:
    ready = selectors.DefaultSelector()
    acks = b"".join(marshal(ACK_ALL, shard + 1) for shard in range(shards))
    for _ in range(connections):
        sock = _connected(url)
        for shard in range(shards):
            queue = backend_queue(namespace, BACKEND, 1, shard)
            _ask(sock, commands.Channel.Open(), shard + 1)
            _ask(sock, commands.Basic.Qos(prefetch_count=max(1, PREFETCH // shards)), shard + 1)
            sock.sendall(marshal(commands.Basic.Consume(queue=queue, nowait=True, consumer_tag="c"), shard + 1))
        ready.register(sock, selectors.EVENT_READ, bytearray())
    while True:
        for key, _ in ready.select():
            seen: bytearray = key.data
            seen += key.fileobj.recv(READ_BYTES)  # type: ignore[union-attr]
            if found := seen.count(MARK):
                count.value += found
                key.fileobj.sendall(acks)  # type: ignore[union-attr]
                del seen[: seen.rindex(MARK) + len(MARK)]


def _publish(url: str, namespace: str, shards: int, connections: int, count: Any) -> None:
    properties = bytes(marshal(header.ContentHeader(properties=commands.Basic.Properties(content_type="text/plain")), 1)[19:-1])
    methods = [
        marshal(commands.Basic.Publish(exchange=requests_exchange(namespace), routing_key=routing_key(BACKEND, shard), mandatory=True), 1)
        for shard in range(shards)
    ]
    group = b"".join(pack_publish(methods[number % shards], 1, properties, BODY, 2**17) for number in range(GROUP))
    socks = [_connected(url) for _ in range(connections)]
    for sock in socks:
        _ask(sock, commands.Channel.Open(), 1)
        _ask(sock, commands.Confirm.Select(), 1)
    sent = 0
    while True:
        for sock in socks:
            while sent - count.value > WINDOW:
                time.sleep(0.0002)
            sock.sendall(group)
            sent += GROUP
            with suppress(BlockingIOError):
                sock.recv(READ_BYTES, socket.MSG_DONTWAIT)  # the confirms


def _connected(url: str) -> socket.socket:
    """A connection that is open and has no heartbeats."""
    parts = urlparse(url)
    sock = socket.create_connection((parts.hostname or "localhost", parts.port or 5672))
    sock.sendall(b"AMQP\x00\x00\x09\x01")
    _receive(sock)
    login = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
    _ask(sock, commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
    sock.sendall(marshal(commands.Connection.TuneOk(2047, 2**17, 0), 0))
    _ask(sock, commands.Connection.Open(unquote(parts.path[1:]) or "/"), 0)
    return sock


def _ask(sock: socket.socket, method: Any, channel: int) -> None:
    sock.sendall(marshal(method, channel))
    _receive(sock)


def _receive(sock: socket.socket) -> None:
    """Reads the only frame that is under way."""
    data = b""
    while not data or not unmarshal(data)[0]:
        data += sock.recv(READ_BYTES)


if __name__ == "__main__":
    main()
