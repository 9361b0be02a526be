"""`mqserve run` keeps its instance: what dies of it is started again, and it ends when the instance does."""

import signal
import time
from contextlib import suppress

import httpx
import psutil

from mqserve.broker.store_keys import LEADER_TTL_S
from tests.faults.members import Members
from tests.instances import CommandLine, Program, wait_until
from tests.test_cli import run_hello


def processes_of(program: Program, role: str) -> list[psutil.Process]:
    found = []
    for child in program.descendants():
        with suppress(psutil.NoSuchProcess):  # a zombie, or gone in between
            if child.cmdline()[3:4] == [role]:
                found.append(child)
    return found


def test_a_killed_controller_of_a_run_is_started_again(distributed_shell: CommandLine) -> None:
    program, url = run_hello(distributed_shell)
    for role in ("controller", "replica"):
        (process,) = processes_of(program, role)
        process.kill()
    wait_until(lambda: processes_of(program, "replica"), 60)
    wait_until(lambda: httpx.get(f"{url}/hello/you", timeout=60).status_code == 200, 60)
    program.signal(signal.SIGINT)
    assert program.wait(60) == 0


def test_the_lead_of_a_runs_killed_controller_need_not_lapse(distributed_shell: CommandLine, store_url: str, namespace: str) -> None:
    program, _ = run_hello(distributed_shell)
    members, took_s = Members(store_url, namespace), []
    for _ in range(3):
        old, epoch = wait_until(lambda: members.leader())
        (controller,) = processes_of(program, "controller")
        controller.kill()
        killed_at = time.monotonic()
        wait_until(lambda: members.leader()[0] not in (0, old) and members.leader()[1] > epoch)  # noqa: B023
        took_s.append(time.monotonic() - killed_at)
    members.close()
    assert min(took_s) < LEADER_TTL_S - 1, took_s  # a lead that is renewed every second lapses no sooner


def test_a_run_ends_when_somebody_shuts_its_instance_down(distributed_shell: CommandLine) -> None:
    program, _ = run_hello(distributed_shell)
    assert distributed_shell.run("shutdown").returncode == 0
    assert program.wait(60) == 0 and "was shut down" in program.output
    assert not program.output.count("Traceback")
