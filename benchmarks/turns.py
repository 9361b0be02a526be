"""What the processes of an instance do for one request at one client, where nothing is batched: loop turns, wake-ups and system calls.

    python -m benchmarks.turns      (or: --forms distributed --handler noop --clients 16)

A turn is one poll of an event loop, counted as its system call. A wake-up is a voluntary context switch: a thread had nothing to do, and
slept until something came. CPU and wake-ups are from /proc, at full speed; turns and system calls are counted in a run of their own under
strace (Debian: apt-get install strace), which makes requests slower, and left out without it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from .cpu import cpu_seconds
from .load import check_wrk, load
from .subjects import FORMS, HANDLERS, open_servers, running_mqserve

LEAST_SHOWN = 0.05  # a process with fewer system calls a request has no part in requests
_POLLS = frozenset(("epoll_wait", "epoll_pwait", "epoll_pwait2"))
_ATTACH_S = 0.5
_ROW = re.compile(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)(?:\s+\d+)?\s+(\w+)")  # of strace: % time, seconds, µs per call, calls, errors, name


@dataclass(frozen=True)
class Counts:
    """Of one process since its start."""

    cpu_s: float
    wake_ups: int

    @classmethod
    def of(cls, process: psutil.Process) -> Counts:
        texts = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
        wake_ups = sum(int(text.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)
        return cls(cpu_seconds(process), wake_ups)


def main() -> None:
    arguments = _parse()
    check_wrk()
    print(f"{'form':<12} {'process':<22} {'CPU µs':>7} {'wake-ups':>9} {'turns':>7} {'calls':>7}  system calls")
    with ExitStack() as stack:
        servers = open_servers(stack) if "distributed" in arguments.forms else None
        for form in arguments.forms:
            with running_mqserve(form, servers) as subject:
                url = f"{subject.url}/{arguments.handler}"
                load(url, arguments.clients, 1.0)  # warm-up
                processes = subject.tree()
                costs = _at_full_speed(url, processes, arguments)
                calls = _under_strace(url, processes, arguments) if shutil.which("strace") else {}
                for process in processes:
                    _show(form, process, costs[process], calls.get(process), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load run")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--handler", choices=HANDLERS, default="async_noop")
    return parser.parse_args()


def _at_full_speed(
    url: str, processes: Sequence[psutil.Process], arguments: argparse.Namespace
) -> dict[psutil.Process, tuple[float, float]]:
    """Returns CPU microseconds and wake-ups of one request."""
    before = {process: Counts.of(process) for process in processes}
    requests = load(url, arguments.clients, arguments.seconds).requests
    costs: dict[psutil.Process, tuple[float, float]] = {}
    for process in processes:
        now, then = Counts.of(process), before[process]
        costs[process] = (now.cpu_s - then.cpu_s) / requests * 1e6, (now.wake_ups - then.wake_ups) / requests
    return costs


def _under_strace(url: str, processes: Sequence[psutil.Process], arguments: argparse.Namespace) -> dict[psutil.Process, dict[str, float]]:
    """Returns how often each system call is made for one request."""
    with tempfile.TemporaryDirectory(prefix="mqserve-turns-") as folder:
        with ExitStack() as stack:
            files = {process: stack.enter_context(_counted(process, Path(folder))) for process in processes}
            time.sleep(_ATTACH_S)
            requests = load(url, arguments.clients, arguments.seconds).requests
        return {
            process: {name: int(count) / requests for count, name in _ROW.findall(file.read_text()) if name != "total"}
            for process, file in files.items()
        }


@contextmanager
def _counted(process: psutil.Process, folder: Path) -> Iterator[Path]:
    """Yields the file in which strace leaves its table of calls on exit."""
    file = folder / str(process.pid)
    tracer = subprocess.Popen(["strace", "-f", "-c", "-o", str(file), "-p", str(process.pid)], stderr=subprocess.DEVNULL)
    try:
        yield file
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)


def _show(
    form: str, process: psutil.Process, costs: tuple[float, float], calls: dict[str, float] | None, arguments: argparse.Namespace
) -> None:
    cpu_us, wake_ups = costs
    if wake_ups < LEAST_SHOWN and sum((calls or {}).values()) < LEAST_SHOWN:
        return
    turns = total = told = "-"
    if calls is not None:
        turns, total = f"{sum(count for name, count in calls.items() if name in _POLLS):.1f}", f"{sum(calls.values()):.1f}"
        often = sorted(((count, name) for name, count in calls.items() if count >= LEAST_SHOWN), reverse=True)
        told = ", ".join(f"{name} {count:.1f}" for count, name in often)
    print(f"{form:<12} {_name(process):<22} {cpu_us:>7.0f} {wake_ups:>9.1f} {turns:>7} {total:>7}  {told}", flush=True)


def _name(process: psutil.Process) -> str:
    """Returns the role, with the backend of a replica."""
    program, role, *rest = process.cmdline()[2:]
    if program != "mqserve":
        return program
    return f"{role} {rest[0]}" if role == "replica" else role


if __name__ == "__main__":
    main()
