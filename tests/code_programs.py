"""Programs of users in a folder of their own, for the tests of how code travels: scripts, and files under `mqserve run`."""

import signal
import sys
from pathlib import Path

import httpx

from tests.instances import CommandLine, Program, wait_until
from tests.ports import free_port

SHARED_DEFINITIONS = """
import dataclasses, enum, functools, pickle, sys, threading
import mqserve as serve
import beside

class Color(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Order:
    pieces: int
    color: Color = Color.RED

    def double(self):
        return Order(self.pieces * 2)

@functools.lru_cache
def get_model():
    return Order(7)

COUNT = 0

def echo(request):
    order = request.data
    is_one = isinstance(order, Order), order == Order(2), order.color is Color.RED
    is_one += get_model() is get_model(), beside.Thing is type(beside.THING)
    return is_one, order.double(), type(order).__module__, [f.name for f in dataclasses.fields(Order) if f.default is dataclasses.MISSING]
"""
SAME_ANSWERS = [True, True, True, True, True, True, True, "__main__", ["pieces"], True]

_BESIDE = {"beside.py": "class Thing: ...\nTHING = Thing()\n"}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run_script(shell: CommandLine, text: str) -> Program:
    folder = write(shell.folder / "code", {"script.py": text, **_BESIDE})
    return shell.start_program([sys.executable, str(folder / "script.py")])


def answer_once_ended(shell: CommandLine, text: str, path: str, *, file: str = "app.py") -> tuple[str, Program]:
    """Serves a file by `mqserve run` until it has answered; returns the answer and the ended program."""
    write(shell.folder / "code", {file: text, **_BESIDE})
    port = free_port()
    program = shell.start("run", f"code/{file}", "--port", str(port))
    answer = answer_of(program, f"http://127.0.0.1:{port}{path}")
    end(program)
    return answer, program


def end(program: Program) -> None:
    program.signal(signal.SIGTERM)
    program.wait()


def answer_of(program: Program, url: str) -> str:
    """The body of the first answer with status 200, or "ended" if the program has."""

    def ask() -> str:
        try:
            response = httpx.get(url)
            return response.text if response.status_code == 200 else ""
        except httpx.TransportError:
            return ""

    return wait_until(lambda: ask() or ("ended" if program.ended else ""), told=lambda: program.output)
