"""Requests per second and latency of a no-op endpoint: bare Starlette, embedded and distributed, in turn in one run.

    make bench                      (or: python benchmarks/run.py --seconds 5 --clients 1 16 64)

The load comes from wrk (Debian: apt-get install wrk). RabbitMQ and Redis are private ones, unless MQSERVE_BROKER_URL and
MQSERVE_STORE_URL name others. Everything shares this machine's cores, so quote the ratios, not the figures.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.servers import PrivateRabbitMQ, PrivateRedis, free_port  # noqa: E402

START_BUDGET_S = 60.0


@dataclass(frozen=True)
class Sample:
    """One load run; latencies in milliseconds."""

    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


def main() -> None:
    arguments = _parse()
    if shutil.which("wrk") is None:
        sys.exit("the load comes from wrk, and it is not installed: apt-get install wrk (or brew install wrk)")
    samples: dict[tuple[str, int], list[Sample]] = {}
    with ExitStack() as stack:
        urls = {form: stack.enter_context(server(form, stack, arguments.handler)) for form in arguments.forms}
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
    parser.add_argument(
        "--forms", nargs="+", choices=["starlette", "embedded", "distributed"], default=["starlette", "embedded", "distributed"]
    )
    parser.add_argument("--handler", choices=["noop", "async_noop"], default="noop", help="a plain or an async handler")
    return parser.parse_args()


@contextmanager
def server(form: str, stack: ExitStack, handler: str) -> Iterator[str]:
    """A running server of the form; its URL."""
    port = free_port()
    env = {key: value for key, value in os.environ.items() if not key.startswith("MQSERVE_")}
    command = [sys.executable, "-m", "mqserve", "run", str(HERE / "noop.py"), "--port", str(port)]
    if form == "starlette":
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "bare:app", "--port", str(port), "--no-access-log"]
    if form == "distributed":
        env |= {"MQSERVE_SECRET_KEY": secrets.token_hex(32), "MQSERVE_NAMESPACE": f"bench-{secrets.token_hex(4)}"}
        for name, private in (("MQSERVE_BROKER_URL", PrivateRabbitMQ), ("MQSERVE_STORE_URL", PrivateRedis)):
            env[name] = os.environ.get(name) or stack.enter_context(private()).url
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/{handler}"
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_BUDGET_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server for {url} ended with {process.returncode}: see above")
        try:
            urlopen(url, timeout=1).close()
            return
        except (URLError, OSError):
            time.sleep(0.05)
    sys.exit(f"{url} did not answer within {START_BUDGET_S:g} s")


def load(url: str, clients: int, seconds: float) -> Sample:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "30s", url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    found = re.search(r"Requests/sec:\s+([\d.]+)", told)
    assert found is not None, told
    return Sample(float(found[1]), _latency(told, "50%"), _latency(told, "99%"), int(failed[1]) if failed else 0)


def _latency(told: str, percentile: str) -> float:
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", told)
    assert found is not None, told
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def report(samples: dict[tuple[str, int], list[Sample]], arguments: argparse.Namespace) -> str:
    """A table: the median of the rounds, and the ratio to bare Starlette round by round."""
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
