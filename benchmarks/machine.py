"""What a run was made on: the machine, and the versions of all that took part. Nothing that names the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis

from .peers import PEERS
from .results import Machine
from .subjects import ROOT, Servers

PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "aiormq", "hiredis", "msgspec")


def machine() -> Machine:
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_gib = round(psutil.virtual_memory().total / 2**30, 1)
    return Machine(_system(), platform.release(), cpu[1] if cpu else platform.machine(), psutil.cpu_count() or 1, memory_gib)


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def revision() -> str:
    """The commit that was measured, with `+` if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def versions(servers: Servers, peers: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    told = subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout.split()
    found["wrk"] = told[1] if len(told) > 1 else "?"
    found["RabbitMQ"] = _rabbitmq_version(servers.urls["MQSERVE_BROKER_URL"])
    with redis.Redis.from_url(servers.urls["MQSERVE_STORE_URL"]) as client:
        found["Redis"] = client.info("server")["redis_version"]
    for name in peers:
        found |= PEERS[name].requirements()
    return found


def _rabbitmq_version(url: str) -> str:
    """From the first frame, which tells the server's properties before any login."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port or 5672), timeout=5) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        found = re.search(rb"\x07versionS....([\d.]+)", connection.recv(4096), re.DOTALL)
    return found[1].decode() if found else "?"
