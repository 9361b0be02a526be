"""Instances for the tests: in this process by the public API, or as programs of their own by the command line."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil
import pytest

import mqserve as serve
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
SECRET_KEY = "the key of the tests, at least 32 bytes"
DEADLINE_S = 60.0
NOISE_S = 6.0  # beyond a budget of ours: what a busy machine may add, and far from the time that a missed budget takes

FORMS = ("embedded", "distributed")
distributed_only = pytest.mark.parametrize("form", ["distributed"], indirect=True)

T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float = DEADLINE_S, *, told: Callable[[], object] = str) -> T:
    """What `condition` returns, as soon as that is true. Fails past the deadline with what `told` then says."""
    until = time.monotonic() + deadline_s
    while not (found := condition()):
        if time.monotonic() > until:
            pytest.fail(f"not within {deadline_s:g} s: {getattr(condition, '__name__', condition)}\n{told()}")
        time.sleep(0.02)
    return found


def new_name(kind: str) -> str:
    """A name nothing else has, since the tests of a module share an instance."""
    return f"{kind}-{uuid.uuid4().hex[:8]}"


def new_namespace(of: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", of.lower())
    return f"{words[:27].strip('-')}-{uuid.uuid4().hex[:12]}"


@contextmanager
def started(*, broker_url: str = "", store_url: str = "", namespace: str = "", **http_options: Any) -> Iterator[serve.Client]:
    """An instance of this process, on a free port: embedded without URLs. Shut down at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
        client = serve.start(
            http_options={"port": free_port(), **http_options},
            broker_url=broker_url,
            store_url=store_url,
            namespace=namespace or new_namespace("tests"),
        )
        try:
            yield client
        finally:
            client.shutdown()


def wait_until_back(client: serve.Client) -> None:
    """Until this process and a proxy of the instance have RabbitMQ and Redis again. Each dials by itself, and what one of them sends to a
    server that has been away for a while fails at once."""
    queue, store = client._opened.connections.queue, client._opened.connections.store

    def is_back() -> bool:
        if queue.down_s or store.health.trouble:
            return False
        try:
            url = client.http_url()  # empty until the proxies have said again that they live
        except serve.StoreUnavailable:
            return False
        return bool(url) and answers(f"{url}/-/readyz")

    wait_until(is_back, told=lambda: f"{queue!r}, {store!r}")


class Deploy:
    """Deploys for one test: unique names, and gone at its end. What it returns is the name of backend and endpoint."""

    def __init__(self, client: serve.Client) -> None:
        self.client = client
        self.url = client.http_url()
        self._names: list[str] = []

    def __call__(
        self,
        target: Any,
        *init_args: Any,
        route: str | None = None,
        methods: tuple[str, ...] = ("GET", "POST"),
        **config: Any,
    ) -> str:
        name = new_name("b")
        self.client.create_backend(name, target, *init_args, config=config)
        self._names.append(name)
        self.client.create_endpoint(name, backend=name, route=route, methods=methods)
        return name

    def at(self, target: Any, *init_args: Any, **config: Any) -> str:
        """The URL of a route of its own."""
        return self.named(target, *init_args, **config)[0]

    def named(self, target: Any, *init_args: Any, **config: Any) -> tuple[str, str]:
        """The URL of a route of its own, and the backend's name."""
        route = new_name("r")
        name = self(target, *init_args, route=f"/{route}", **config)
        return f"{self.url}/{route}", name

    def forget(self, name: str) -> None:
        """The test has deleted it."""
        self._names.remove(name)

    def undo(self, *, force: bool = False) -> None:
        for name in self._names:
            self.client.delete_endpoint(name)
        with ThreadPoolExecutor() as threads:  # each waits for its replicas to drain, but for `force`
            list(threads.map(lambda name: self.client.delete_backend(name, force=force), self._names))


class Program:
    """A command as a process of its own, its output in a file. Ended on exit, kindly at first."""

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self._command = command
        self._log = folder / f"{new_name('output')}.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=dict(env), cwd=cwd or folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __repr__(self) -> str:
        return f"<Program {' '.join(self._command)}, {self._process.poll()}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def wait_for(self, text: str, deadline_s: float = DEADLINE_S) -> str:
        """The first whole line with `text` in it: a program may write a line in pieces. Fails when the program ends without it."""

        def line() -> str:
            has_ended, output = self.ended, self.output
            said = output if has_ended else output[: output.rfind("\n") + 1]
            found = next((line for line in said.splitlines() if text in line), "")
            if not found and has_ended:
                pytest.fail(f"{self!r} ended and never said {text!r}:\n{self.output}")
            return found

        return wait_until(line, deadline_s, told=lambda: f"{self!r} has not said {text!r}:\n{self.output}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit code."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self!r} has not ended within {deadline_s:g} s:\n{self.output}")

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        if not self.ended:
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CommandLine:
    """`mqserve …` with one environment, in one folder."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MQSERVE_")} | variables
        self._programs: list[Program] = []

    @classmethod
    def joining(cls, folder: Path, broker_url: str, store_url: str, namespace: str, **variables: str) -> "CommandLine":
        """Of somebody whose environment names a broker, a store, a key and a namespace."""
        return cls(
            folder,
            MQSERVE_BROKER_URL=broker_url,
            MQSERVE_STORE_URL=store_url,
            MQSERVE_SECRET_KEY=SECRET_KEY,
            MQSERVE_NAMESPACE=namespace,
            PYTHONPATH=str(ROOT),
            **variables,
        )

    def with_variables(self, **variables: str) -> "CommandLine":
        other = CommandLine(self.folder, **variables)
        other.env = {**self.env, **variables}
        other._programs = self._programs
        return other

    def start(self, *arguments: str) -> Program:
        """A running command; it is ended with the test."""
        return self.start_program([sys.executable, "-m", "mqserve", *arguments])

    def start_program(self, command: list[str], cwd: Path | None = None) -> Program:
        """Any program, in this environment."""
        program = Program(command, self.folder, self.env, cwd)
        self._programs.append(program)
        return program

    def run(self, *arguments: str, deadline_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        command = [sys.executable, "-m", "mqserve", *arguments]
        return subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=deadline_s)

    def python(self, script: str, *arguments: str, deadline_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A program of the user's that ends by itself."""
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=deadline_s)

    def file(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def close(self) -> None:
        for program in reversed(self._programs):
            program.close()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
