"""The thread on which a client lives: what it does with work that is given up."""

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from mqserve.runtime import Runtime
from tests.instances import wait_until


@pytest.fixture
def interrupted_by_ctrl_c() -> Iterator[None]:
    """A shell has programs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted_by_ctrl_c")
def test_work_that_ctrl_c_gives_up_ends_in_good_order_before_the_runtime_stops() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            steps.append("begun")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.5)  # a shutdown takes its time
            steps.append("ended")

    def press_ctrl_c() -> None:
        wait_until(lambda: steps)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    runtime = Runtime()
    runtime.start()
    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        runtime.call(work())
    runtime.stop()
    assert steps == ["begun", "ended"]


def test_what_nobody_has_cancelled_does_not_keep_a_runtime_from_stopping() -> None:
    ended = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    runtime = Runtime()
    runtime.start()
    runtime.submit(forever())
    runtime.stop()
    assert ended.wait(1)
