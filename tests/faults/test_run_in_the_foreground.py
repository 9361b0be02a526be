"""`mqserve run` keeps its instance: what dies of it is started again, and it ends when the instance does."""

import signal

import httpx
import psutil

from tests.instances import CommandLine, Program, wait_until
from tests.test_cli import run_hello


def process_of(program: Program, role: str) -> psutil.Process:
    return next(child for child in program.descendants() if child.cmdline()[3:4] == [role])


def test_a_killed_controller_of_a_run_is_started_again(distributed_shell: CommandLine) -> None:
    program, url = run_hello(distributed_shell)
    process_of(program, "controller").kill()
    process_of(program, "replica").kill()
    wait_until(lambda: any(child.cmdline()[3:4] == ["replica"] for child in program.descendants()), 60)
    wait_until(lambda: httpx.get(f"{url}/hello/you", timeout=60).status_code == 200, 60)
    program.signal(signal.SIGINT)
    assert program.wait(60) == 0


def test_a_run_ends_when_somebody_shuts_its_instance_down(distributed_shell: CommandLine) -> None:
    program, _ = run_hello(distributed_shell)
    assert distributed_shell.run("shutdown").returncode == 0
    assert program.wait(60) == 0 and "was shut down" in program.output
    assert not program.output.count("Traceback")
