"""Tells what an instance costs while nobody sends a request: CPU, wake-ups and memory of each kind of process, commands of Redis.

    python -m benchmarks.idle [--base main] [--seconds 20] [--syscalls]

Runs the eight backends of `programs/idle.py` in the distributed form on private servers, waits until they are ready and have settled, and
then reads /proc at the beginning and at the end of the window. With `--base` the instance of that revision runs at the same time, on
servers of its own, so that both meet the same machine. With `--syscalls` it counts system calls afterwards by strace, which slows what it
counts.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.servers import PrivateRabbitMQ, PrivateRedis

from .compare import checked_out
from .programs.idle import BACKENDS
from .subjects import PROGRAMS, ROOT, Servers, kind_of_mqserve, running_mqserve

SETTLE_S = 8.0
STRACED_S = 5
_PAGES = ("Pss", "Private_Dirty")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reading:
    """What /proc says of one process at one moment."""

    cpu_s: float
    wake_ups: int
    pss_kib: int
    private_kib: int
    threads: int


@dataclass(frozen=True)
class Instance:
    """An instance of one checkout, with servers of its own."""

    name: str
    process: psutil.Process
    redis: PrivateRedis
    rabbit: PrivateRabbitMQ

    def pids(self) -> dict[int, str]:
        """The kinds of all its processes, and its servers."""
        own = (self.process, *self.process.children(recursive=True))
        kinds = {process.pid: kind_of_mqserve(process.cmdline()) for process in own}
        return kinds | {self.redis.pid: "Redis", self.rabbit.pid: "RabbitMQ"}

    def redis_commands(self) -> Counter[str]:
        stats: Mapping[str, Mapping[str, int]] = self.redis.say("INFO", "commandstats")
        return Counter({name.removeprefix("cmdstat_"): int(said["calls"]) for name, said in stats.items()})

    def amqp_packets(self) -> int:
        """Packets that RabbitMQ has read from its connections; a frame of its own each, while nothing is joined."""
        return sum(map(int, self.rabbit.ctl("-q", "list_connections", "recv_cnt").split()[1:]))


def main() -> None:
    arguments = _parse()
    with ExitStack() as stack:
        checkouts = {"now": ROOT}
        if arguments.base:
            checkouts["base"] = stack.enter_context(checked_out(arguments.base))
        instances = [stack.enter_context(running(name, checkout)) for name, checkout in checkouts.items()]
        time.sleep(SETTLE_S)
        found = _measured(instances, arguments.seconds)
        for instance in instances:
            _show(instance, found[instance.name], arguments.seconds)
        if arguments.syscalls:
            for instance in instances:
                _show_syscalls(instance)


def _measured(instances: list[Instance], seconds: float) -> dict[str, dict[str, list[tuple[Reading, Reading]]]]:
    """The readings at both ends of the window, by instance and by kind of process. Prints what the servers were asked meanwhile."""
    kinds = {instance.name: instance.pids() for instance in instances}
    packets = {instance.name: (time.monotonic(), instance.amqp_packets()) for instance in instances}  # asking takes a while itself
    time.sleep(2.0)  # what was asked costs the servers something
    commands = {instance.name: instance.redis_commands() for instance in instances}
    began = time.monotonic()
    before = {name: {pid: _read(pid) for pid in pids} for name, pids in kinds.items()}
    time.sleep(seconds)
    after = {name: {pid: _read(pid) for pid in pids} for name, pids in kinds.items()}
    took_s = time.monotonic() - began
    for instance in instances:
        asked = instance.redis_commands() - commands[instance.name]
        most = ", ".join(f"{name} {count / took_s:.1f}" for name, count in asked.most_common(12))
        print(f"{instance.name}: Redis commands per second: {most}")
    for instance in instances:
        (asked_at, had_read), now = packets[instance.name], time.monotonic()
        rate = (instance.amqp_packets() - had_read) / (now - asked_at)
        print(f"{instance.name}: packets that RabbitMQ reads per second: {rate:.1f}")
    found: dict[str, dict[str, list[tuple[Reading, Reading]]]] = defaultdict(lambda: defaultdict(list))
    for name, pids in kinds.items():
        for pid, kind in pids.items():
            found[name][kind].append((before[name][pid], after[name][pid]))
    return found


def _show(instance: Instance, found: dict[str, list[tuple[Reading, Reading]]], seconds: float) -> None:
    print(f"\n{instance.name:<12} {'count':>5} {'CPU ms/s':>9} {'wake-ups/s':>11} {'threads':>8} {'PSS MiB':>8} {'private MiB':>12}   each")
    for kind, pairs in sorted(found.items()):
        count = len(pairs)
        cpu_ms = sum(after.cpu_s - before.cpu_s for before, after in pairs) * 1000 / seconds / count
        wake_ups = sum(after.wake_ups - before.wake_ups for before, after in pairs) / seconds / count
        threads = sum(after.threads for _, after in pairs) / count
        pss, private = (sum(getattr(after, name) for _, after in pairs) / count / 1024 for name in ("pss_kib", "private_kib"))
        print(f"{kind:<12} {count:>5} {cpu_ms:>9.2f} {wake_ups:>11.1f} {threads:>8.0f} {pss:>8.1f} {private:>12.1f}")


def _show_syscalls(instance: Instance) -> None:
    one_of_each = {kind: pid for pid, kind in instance.pids().items()}
    for kind, pid in sorted(one_of_each.items()):
        traced = subprocess.run(
            ["timeout", "-s", "INT", str(STRACED_S), "strace", "-f", "-c", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        calls = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", traced.stderr, re.MULTILINE)
        said = ", ".join(f"{name} {int(count) / STRACED_S:.1f}" for count, name in calls if name != "total")
        print(f"{instance.name}, {kind}: system calls per second: {said}")


@contextmanager
def running(name: str, checkout: Path) -> Iterator[Instance]:
    """An instance with all of its backends ready."""
    ready = [f"idle{BACKENDS - 1}"]
    with PrivateRabbitMQ() as rabbit, PrivateRedis() as redis:
        servers = Servers(urls={"MQSERVE_BROKER_URL": rabbit.url, "MQSERVE_STORE_URL": redis.url}, pids={})
        with running_mqserve("distributed", servers, checkout, PROGRAMS / "idle.py", ready, name=name) as subject:
            yield Instance(name, subject.process, redis, rabbit)


def _read(pid: int) -> Reading:
    folder = Path(f"/proc/{pid}")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    statuses = [(task / "status").read_text() for task in (folder / "task").iterdir()]
    wake_ups = sum(int(found) for status in statuses for found in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE))
    pages = dict(re.findall(r"^(\w+):\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE))
    # the scheduler's own count, since utime and stime come in steps of 10 ms
    ran_ns = sum(int((task / "schedstat").read_text().split()[0]) for task in (folder / "task").iterdir())
    pss, private = (int(pages[name]) for name in _PAGES)
    return Reading(ran_ns / 1e9 if ran_ns else sum(map(int, fields[11:13])) / _TICKS, wake_ups, pss, private, len(statuses))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", help="a revision to measure beside this checkout")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--syscalls", action="store_true", help="count system calls, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
