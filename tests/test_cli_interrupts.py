"""Ctrl-C: no traceback whenever it comes, an orderly end at the first one, and at the second one an end at once, with a sentence."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import httpx
import pytest

from tests.instances import ROOT, CommandLine, Program, is_alive, wait_until
from tests.ports import free_port
from tests.servers import PrivateRedis

IMPORTS_SLOWLY = """
import pathlib, sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            pathlib.Path({came!r}).touch()
            time.sleep(60)

sys.meta_path.insert(0, Slow())
"""

SLOW = """
import time
from pathlib import Path
import mqserve as serve

def slow(request):
    Path({came!r}).touch()
    while not Path({go_on!r}).exists():
        time.sleep(0.01)

serve.connect()
serve.create_backend("b", slow)
serve.create_endpoint("b", backend="b", route="/b")
"""


@pytest.mark.parametrize("command", ["run app.py", "start", "shutdown", "node", "controller", "status", "status --json"])
@pytest.mark.parametrize("module", ["msgspec", "mqserve.instance.starting"])  # while the package is imported, early and late
def test_ctrl_c_while_the_command_line_imports_says_nothing(shell: CommandLine, command: str, module: str) -> None:
    came = shell.folder / "came"
    shell.file("sitecustomize.py", IMPORTS_SLOWLY.format(module=module, came=str(came)))
    program = shell.with_variables(PYTHONPATH=f"{shell.folder}:{ROOT}").start(*command.split())
    wait_until(came.exists, told=lambda: program.output)
    program.signal(signal.SIGINT)
    assert (program.wait(10), program.output) == (130, "")


class Slow:
    """A request to a backend of its own, which runs until `go_on`."""

    def __init__(self, shell: CommandLine, port: int) -> None:
        self._go_on, came = shell.folder / "go-on", shell.folder / "came"
        deployed = shell.python(SLOW.format(came=str(came), go_on=str(self._go_on)))
        assert deployed.returncode == 0, deployed.stderr
        self._background = ThreadPoolExecutor(1)
        self._background.submit(httpx.get, f"http://127.0.0.1:{port}/b", timeout=60)
        wait_until(came.exists)

    def go_on(self) -> None:
        self._go_on.touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self._background.shutdown()


def end_twice(program: Program, first: str) -> None:
    program.signal(signal.SIGINT)
    program.wait_for(first)
    time.sleep(0.5)
    assert not program.ended, "there was something to wait for"
    program.signal(signal.SIGINT)
    began = time.monotonic()
    assert program.wait(20) == 130
    assert time.monotonic() - began < 10
    assert "Ending at once" in program.output and "Traceback" not in program.output, program.output


def test_a_second_ctrl_c_ends_a_node_that_drains_at_once_and_its_children_with_it(distributed_shell: CommandLine) -> None:
    shell, port = distributed_shell, free_port()
    controller = shell.start("controller")
    wait_until(lambda: shell.run("status").returncode == 0, told=lambda: controller.output)
    node = shell.start("node", "--no-proxy")
    shell.start("proxy", "--port", str(port))
    with Slow(shell, port) as slow:
        children = node.descendants()
        end_twice(node, "Draining … (once more to end at once)")
        wait_until(lambda: not any(is_alive(child) for child in children), deadline_s=25, told=lambda: children)
        slow.go_on()
    assert shell.run("shutdown").returncode == 0


def test_ctrl_c_ends_a_shutdown_that_waits_and_the_instance_drains_on(distributed_shell: CommandLine) -> None:
    shell, port = distributed_shell, free_port()
    assert shell.start("start", "--port", str(port)).wait() == 0
    with Slow(shell, port) as slow:
        ending = shell.start("shutdown")
        ending.wait_for("still draining: 1 backend, 0 waiting, 1 running, 1 replica")
        ending.signal(signal.SIGINT)
        assert ending.wait(20) == 130
        assert "drains on without this command" in ending.output and "Traceback" not in ending.output, ending.output
        assert "being shut down" in shell.run("status").stdout
        slow.go_on()
    wait_until(lambda: "no instance runs" in shell.run("status").stderr)


def test_a_shutdown_tells_what_still_drains_when_that_changes(distributed_shell: CommandLine) -> None:
    shell, port = distributed_shell, free_port()
    assert shell.start("start", "--port", str(port)).wait() == 0
    with Slow(shell, port) as slow:
        ending = shell.start("shutdown")
        ending.wait_for("1 running, 1 replica")
        time.sleep(3)  # in which nothing changes
        slow.go_on()
    assert ending.wait() == 0
    lines = ending.output.splitlines()
    assert lines[0].startswith("Draining") and lines[-1] == "Done."
    told = lines[1:-1]
    assert told and len(told) == len(set(told)) <= 8, told


@pytest.mark.parametrize("command", ["start", "run"])
def test_ctrl_c_ends_a_start_in_order_and_leaves_nothing(distributed_shell: CommandLine, namespace: str, command: str) -> None:
    shell = distributed_shell
    shell.file("app.py", "import mqserve as serve\n\n@serve.endpoint('/a')\ndef a(request): ...\n")
    program = shell.start(*{"start": ["start", "--port", "0"], "run": ["run", "app.py", "--port", "0"]}[command])
    time.sleep(0.7)  # wherever that is
    program.signal(signal.SIGINT)
    code = program.wait()
    assert code in (0, 130) and "Traceback" not in program.output, program.output
    if "runs, HTTP on" in program.output:  # it was quicker
        shell.run("shutdown")
    wait_until(lambda: "no instance runs" in shell.run("status").stderr)


def test_ctrl_c_ends_a_status_that_a_hanging_store_keeps(distributed_shell: CommandLine, store_server: PrivateRedis) -> None:
    store_server.freeze()
    program = distributed_shell.start("status")
    time.sleep(0.7)
    program.signal(signal.SIGINT)
    assert program.wait(10) in (1, 130)
    assert "Traceback" not in program.output, program.output


SCRIPT = """
import sys, threading, time
import httpx
import mqserve as serve

