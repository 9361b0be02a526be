"""Load by wrk (Debian: apt-get install wrk), and its report of the answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

POST = Path(__file__).parent / "programs" / "post.lua"
SPREAD = Path(__file__).parent / "programs" / "spread.lua"


@dataclass(frozen=True)
class LoadReport:
    """One load run; latencies in milliseconds. `cpu_s` is what wrk itself used."""

    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_s: float


def check_wrk() -> None:
    """Exits with a sentence if wrk is missing."""
    if shutil.which("wrk") is None:
        sys.exit("the load comes from wrk, and it is not installed: apt-get install wrk (or brew install wrk)")


def load(url: str, clients: int, seconds: float, body: str = "", paths: int = 0) -> LoadReport:
    """Sends as many requests as `clients` connections can send one after the other.

    With a `body` of post.lua these are POSTs; with `paths` they go to /r0, /r1 and so on in turn.
    """
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "30s"]
    script = ["-s", str(POST), url, "--", body] if body else ["-s", str(SPREAD), url, "--", str(paths)]
    command += script if body or paths else [url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, told
    failed = sum(int(count) for count in re.findall(r"Non-2xx or 3xx responses: (\d+)", told))
    failed += sum(int(count) for line in re.findall(r"Socket errors: (.+)", told) for count in re.findall(r"\d+", line))
    per_second, requests = re.search(r"Requests/sec:\s+([\d.]+)", told), re.search(r"(\d+) requests in", told)
    assert per_second is not None and requests is not None, told
    latencies = _latency(told, "50%"), _latency(told, "99%")
    return LoadReport(int(requests[1]), float(per_second[1]), *latencies, failed, usage.ru_utime + usage.ru_stime)


def _latency(told: str, percentile: str) -> float:
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", told)
    assert found is not None, told
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]
