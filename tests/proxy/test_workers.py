"""Several external proxies that one command runs."""

import pytest

from mqserve.broker.errors import InstanceError
from mqserve.broker.process.lifeline import Stop
from mqserve.broker.settings import Settings
from mqserve.controller.processes import Process
from mqserve.instance import proxy_workers
from tests.ports import free_port

pytestmark = pytest.mark.anyio


class Child:
    """A process that ends as soon as it is told to."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def wait(self) -> str:
        return ""

    def stop(self) -> None:
        self.told.append("stop")

    def kill(self) -> None:
        self.told.append("kill")


async def test_a_worker_that_cannot_be_started_takes_the_others_along_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Child()
    children = iter([first])

    def start(*args: object, **options: object) -> Child:
        for child in children:
            return child
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(proxy_workers, "stop_event", Stop)
    monkeypatch.setattr(Process, "start", start)
    with pytest.raises(InstanceError, match=r"^cannot start 2 proxies on port .*: .*Resource temporarily unavailable$"):
        await proxy_workers.run_proxy_workers(Settings(), "127.0.0.1", free_port(), 2, debug=False)
    assert first.told == ["stop", "kill"]
