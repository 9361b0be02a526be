"""Memory of processes, from /proc."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from .cpu import KindOf
from .subjects import Subject


def mib_by_kind(subject: Subject) -> dict[str, float]:
    """The MiB of a program and its children, by kind of process, as values of a sample: their sum first, and at last RabbitMQ and Redis,
    which are not in it. Redis has the results of ten minutes."""
    found = {f"{kind}_mib": mib for kind, mib in _mib_by_kind(subject.tree(), subject.kind_of).items()}
    servers = subject.servers.pids if subject.servers is not None else {}
    return {
        "total_mib": sum(found.values()),
        **found,
        **{f"{kind}_mib": psutil.Process(pid).memory_full_info().pss / 2**20 for kind, pid in servers.items()},
    }


def _mib_by_kind(processes: Iterable[psutil.Process], kind_of: KindOf) -> dict[str, float]:
    """Proportional set sizes: a page that several processes share counts once."""
    sizes: dict[str, float] = {}
    for process in processes:
        try:
            kind, size = kind_of(process.cmdline()), process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        sizes[kind] = sizes.get(kind, 0.0) + size / 2**20
    return sizes
