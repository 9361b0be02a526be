"""The programs whose CPU time is compared, each as a process of its own: bare Starlette, and an instance in either form."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.cost.load import load
from tests.instances import ROOT, answers, wait_until
from tests.ports import free_port

CHECKOUT = Path(os.environ.get("MQSERVE_TEST_CHECKOUT") or ROOT)  # whose mqserve is measured: an earlier one shows that the guard can fail
HERE = Path(__file__).parent
STOP_BUDGET_S = 60.0


class Subject:
    """A program that answers over HTTP."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self._url = url
        self._process = process

    def send(self, scenario: str, count: int) -> None:
        """Returns when so many requests of the scenario were answered."""
        if scenario == "handle":
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline() == "called\n"
        else:
            load(f"{self._url}/{scenario}", count)

    def cpu_us(self, scenario: str, count: int) -> dict[str, float]:
        """CPU microseconds of one request, by role: of the program itself, of its proxy, its replicas and so on."""
        before = self._cpu_s()
        self.send(scenario, count)
        after = self._cpu_s()
        return {role: (after[role] - before[role]) / count * 1e6 for role in after}

    def _cpu_s(self) -> dict[str, float]:
        spent: dict[str, float] = defaultdict(float)
        main = psutil.Process(self._process.pid)
        for process in (main, *main.children(recursive=True)):
            words = process.cmdline()
            role = words[words.index("mqserve") + 1] if "mqserve" in words else "program"
            times = process.cpu_times()
            spent[role] += times.user + times.system
        return spent


@contextmanager
def bare_starlette() -> Iterator[Subject]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ["-m", "uvicorn", "--app-dir", str(ROOT / "benchmarks" / "programs"), "bare:app", "--no-access-log", "--log-level", "warning"]
    with _running([*command, "--port", str(port)], {}) as process:
        wait_until(lambda: answers(f"{url}/noop"))
        yield Subject(url, process)
        process.terminate()


@contextmanager
def instance(variables: Mapping[str, str]) -> Iterator[Subject]:
    """The program with an instance of ours; `variables` say in which form. It ends with its input."""
    port = free_port()
    with _running([str(HERE / "program.py"), str(port)], {**variables, "PYTHONPATH": str(CHECKOUT)}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Subject(f"http://127.0.0.1:{port}", process)


@contextmanager
def _running(command: list[str], variables: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    # `make coverage` would trace our code alone, and a folder with another mqserve would come before PYTHONPATH
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")} | dict(variables)
    process = subprocess.Popen([sys.executable, *command], env=env, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        try:
            process.communicate(timeout=STOP_BUDGET_S)
        finally:
            process.kill()
