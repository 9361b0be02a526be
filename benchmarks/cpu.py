"""CPU time of processes, from /proc."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

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


def tree_cpu_seconds(root: psutil.Process, kind_of: KindOf) -> Counter[str]:
    """The CPU seconds that a program and its children have used so far, by kind of process."""
    seconds: Counter[str] = Counter()
    for process in (root, *root.children(recursive=True)):
        try:
            seconds[kind_of(process.cmdline())] += cpu_seconds(process)  # type: ignore[assignment]  # a Counter of floats
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return seconds


def spent_us(before: Mapping[str, float], after: Mapping[str, float], requests: int) -> dict[str, float]:
    """CPU microseconds per request, by kind of process."""
    return {kind: max(0.0, seconds - before.get(kind, 0.0)) / max(1, requests) * 1e6 for kind, seconds in after.items()}
