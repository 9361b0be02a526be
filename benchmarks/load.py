"""Load by wrk (Debian: apt-get install wrk), and its report of the answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One load run; latencies in milliseconds."""

    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


def check_wrk() -> None:
    """Exits with a sentence if wrk is missing."""
    if shutil.which("wrk") is None:
        sys.exit("the load comes from wrk, and it is not installed: apt-get install wrk (or brew install wrk)")


def load(url: str, clients: int, seconds: float) -> Sample:
    """Sends as many requests as `clients` connections can send one after the other."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "30s", url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    per_second, requests = re.search(r"Requests/sec:\s+([\d.]+)", told), re.search(r"(\d+) requests in", told)
    assert per_second is not None and requests is not None, told
    return Sample(int(requests[1]), float(per_second[1]), _latency(told, "50%"), _latency(told, "99%"), int(failed[1]) if failed else 0)


def _latency(told: str, percentile: str) -> float:
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", told)
    assert found is not None, told
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]
