"""Children as processes: what is said of their end, and that nothing survives it. The interpreter is a script of the test's."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mqserve.broker.settings import Settings
from mqserve.controller.processes import Process
from tests.instances import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str], Process]:
    """A process that runs these lines of a shell."""

    def start(lines: str) -> Process:
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o700)
        return Process.start([], Settings.read(broker_url="amqp://nowhere", store_url="redis://nowhere"), python=str(script))

    return start


@pytest.mark.parametrize(
    ("lines", "words"),
    [("exit 0", ""), ("exit 3", "exit code 3"), ("kill -KILL $$", "killed by SIGKILL"), ("kill -40 $$", "killed by signal 40")],
)
async def test_the_end_of_a_child_is_put_into_words(child: Callable[[str], Process], lines: str, words: str) -> None:
    assert await child(lines).wait() == words


@pytest.mark.parametrize("end", ["exit 0", "kill -KILL $$"])
async def test_what_a_child_leaves_behind_is_killed_with_it(child: Callable[[str], Process], tmp_path: Path, end: str) -> None:
    left = tmp_path / "left"
    await child(f"sleep 1000 & echo $! > {left}; {end}").wait()
    pid = int(left.read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


async def test_a_child_that_somebody_else_saw_ending_has_ended_all_the_same(child: Callable[[str], Process]) -> None:
    process = child("exit 3")
    wait_until(lambda: process.returncode is not None)
    assert await process.wait() == "exit code 3"


async def test_a_child_that_is_disowned_is_reaped_when_it_ends(child: Callable[[str], Process]) -> None:
    process = child("exit 0")
    process.disown()
    wait_until(lambda: not psutil.pid_exists(process.pid))
