"""Tells what declaring costs: how long many endpoints on many backends take until all are ready, and what one more endpoint costs then.

    python -m benchmarks.declare [--endpoints 10 1000] [--backends 64] [--forms embedded distributed] [--alone]

Each number of endpoints is one program with one `deploying()` block (with `--alone` the calls are made one by one). CPU is that of all
processes of the instance, from /proc, per change; RabbitMQ and Redis are private ones and have columns of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil

import mqserve as serve

from .cpu import seconds_by_kind, spent_us
from .subjects import FORMS, ROOT, Servers, kind_of_mqserve, open_servers

CHANGES = 20


def noop(request: object) -> str:
    return ""


def main() -> None:
    arguments = _parse()
    with ExitStack() as stack:
        servers = open_servers(stack) if "distributed" in arguments.forms else None
        print(f"{'form':<12} {'endpoints':>9} {'backends':>8} {'ready s':>8} {'one more ms':>12}  CPU ms for one more")
        for form in arguments.forms:
            for endpoints in arguments.endpoints:
                print(_line(form, endpoints, arguments, servers if form == "distributed" else None), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--backends", type=int, default=64)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--alone", action="store_true", help="without a block: one commit for each call")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _line(form: str, endpoints: int, arguments: argparse.Namespace, servers: Servers | None) -> str:
    """Runs one program and returns its line of the table."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MQSERVE_")}
    if servers is not None:
        env |= servers.urls
        env |= {"MQSERVE_SECRET_KEY": secrets.token_hex(16), "MQSERVE_NAMESPACE": f"declare-{secrets.token_hex(4)}"}
    command = [sys.executable, "-m", "benchmarks.declare", "--child", "--endpoints", str(endpoints), "--backends", str(arguments.backends)]
    command += ["--alone"] if arguments.alone else []
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None and program.stdout is not None
        ready_s = float(program.stdout.readline())
        before = _cpu_s(program.pid, servers)
        print("go on", file=program.stdin, flush=True)
        each_ms = json.loads(program.stdout.readline())
        spent = spent_us(before, _cpu_s(program.pid, servers), CHANGES)
        print("end", file=program.stdin, flush=True)
        program.wait(120)
    told = ", ".join(f"{kind} {us / 1000:.1f}" for kind, us in sorted(spent.items()))
    return f"{form:<12} {endpoints:>9} {arguments.backends:>8} {ready_s:>8.2f} {statistics.median(each_ms):>12.1f}  {told}"


def _cpu_s(pid: int, servers: Servers | None) -> dict[str, float]:
    process = psutil.Process(pid)
    return seconds_by_kind([process, *process.children(recursive=True)], kind_of_mqserve) | (servers.cpu_s() if servers else {})


def _declare(endpoints: int, backends: int) -> None:
    for number in range(backends):
        serve.create_backend(f"b{number}", noop)
    for number in range(endpoints):
        serve.create_endpoint(f"e{number}", backend=f"b{number % backends}", route=f"/e{number}/{{word}}")


def _child(arguments: argparse.Namespace) -> None:
    """The measured program: declares, waits for a line, and creates endpoints one by one."""
    client = serve.start(http_options={"port": 0})
    began = time.monotonic()
    with contextlib.nullcontext() if arguments.alone else client.deploying():
        _declare(arguments.endpoints[0], arguments.backends)
    print(time.monotonic() - began, flush=True)
    sys.stdin.readline()
    each_ms: list[float] = []
    for number in range(CHANGES):
        began = time.monotonic()
        client.create_endpoint(f"more{number}", backend="b0", route=f"/more{number}")
        each_ms.append((time.monotonic() - began) * 1000)
    print(json.dumps(each_ms), flush=True)
    sys.stdin.readline()
    client.shutdown()


if __name__ == "__main__":
    _child(_parse()) if "--child" in sys.argv else main()
