"""What `mqserve run` does when its controller or node dies. The children are of the test's making."""

import asyncio

import pytest

from mqserve.instance.starting import keep_child_running

pytestmark = pytest.mark.anyio


class Child:
    """Ends at once, as it is told."""

    pid = 1

    def __init__(self, how: str) -> None:
        self._how = how

    async def wait(self) -> str:
        return self._how

    def stop(self) -> None: ...

    def kill(self) -> None: ...


async def test_a_child_that_cannot_be_started_for_once_is_started_later() -> None:
    tries: list[str] = []

    def start() -> Child:
        tries.append("started")
        if len(tries) == 1:
            raise OSError(24, "Too many open files")
        return Child("")

    async def is_over() -> bool:
        return bool(tries)

    async with asyncio.timeout(20):
        await keep_child_running("node", Child("killed by SIGKILL"), start, is_over)
    assert len(tries) == 2
