"""What must be gone when the load is over, and what may stand: queues, keys, connections, processes, lines in the logs."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple

import psutil

from mqserve.broker import queue_names
from mqserve.broker.jobs import JOB_RESULT_TTL_S, WAIT_TTL_S
from mqserve.broker.later import WAITS_S
from mqserve.broker.store_keys import INBOX_TTL_S, LOG_TTL_S, LOST_TTL_S, RESULT_TTL_S, STREAM_TTL_S
from tests.faults.soak.backends import BACKENDS, REPLICAS
from tests.faults.soak.cluster import Cluster

QUIET_S = 45.0
STORE_CONNECTIONS = 16 + 4 + 4  # of one process at most: its pool, its wires, its readers, its subscription, and one being replaced
DAY_S = 24 * 3600

# What follows `mqserve:<ns>:` -> how long it lives at most; None: no expiry. From broker/store_keys.py.
KEYS: Mapping[str, float | None] = {
    r"future:\{.+\}": RESULT_TTL_S,
    r"start:\{.+\}": DAY_S,
    r"(attempts|redeliveries|claim):\{.+\}": DAY_S,
    r"(inbox|feed):.+": INBOX_TTL_S,
    r"(stream|owner):\{.+\}": STREAM_TTL_S,
    r"lost:.+": LOST_TTL_S,
    r"cancelled": LOG_TTL_S,
    r"code:[0-9a-f]{64}": None,
    r"desired|observed|instance|leader|beats|firings|ends|jobs": None,
    r"job:\{.+\}": 2 * JOB_RESULT_TTL_S,  # all jobs have ended
    r"(message|events):\{.+\}": JOB_RESULT_TTL_S,
    r"(waiters|followers):\{.+\}": WAIT_TTL_S,
}

SUSPICIOUS = ("never retrieved", "Task was destroyed", "never awaited", "Unclosed", "bug in mqserve", "ResourceWarning", "Segmentation")
# The last line of a traceback that may stand in a log, and why.
ALLOWED_TRACEBACKS = (re.compile(r"(\w+\.)*(Refused|NotYet): "),)  # the backends that raise, as their author wants to see it


class Connections(NamedTuple):
    """By process, of those that are there now."""

    broker: dict[int, int]
    store: dict[int, int]


async def until_quiet(check: Callable[[], Coroutine[Any, Any, list[str]]]) -> list[str]:
    """What `check` still finds after a while; empty as soon as it finds nothing."""
    until = time.monotonic() + QUIET_S
    while found := await check():
        if time.monotonic() > until:
            return found
        await asyncio.sleep(1)
    return []


async def queues(cluster: Cluster) -> list[str]:
    """No message waits or is held, and each queue belongs to a backend, or is one in which jobs wait for their time."""
    listed = await asyncio.to_thread(
        cluster.broker.ctl, "list_queues", "--no-table-headers", "name", "messages_ready", "messages_unacknowledged"
    )
    rows = [line.split("\t") for line in listed.splitlines()]
    waits = {queue_names.later_queue(cluster.namespace, wait_s) for wait_s in WAITS_S}  # made when they are needed
    ours = [(name, int(ready), int(held)) for name, ready, held in rows if queue_names.is_ours(cluster.namespace, name)]
    expected = {queue_names.backend_queue(cluster.namespace, name, 1) for name in BACKENDS}
    expected |= {queue_names.jobs_queue(cluster.namespace, name, 1) for name in BACKENDS} | {queue_names.due_queue(cluster.namespace)}
    expected |= {queue_names.dead_queue(cluster.namespace, name) for name in (*BACKENDS, queue_names.ENDPOINTS)}
    found = [f"queue {name} has {ready} messages ready and {held} unacknowledged" for name, ready, held in ours if ready or held]
    return found + [
        f"queues are not as the backends are: {name}" for name in expected.symmetric_difference({name for name, _, _ in ours} - waits)
    ]


async def keys(cluster: Cluster) -> list[str]:
    """Only documented ones, each with its expiry, and none of a lease or a place in a queue: no job waits or runs any more."""
    root = f"mqserve:{cluster.namespace}:"
    jobs = set(await cluster.job_ids())
    found = []
    async for raw in cluster.redis.scan_iter(match="*", count=500):
        key = raw.decode()
        if not key.startswith(root):
            found.append(f"key {key} is none of the namespace's")
            continue
        limit_s = next((limit_s for pattern, limit_s in KEYS.items() if re.fullmatch(pattern, key.removeprefix(root))), 0)
        if key.startswith(f"{root}future:") and key[len(root) + len("future:{") : -1] in jobs:
            limit_s = JOB_RESULT_TTL_S
        if limit_s == 0:
            found.append(f"key {key} is of no documented kind")
        elif limit_s is not None and not -1 < await cluster.redis.ttl(key) <= limit_s and await cluster.redis.exists(key):
            found.append(f"key {key} expires in {await cluster.redis.ttl(key)} s, not within {limit_s:g} s")
    return found


def connections(cluster: Cluster) -> Connections:
    """Those of the instance's processes: each pid's number of them, by server."""
    pids = cluster.processes()
    counts: dict[int, Counter[int]] = {cluster.broker.port: Counter(dict.fromkeys(pids, 0)), cluster.store.port: Counter()}
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_ESTABLISHED and found.pid in pids and found.raddr and found.raddr.port in counts:
            counts[found.raddr.port][found.pid] += 1
    return Connections(dict(counts[cluster.broker.port]), dict(counts[cluster.store.port]))


async def processes(cluster: Cluster) -> list[str]:
    roles = Counter(cluster.processes().values())
    expected = Counter(controller=2, node=2, proxy=2, replica=REPLICAS)
    return [] if roles == expected else [f"processes are {dict(roles)}, not {dict(expected)}"]


async def connected(cluster: Cluster, baseline: Mapping[str, set[int]]) -> list[str]:
    """Each process has as many connections to the broker as one of its role had at first, and the servers see no others."""
    roles, (broker, store) = cluster.processes(), connections(cluster)
    found = [
        f"a {roles.get(pid)} (process {pid}) has {count} connections to RabbitMQ, not {sorted(baseline[roles[pid]])}"
        for pid, count in broker.items()
        if pid in roles and count not in baseline[roles[pid]]
    ]
    found += [
        f"a {roles.get(pid)} (process {pid}) has {count} connections to Redis" for pid, count in store.items() if count > STORE_CONNECTIONS
    ]
    listed = await asyncio.to_thread(cluster.broker.ctl, "list_connections", "--no-table-headers", "peer_port")
    peers = {int(port) for port in listed.split()}
    alive = {
        ours.laddr.port for ours in psutil.net_connections("tcp") if ours.laddr and ours.raddr and ours.raddr.port == cluster.broker.port
    }
    return found + [f"RabbitMQ has a connection of nobody, from port {port}" for port in peers - alive]


def broker_baseline(cluster: Cluster) -> dict[str, set[int]]:
    """How many connections to the broker a process has, by its role."""
    roles = cluster.processes()
    baseline: dict[str, set[int]] = {role: set() for role in roles.values()}
    for pid, count in connections(cluster).broker.items():
        if pid in roles:
            baseline[roles[pid]].add(count)
    return baseline


def in_logs(logs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines that say that somebody made a mistake: ours, since the handlers' own are known."""
    found = []
    for name, text in logs:
        found += [f"{name}: {line}" for line in text.splitlines() if any(word in line for word in SUSPICIOUS)]
        found += [
            f"{name}: {trace}"
            for trace in tracebacks(text)
            if not any(last.match(trace.splitlines()[-1].strip()) for last in ALLOWED_TRACEBACKS)
        ]
    return found


def tracebacks(text: str) -> list[str]:
    """Each from its first line to the line of its exception, which is indented as much as the first one."""
    found = re.finditer(r"^([ |+]*)(?:\S.*)?Traceback \(most recent call last\):\n(?:\1[ \t|+].*\n|\n)*\1.*", text, re.MULTILINE)
    return [match.group(0) for match in found]
