"""A process that calls a handle or a task with many calls under way (`programs/in_flight.py`), and what answers it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from .cpu import spent_us
from .scenario import Sample
from .subjects import PROGRAMS, Subject, SubjectFailed, tail


@dataclass(frozen=True)
class Caller:
    """The calling process; `server` answers the calls, unless the process itself does."""

    process: subprocess.Popen[str]
    server: Subject | None

    def measure(self, how: str, in_flight: int, seconds: float) -> Sample:
        """Keeps so many calls under way; `how` the results are had: `sync` or `async`."""
        before = self._cpu_s()
        report = json.loads(self.ask(f"{how} {in_flight} {seconds}"))
        spent = spent_us(before, self._cpu_s(), report["calls"])
        values = {"per_second": report["calls"] / report["seconds"], "p50_ms": report["p50_ms"], "p99_ms": report["p99_ms"]}
        return Sample(values, spent)

    def ask(self, line: str) -> str:
        """Writes a line to the process and reads its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise SubjectFailed("the calling process ended")
        return answer

    def _cpu_s(self) -> dict[str, float]:
        times = psutil.Process(self.process.pid).cpu_times()
        return (self.server.cpu_s() if self.server else {}) | {"client": times.user + times.system}


@contextmanager
def calling(command: Sequence[str], env: Mapping[str, str], server: Subject | None, cwd: Path = PROGRAMS) -> Iterator[Caller]:
    """Runs a program that ends in `Caller.serve` of `in_flight.py`, until a first call was answered. Raises SubjectFailed if none was."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MQSERVE_")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, env=clean | dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                print(f"\n{command[-1]} printed:\n{tail(errors)}", file=sys.stderr)
                raise SubjectFailed("its first call was not answered")
            yield Caller(process, server)
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
