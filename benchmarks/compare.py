"""Tells whether a request costs more than before: CPU per request of this checkout and of another revision, in alternated pairs.

    make compare BASE=main~3        (or: python -m benchmarks.compare main~3 --forms embedded --clients 64)

Both run at the same time, so that both meet the same machine, and take turns under load: A B, B A, A B, … Each pair gives one ratio of
CPU microseconds per request (from /proc: all processes of the instance, and beside them RabbitMQ and Redis). A line fails if even the
lower bound of the ratio's 95 % interval is above the limit: then the request costs more, and noise does not explain it. The exit code is
the number of failed lines.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student

from .cpu import spent_us
from .load import check_wrk, load
from .subjects import FORMS, HANDLERS, ROOT, Servers, Subject, open_servers, running_mqserve

WARM_UP_S = 2.0


@dataclass(frozen=True)
class Cost:
    """CPU microseconds of one request, in the instance's processes and in RabbitMQ and Redis."""

    instance_us: float
    servers_us: float


@dataclass(frozen=True)
class Interval:
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float


def main() -> None:
    arguments = _parse()
    check_wrk()
    failed = 0
    print(f"{'form':<12} {'handler':<11} {'clients':>7} {'base µs':>8} {'now µs':>8} {'ratio':>7} {'95 %':>15}  {'servers':>16}")
    with ExitStack() as stack:
        base = stack.enter_context(checked_out(arguments.base))
        for form in arguments.forms:
            with ExitStack() as subjects:
                servers = open_servers(subjects) if form == "distributed" else None
                pair = [subjects.enter_context(running_mqserve(form, servers, checkout)) for checkout in (base, ROOT)]
                for handler in arguments.handlers:
                    for clients in arguments.clients:
                        for subject in pair:
                            measure(subject, handler, clients, WARM_UP_S)
                        costs = measure_pairs(pair, handler, clients, arguments)
                        interval = interval_of([now.instance_us / before.instance_us for before, now in costs])
                        failed += interval.low > 1 + arguments.limit
                        print(_line(form, handler, clients, costs, interval, servers), flush=True)
    sys.exit(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a revision of git, or the folder of another checkout")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load run")
    parser.add_argument("--clients", type=int, nargs="+", default=[64])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--handlers", nargs="+", choices=HANDLERS, default=HANDLERS)
    parser.add_argument("--limit", type=float, default=0.03, help="how much dearer a request may be: 0.03 is 3 %%")
    return parser.parse_args()


@contextmanager
def checked_out(base: str) -> Iterator[Path]:
    """Yields the folder of the other checkout; a revision gets a worktree of its own."""
    if Path(base).is_dir():
        yield Path(base).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="mqserve-base-") as folder:
        worktree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(worktree), base], cwd=ROOT, check=True)
        try:
            yield worktree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(worktree)], cwd=ROOT, check=True)


def measure_pairs(pair: Sequence[Subject], handler: str, clients: int, arguments: argparse.Namespace) -> list[tuple[Cost, Cost]]:
    """Returns (base, now) for each pair; every second pair begins with now."""
    costs: list[tuple[Cost, Cost]] = []
    for number in range(arguments.pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        print(f"{handler}, {clients} clients: pair {number + 1} of {arguments.pairs} …", end="\r", file=sys.stderr, flush=True)
        measured: dict[int, Cost] = {}
        for place in order:
            measured[place] = measure(pair[place], handler, clients, arguments.seconds)
        costs.append((measured[0], measured[1]))
    return costs


def measure(subject: Subject, handler: str, clients: int, seconds: float) -> Cost:
    """Measures one load run. Exits if a request was not answered with 200, since its cost would mean nothing."""
    before = subject.cpu_s()
    report = load(f"{subject.url}/{handler}", clients, seconds)
    spent = spent_us(before, subject.cpu_s(), report.requests)
    if report.failed:
        sys.exit(f"{report.failed} of {report.requests} requests to {subject.url}/{handler} were not answered with 200")
    servers_us = sum(spent.pop(kind, 0.0) for kind in ("rabbitmq", "redis"))
    return Cost(sum(spent.values()), servers_us)


def interval_of(ratios: Sequence[float]) -> Interval:
    """The 95 % interval of the ratios' mean, by Student's t. The mean is taken of logarithms, since a ratio of 2 is as far from 1 as one
    of 0.5."""
    logarithms = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logarithms)
    margin = 0.0
    if len(logarithms) > 1:
        margin = float(student.ppf(0.975, len(logarithms) - 1)) * statistics.stdev(logarithms) / math.sqrt(len(logarithms))
    return Interval(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))


def _line(form: str, handler: str, clients: int, costs: Sequence[tuple[Cost, Cost]], interval: Interval, servers: Servers | None) -> str:
    before, now = (statistics.median(pair[place].instance_us for pair in costs) for place in (0, 1))
    told = ""
    if servers is not None and servers.pids:
        told = " → ".join(f"{statistics.median(pair[place].servers_us for pair in costs):.0f}" for place in (0, 1))
    bounds = f"{interval.low:.3f} to {interval.high:.3f}"
    return f"{form:<12} {handler:<11} {clients:>7} {before:>8.1f} {now:>8.1f} {interval.ratio:>7.3f} {bounds:>15}  {told:>16}"


if __name__ == "__main__":
    main()
