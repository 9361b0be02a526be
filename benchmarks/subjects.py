"""The measured programs: bare Starlette, and programs of mqserve in either form, from this checkout or another."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil

from tests.ports import free_port
from tests.servers import PrivateRabbitMQ, PrivateRedis

from .cpu import KindOf, cpu_seconds, seconds_by_kind

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent
FORMS = ("embedded", "distributed")
HANDLERS = ("noop", "async_noop")
THAW_S = 0.5
START_BUDGET_S = 120.0
STOP_BUDGET_S = 60.0


class SubjectFailed(Exception):
    """A measured program did not start, or did not answer as it should."""


@dataclass(frozen=True)
class Servers:
    """RabbitMQ and Redis; `pids` of the private ones, by kind."""

    urls: Mapping[str, str]
    pids: Mapping[str, int]

    def cpu_s(self) -> dict[str, float]:
        """The CPU seconds that each has used so far; those that are not ours are not measured."""
        return {kind: cpu_seconds(psutil.Process(pid)) for kind, pid in self.pids.items()}


def open_servers(stack: ExitStack) -> Servers:
    """Starts private servers, which end with the stack, unless MQSERVE_BROKER_URL and MQSERVE_STORE_URL name others."""
    urls: dict[str, str] = {}
    pids: dict[str, int] = {}
    privates = (("MQSERVE_BROKER_URL", "rabbitmq", PrivateRabbitMQ), ("MQSERVE_STORE_URL", "redis", PrivateRedis))
    for name, kind, private in privates:
        if given := os.environ.get(name):
            urls[name] = given
        else:
            server = stack.enter_context(private())
            urls[name] = server.url
            pids[kind] = server.pid
    return Servers(urls, pids)


@dataclass(frozen=True)
class Subject:
    """A running program."""

    name: str
    url: str
    process: psutil.Process
    kind_of: KindOf
    servers: Servers | None = None  # those that work for it
    env: Mapping[str, str] = field(default_factory=dict)  # the variables that it was started with
    freezes: bool = False  # it is stopped while others are measured

    @contextmanager
    def taking_its_turn(self) -> Iterator[None]:
        """Lets a frozen program go on for the time of a measurement."""
        self.signal(signal.SIGCONT)
        try:
            if self.freezes:
                time.sleep(THAW_S)
            yield
        finally:
            self.freeze()

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all processes of a program that freezes."""
        for process in self.tree() if self.freezes else ():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far by the program, its children, RabbitMQ and Redis, by kind of process."""
        servers = self.servers.cpu_s() if self.servers is not None else {}
        return seconds_by_kind(self.tree(), self.kind_of) | servers


@contextmanager
def running_starlette(name: str) -> Iterator[Subject]:
    """Bare Starlette on uvicorn: the baseline, without a queue. `starlette` has async handlers, `starlette-def` plain ones."""
    port = free_port()
    app = "bare:plain_app" if name == "starlette-def" else "bare:app"
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(PROGRAMS), app, "--port", str(port), "--no-access-log"]
    with running(name, command, port, kind_of_server, ready=HANDLERS) as subject:
        yield subject


@contextmanager
def running_mqserve(
    form: str,
    servers: Servers | None = None,
    checkout: Path = ROOT,
    program: Path = PROGRAMS / "noop.py",
    ready: Sequence[str] = HANDLERS,
    options: Sequence[str] = (),
    name: str = "",
) -> Iterator[Subject]:
    """`mqserve run` of that program with the package of `checkout`, up when all paths in `ready` answer. The distributed form needs
    `servers`."""
    port = free_port()
    command = [sys.executable, "-m", "mqserve", "run", str(program), "--port", str(port), *options]
    env = {"PYTHONPATH": str(checkout)}  # before the installed package, also for the children
    if form == "distributed":
        assert servers is not None
        env |= servers.urls
        env |= {"MQSERVE_SECRET_KEY": secrets.token_hex(32), "MQSERVE_NAMESPACE": f"bench-{secrets.token_hex(4)}"}
    with running(name or form, command, port, kind_of_mqserve, env, ready, servers if form == "distributed" else None) as subject:
        yield subject


def kind_of_mqserve(command: Sequence[str]) -> str:
    """The command of mqserve that a process runs: `proxy`, `replica`, `node`, `controller`, or `run`."""
    return command[command.index("mqserve") + 1] if "mqserve" in command else "run"


def kind_of_server(command: Sequence[str]) -> str:
    """The kind of the processes of a program whose processes are all alike."""
    return "server"


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    kind_of: KindOf,
    env: Mapping[str, str] | None = None,
    ready: Sequence[str] = (),
    servers: Servers | None = None,
    cwd: Path = PROGRAMS,
    freezes: bool = False,
    kindly: bool = True,
) -> Iterator[Subject]:
    """Runs a program, goes on when all paths in `ready` answer, and ends it on exit (not `kindly`: kills it).

    Raises SubjectFailed if it does not start.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MQSERVE_")}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=clean | dict(env or {}), stdout=output, stderr=output, cwd=cwd, start_new_session=True)
        try:
            for path in ready:
                _wait_for(f"{url}/{path}", process)
            subject = Subject(name, url, psutil.Process(process.pid), kind_of, servers, dict(env or {}), freezes)
            subject.freeze()
            yield subject
        except SubjectFailed:
            print(f"\n{name} printed:\n{tail(output)}", file=sys.stderr)
            raise
        finally:
            _end(process, kindly=kindly)


def tail(output: IO[bytes]) -> str:
    """The last of what a program printed. Shown, and not put into the results, since it names folders of this machine."""
    output.seek(0)
    return output.read().decode(errors="replace").strip()[-2000:]


def _end(process: subprocess.Popen[bytes], *, kindly: bool) -> None:
    """Ends a program and all its children: kindly by Ctrl-C, and then whatever it left behind."""
    tree = []
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if kindly:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=STOP_BUDGET_S)
        except subprocess.TimeoutExpired:
            print(f"{process.args!r} does not end by Ctrl-C within {STOP_BUDGET_S:g} s: killed", file=sys.stderr)
    for each in tree:
        with suppress(psutil.NoSuchProcess):  # psutil knows a process by its start too, so that no other of that number is killed
            each.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=STOP_BUDGET_S)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_BUDGET_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SubjectFailed(f"it ended with status {process.returncode} before it answered")
        try:
            urlopen(url, timeout=1).close()
            return
        except HTTPError as answer:
            if answer.code not in (404, 503):  # such as 405: it takes POST alone
                return
            time.sleep(0.05)
        except (URLError, OSError):
            time.sleep(0.05)
    raise SubjectFailed(f"it did not answer within {START_BUDGET_S:g} s")
