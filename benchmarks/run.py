"""Requests per second and latency of a no-op endpoint: bare Starlette, embedded and distributed, in turn in one run.

    make bench                      (or: python benchmarks/run.py --seconds 5 --clients 1 16 64)

RabbitMQ and Redis are private ones, unless MQSERVE_BROKER_URL and MQSERVE_STORE_URL name others. Everything shares this
machine's cores, so quote the ratios, not the figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack

from load import Sample, check_wrk, load
from subjects import FORMS, HANDLERS, open_servers, running


def main() -> None:
    arguments = _parse()
    check_wrk()
    samples: dict[tuple[str, int], list[Sample]] = {}
    with ExitStack() as stack:
        servers = open_servers(stack) if "distributed" in arguments.forms else None
        subjects = {form: stack.enter_context(running(form, servers)) for form in arguments.forms}
        urls = {form: f"{subject.url}/{arguments.handler}" for form, subject in subjects.items()}
        for url in urls.values():
            load(url, 16, 1.0)  # warm-up
        for round_number in range(arguments.rounds):
            for clients in arguments.clients:
                for form, url in urls.items():
                    print(f"round {round_number + 1}: {form}, {clients} clients …", end="\r", file=sys.stderr, flush=True)
                    samples.setdefault((form, clients), []).append(load(url, clients, arguments.seconds))
    print(report(samples, arguments))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load run")
    parser.add_argument("--rounds", type=int, default=3, help="the median of this many is shown")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--handler", choices=HANDLERS, default="noop", help="a plain or an async handler")
    return parser.parse_args()


def report(samples: dict[tuple[str, int], list[Sample]], arguments: argparse.Namespace) -> str:
    """Returns a table: the median of the rounds, and the ratio to bare Starlette round by round."""
    lines = [f"{'form':<12} {'clients':>7} {'req/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'ratio':>7} {'failed':>7}"]
    for clients in arguments.clients:
        for form in arguments.forms:
            rounds = samples[form, clients]
            bare = samples.get(("starlette", clients))
            ratio = statistics.median(mine.per_second / base.per_second for mine, base in zip(rounds, bare, strict=True)) if bare else 1.0
            median = [statistics.median(values) for values in zip(*((s.per_second, s.p50_ms, s.p99_ms) for s in rounds), strict=True)]
            failed = sum(sample.failed for sample in rounds)
            lines.append(f"{form:<12} {clients:>7} {median[0]:>9.0f} {median[1]:>8.2f} {median[2]:>8.2f} {ratio:>7.3f} {failed:>7}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
