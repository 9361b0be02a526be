"""What RabbitMQ carries in one queue of a backend, and in several: messages per second, and CPU microseconds of each, without replicas.

    python -m benchmarks.queue_shards --shards 1 4

A publisher and a consumer, each a process of its own with mqserve's own wire, keep a window of messages on the way: confirmed, delivered,
acked. The numbers of shards take turns: 1 4, 4 1, 1 4, … RabbitMQ is a private one unless MQSERVE_BROKER_URL names another.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized

from mqserve.broker.envelope import Envelope, mint_id
from mqserve.broker.errors import MQServeError
from mqserve.broker.queue import Delivery
from mqserve.broker.rabbitmq.queue import open_rabbitmq

from .subjects import Servers, open_servers

BODY = b"x" * 100
WINDOW = 1000
PREFETCH = 256
WARM_UP_S = 1.0
BACKEND = "b"


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
    parser.add_argument("--pairs", type=int, default=1, help="publishers, and as many consumers")
    arguments = parser.parse_args()
    rates: dict[int, list[Rate]] = {shards: [] for shards in arguments.shards}
    with ExitStack() as stack:
        servers = open_servers(stack)
        for turn in range(arguments.rounds):
            for shards in arguments.shards if turn % 2 else reversed(arguments.shards):
                rates[shards].append(measure(servers, shards, arguments.pairs, arguments.seconds))
    base = statistics.median(rate.per_s for rate in rates[arguments.shards[0]])
    print(f"{'shards':>6} {'messages/s':>11} {'ratio':>6} {'RabbitMQ µs':>12}")
    for shards, seen in rates.items():
        print(f"{shards:>6} {_spread([rate.per_s for rate in seen]):>11} {statistics.median(rate.per_s for rate in seen) / base:>6.2f} "
              f"{_spread([rate.broker_us for rate in seen]):>12}")  # fmt: skip


def measure(servers: Servers, shards: int, pairs: int, seconds: float) -> Rate:
    """One round, on queues of its own."""
    url, namespace = servers.urls["MQSERVE_BROKER_URL"], f"bench-{secrets.token_hex(4)}"
    asyncio.run(_declare(url, namespace, shards))
    spawn = multiprocessing.get_context("spawn")
    counts = [spawn.Value("Q", 0) for _ in range(pairs)]
    members = [spawn.Process(target=_consume, args=(url, namespace, shards, count), daemon=True) for count in counts]
    members += [spawn.Process(target=_publish, args=(url, namespace, shards), daemon=True) for _ in counts]
    for member in members:
        member.start()
    try:
        while not all(count.value for count in counts):
            time.sleep(0.01)
        time.sleep(WARM_UP_S)
        before, began = _state(servers, counts), time.monotonic()
        time.sleep(seconds)
        after, took_s = _state(servers, counts), time.monotonic() - began
    finally:
        for member in members:
            member.kill()
            member.join()
        asyncio.run(_delete(url, namespace, shards))
    messages = after[0] - before[0]
    return Rate(messages / took_s, (after[1] - before[1]) / messages * 1e6)


def _state(servers: Servers, counts: Sequence[Synchronized[int]]) -> tuple[int, float]:
    return sum(count.value for count in counts), servers.cpu_s().get("rabbitmq", 0.0)


async def _declare(url: str, namespace: str, shards: int) -> None:
    async with open_rabbitmq(url, namespace, "controller") as queue:
        await queue.declare(BACKEND, 1, None, shards)


async def _delete(url: str, namespace: str, shards: int) -> None:
    async with open_rabbitmq(url, namespace, "controller") as queue:
        await queue.delete(BACKEND, 1, shards, only_if_empty=False)


def _consume(url: str, namespace: str, shards: int, count: Synchronized[int]) -> None:
    def take(delivery: Delivery) -> None:
        count.value += 1
        delivery.ack()

    async def run() -> None:
        async with open_rabbitmq(url, namespace, "consumer") as queue:
            await queue.consume(BACKEND, 1, PREFETCH, take, shards)
            await asyncio.Event().wait()

    asyncio.run(run())


def _publish(url: str, namespace: str, shards: int) -> None:
    async def run() -> None:
        async with open_rabbitmq(url, namespace, "publisher") as queue:
            sent = 0

            def send(error: MQServeError | None = None) -> None:
                nonlocal sent
                sent += 1
                queue.publish(BACKEND, Envelope(mint_id(), BODY, "text/plain"), send, sent % shards)

            for _ in range(WINDOW):
                send()
            await asyncio.Event().wait()

    asyncio.run(run())


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f}"


if __name__ == "__main__":
    main()