def slow(request):
    print("it runs", flush=True)
    time.sleep(8)

client = serve.start(http_options={{"port": 0}})
serve.create_backend("slow", slow, config={{"graceful_shutdown_timeout_s": 30}})
serve.create_endpoint("slow", backend="slow", route="/slow")
threading.Thread(target=httpx.get, args=(client.http_url() + "/slow",), kwargs={{"timeout": 60}}, daemon=True).start()
time.sleep(1)
print("shutting down", flush=True)
{ending}
"""


@pytest.mark.parametrize(
    "ending",
    ["serve.shutdown()", "sys.exit()"],
    ids=["shutdown", "end-of-the-program"],
)
def test_a_second_ctrl_c_ends_a_script_that_shuts_its_instance_down_at_once(shell: CommandLine, ending: str) -> None:
    program = shell.start_program([sys.executable, "-c", SCRIPT.format(ending=ending)])
    program.wait_for("shutting down")
    time.sleep(0.3)
    end_twice(program, "Draining … (once more to end at once)")


def test_the_first_ctrl_c_in_a_shutdown_lets_it_end_in_order_and_is_raised_afterwards(shell: CommandLine) -> None:
    ending = "try:\n    serve.shutdown()\nexcept KeyboardInterrupt:\n    print('interrupted, in order', flush=True)"
    program = shell.start_program([sys.executable, "-c", SCRIPT.format(ending=ending)])
    program.wait_for("shutting down")
    time.sleep(0.3)
    program.signal(signal.SIGINT)
    program.wait_for("interrupted, in order")
    assert program.wait(20) == 0 and "Traceback" not in program.output, program.output


def test_ctrl_c_works_where_nobody_reads_what_is_said(shell: CommandLine) -> None:
    script = """
import os, signal
from mqserve.broker.process.interrupts import Interrupts, taking
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 2)
try:
    with taking(Interrupts("first")):
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    assert shell.python(script).stdout == "interrupted\n"
