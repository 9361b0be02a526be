"""The thread on which a client lives: what it does with work that is given up."""

import asyncio
import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from mqserve.broker.errors import InstanceError
from mqserve.client.runtime import Runtime
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


def test_work_that_was_given_up_leaves_no_word_of_an_error_that_nobody_read(caplog: pytest.LogCaptureFixture) -> None:
    """Its caller is cancelled, and then the client ends, before either reaches the runtime's thread."""

    async def forever() -> None:
        await asyncio.sleep(60)

    runtime = Runtime()
    runtime.start()
    given_up = runtime.submit(forever())
    runtime.call(asyncio.sleep(0))
    busy, free = threading.Event(), threading.Event()
    runtime.post(lambda: (busy.set(), free.wait(10)))  # type: ignore[arg-type, func-returns-value]
    assert busy.wait(10)
    given_up.cancel()
    runtime.is_over("the client was closed")
    free.set()
    runtime.stop()
    del given_up
    gc.collect()
    assert "never retrieved" not in caplog.text


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


def test_work_that_is_under_way_when_a_client_ends_is_told_why_and_so_is_what_comes_later() -> None:
    async def forever() -> None:
        await asyncio.sleep(60)

    runtime = Runtime()
    runtime.start()
    under_way = runtime.submit(forever())
    runtime.call(asyncio.sleep(0))
    runtime.call(_end(runtime))
    with pytest.raises(InstanceError, match="closed"):
        under_way.result(10)
    with pytest.raises(InstanceError, match="closed"):
        runtime.call(forever())
    runtime.stop()
    with pytest.raises(InstanceError, match="closed"):
        runtime.call(forever())


async def _end(runtime: Runtime) -> None:
    runtime.is_over("it was closed")
    await runtime.end_submitted()


def test_what_is_posted_while_a_runtime_stops_is_run_or_refused() -> None:
    """Whoever waits for what it was to bring about would wait in vain."""
    for _ in range(20):
        runtime, ran = Runtime(), 0
        runtime.start()
        accepted = 0

        def run() -> None:
            nonlocal ran
            ran += 1

        stopping = threading.Thread(target=runtime.stop)
        stopping.start()
        try:
            while True:
                runtime.post(run)
                accepted += 1
        except InstanceError:
            pass
        stopping.join()
        assert ran == accepted


def test_a_wait_on_the_thread_that_would_have_to_do_the_work_is_refused() -> None:
    async def work() -> None:
        pass

    async def wait() -> None:
        runtime.call(work())

    runtime = Runtime()
    runtime.start()
    with pytest.raises(InstanceError, match="must not wait"):
        runtime.call(wait())
    runtime.stop()
