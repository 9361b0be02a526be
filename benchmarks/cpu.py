"""CPU time of processes, from /proc."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import psutil

KindOf = Callable[[Sequence[str]], str]
"""The kind of process that has this command line, e.g. `proxy`."""


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU seconds of a process; 0 if it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def seconds_by_kind(processes: Iterable[psutil.Process], kind_of: KindOf) -> dict[str, float]:
    """The CPU seconds that these processes have used so far, by kind."""
    seconds: dict[str, float] = {}
    for process in processes:
        try:
            kind = kind_of(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        seconds[kind] = seconds.get(kind, 0.0) + cpu_seconds(process)
    return seconds


def spent_us(before: Mapping[str, float], after: Mapping[str, float], requests: int) -> dict[str, float]:
    """CPU microseconds per request, by kind of process."""
    return {kind: max(0.0, seconds - before.get(kind, 0.0)) / max(1, requests) * 1e6 for kind, seconds in after.items()}
