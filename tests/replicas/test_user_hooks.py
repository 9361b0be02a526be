"""A user_config on its way into user code whose thread may be held by a call for as long as that takes."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mqserve.broker.errors import BackendFailed
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.documents import Backend
from mqserve.replicas import user_hooks
from mqserve.replicas.context import ReplicaContext
from mqserve.replicas.handler import Handler
from mqserve.replicas.user_hooks import UserHooks
from mqserve.replicas.worker import Worker
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


class Model:
    """Notes what it is told, and takes its time over some of it."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.goes_on = threading.Event()

    def reconfigure(self, config: Any) -> None:
        self.told.append(config)
        if config == "slow":
            assert self.goes_on.wait(30)

    def __call__(self, request: Any) -> None:
        """Not called here."""


def wanted(version: int, user_config: Any) -> Backend:
    return Backend("b", "", "b", {"user_config": user_config}, config_version=version)


@asynccontextmanager
async def hooks_of(model: Model) -> AsyncIterator[tuple[UserHooks, Worker]]:
    async def nobody(jobs: Any) -> None:
        """There are no requests."""

    worker = Worker(ReplicaContext("b", "b#1"), BackendConfig(), lambda job, result: None, nobody)
    hooks = UserHooks(worker, Handler(model, is_function=False))
    applying = asyncio.create_task(hooks.apply_forever("b#1"))
    try:
        yield hooks, worker
    finally:
        model.goes_on.set()
        applying.cancel()
        await asyncio.gather(applying, return_exceptions=True)
        worker.stop()


@pytest.fixture(autouse=True)
def short_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_hooks, "RECONFIGURE_BUDGET_S", 0.2)


async def test_a_user_config_waits_for_the_call_that_holds_the_thread_however_long_that_takes() -> None:
    model, begun, job_ends = Model(), threading.Event(), threading.Event()

    def hold_the_thread() -> None:
        begun.set()
        job_ends.wait(30)

    async with hooks_of(model) as (hooks, worker):
        job = asyncio.create_task(worker.call(hold_the_thread))
        await until(begun.is_set)
        for version in (1, 2, 3):
            hooks.want(wanted(version, version))
            await asyncio.sleep(0.5)  # more than two budgets
        assert model.told == [] and (hooks.version, hooks.refused) == (0, "")
        job_ends.set()
        await job
        await hooks.settled()
        assert model.told == [1, 3], "the first one was on its way"
        assert (hooks.version, hooks.refused) == (3, "")


async def test_a_hook_that_takes_too_long_itself_refuses_the_config() -> None:
    model = Model()
    async with hooks_of(model) as (hooks, _):
        hooks.want(wanted(1, "good"))
        await hooks.settled()
        refusing = asyncio.create_task(hooks.apply(wanted(2, "slow")))
        await until(lambda: model.told == ["good", "slow"])
        await until(lambda: hooks.refused)
        model.goes_on.set()
        with pytest.raises(BackendFailed, match="did not take"):
            await refusing
        assert model.told == ["good", "slow", "good"]
