"""The measured programs: bare Starlette, and a no-op of mqserve in either form, from this checkout or another."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tests.ports import free_port  # noqa: E402
from tests.servers import PrivateRabbitMQ, PrivateRedis  # noqa: E402

FORMS = ("starlette", "embedded", "distributed")
HANDLERS = ("noop", "async_noop")
START_BUDGET_S = 60.0
STOP_BUDGET_S = 60.0


@dataclass(frozen=True)
class Servers:
    """RabbitMQ and Redis for the distributed form; `pids` of the private ones."""

    urls: Mapping[str, str]
    pids: tuple[int, ...]


def open_servers(stack: ExitStack) -> Servers:
    """Starts private servers, which end with the stack, unless MQSERVE_BROKER_URL and MQSERVE_STORE_URL name others."""
    urls: dict[str, str] = {}
    pids: list[int] = []
    for name, private in (("MQSERVE_BROKER_URL", PrivateRabbitMQ), ("MQSERVE_STORE_URL", PrivateRedis)):
        if given := os.environ.get(name):
            urls[name] = given
        else:
            server = stack.enter_context(private())
            urls[name] = server.url
            pids.append(server.pid)
    return Servers(urls, tuple(pids))


@dataclass(frozen=True)
class Subject:
    """A program that answers under `url` with each of the handlers."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds that the program and its children have used so far, from /proc."""
        return sum(cpu_seconds(process) for process in (self.process, *self.process.children(recursive=True)))


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU seconds of a process; 0 if it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@contextmanager
def running(form: str, servers: Servers | None = None, checkout: Path = ROOT) -> Iterator[Subject]:
    """Runs the program of that form with the package of `checkout`, and ends it on exit. The distributed form needs `servers`."""
    port = free_port()
    env = {key: value for key, value in os.environ.items() if not key.startswith("MQSERVE_")}
    env["PYTHONPATH"] = str(checkout)  # before the installed package, also for the children
    command = [sys.executable, "-m", "mqserve", "run", str(HERE / "noop.py"), "--port", str(port)]
    if form == "starlette":
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "bare:app", "--port", str(port), "--no-access-log"]
    if form == "distributed":
        assert servers is not None
        env |= servers.urls
        env |= {"MQSERVE_SECRET_KEY": secrets.token_hex(32), "MQSERVE_NAMESPACE": f"bench-{secrets.token_hex(4)}"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, cwd=HERE)
    try:
        url = f"http://127.0.0.1:{port}"
        for handler in HANDLERS:
            _wait_for(f"{url}/{handler}", process)
        yield Subject(url, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=STOP_BUDGET_S)


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
