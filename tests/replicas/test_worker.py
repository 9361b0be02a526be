"""The thread of user code: what goes in as jobs comes out as results, each once, whatever the code does."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.errors import BackendFailed
from mqserve.broker.results import Result
from mqserve.broker.values.signing import Signer
from mqserve.controller.state.config import BackendConfig
from mqserve.replicas.batch_decorators import accept_batch
from mqserve.replicas.context import ReplicaContext, cancelled, get_replica_context
from mqserve.replicas.execute import Execution
from mqserve.replicas.handler import make_handler
from mqserve.replicas.hook_calls import Raised
from mqserve.replicas.stages import Job
from mqserve.replicas.worker import Worker
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio

GIVEN_UP = Result(status=499)


class Owner:
    """Of a worker that serves `target`: `results` has what was handed over, `marked` the suspects that it
    was told of, `told` how often."""

    def __init__(self, target: Any, **config: Any) -> None:
        self.results: list[tuple[Job, Result]] = []
        self.marked: list[Job] = []
        self.told = 0
        self.worker = Worker(
            ReplicaContext("b", "b#1"), BackendConfig(**config), lambda job, result: self.results.append((job, result)), self._mark
        )
        self._target = target

    async def construct(self) -> None:
        handler = await self.worker.call(lambda: make_handler(self._target, []), constructs=True)
        self.worker.serve(Execution("b", handler, Signer([b"k" * 32], "tests")))

    async def _mark(self, jobs: Sequence[Job]) -> None:
        self.told += 1
        self.marked += [job for job in jobs if job.suspect]

    def submit(self, *bodies: str, **fields: Any) -> list[Job]:
        jobs = [make_job(body, **fields) for body in bodies]
        for job in jobs:
            self.worker.submit(job)
        return jobs

    async def answers(self, count: int) -> list[bytes]:
        """In the order in which they were handed over."""
        await until(lambda: len(self.results) >= count)
        assert len(self.results) == count
        return [result.body for _, result in self.results]


def make_job(body: str, **fields: Any) -> Job:
    nobodys: Any = None  # a worker does not touch it
    return Job(Envelope("a" * 32, body.encode(), "text/plain", Header(origin="http")), 1, nobodys, **fields)


Serve = Callable[..., Any]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Makes workers that serve a function or a class, until the end of the test."""
    owners: list[Owner] = []

    async def serve(target: Any, **config: Any) -> Owner:
        owners.append(Owner(target, **config))
        await owners[-1].construct()
        return owners[-1]

    yield serve
    for owner in owners:
        owner.worker.stop()


class Held:
    """A handler that returns when it is let."""

    def __init__(self) -> None:
        self.open, self.started = threading.Event(), 0

    def __call__(self, request: Any) -> Any:
        self.started += 1
        assert self.open.wait(30)
        return request.data


async def test_plain_calls_run_one_at_a_time_in_the_thread_that_made_the_handler(serve: Serve) -> None:
    class Model:
        def __init__(self) -> None:
            self.thread, self.running = threading.get_ident(), 0

        def __call__(self, request: Any) -> Any:
            assert threading.get_ident() == self.thread != main
            self.running += 1
            assert self.running == 1
            time.sleep(0.001)
            self.running -= 1
            return request.data

    main = threading.get_ident()
    owner = await serve(Model)
    owner.submit(*"abcde")
    assert await owner.answers(5) == [b"a", b"b", b"c", b"d", b"e"]
    assert owner.worker.run_s > 0


async def test_with_several_threads_as_many_plain_calls_run_at_once(serve: Serve) -> None:
    together = threading.Barrier(3)

    def handler(request: Any) -> str:
        together.wait(30)
        return get_replica_context().replica_tag

    owner = await serve(handler, sync_threads=3)
    owner.submit("a", "b", "c")
    assert await owner.answers(3) == [b"b#1"] * 3


async def test_async_calls_run_beside_each_other(serve: Serve) -> None:
    together: list[asyncio.Event] = []

    async def handler(request: Any) -> Any:
        together.append(asyncio.Event())
        if len(together) == 3:
            for event in together:
                event.set()
        await together[-1].wait()
        return request.data

    owner = await serve(handler)
    owner.submit("a", "b", "c")
    assert sorted(await owner.answers(3)) == [b"a", b"b", b"c"]


async def test_a_full_batch_runs_at_once_and_a_smaller_one_after_its_wait(serve: Serve) -> None:
    sizes: list[int] = []

    @accept_batch
    def handler(requests: list[Any]) -> list[Any]:
        sizes.append(len(requests))
        return [request.data for request in requests]

    owner = await serve(handler, max_batch_size=2, batch_wait_timeout=0.1)
    owner.submit("a", "b", "c")
    assert await owner.answers(3) == [b"a", b"b", b"c"]
    assert sizes == [2, 1]


@pytest.mark.parametrize("error", [ValueError("no such digit"), SystemExit(3), KeyboardInterrupt()])
async def test_what_a_call_raises_is_its_own_result_and_the_next_one_runs(serve: Serve, error: BaseException) -> None:
    def handler(request: Any) -> Any:
        if request.data == "bad":
            raise error
        return request.data

    owner = await serve(handler)
    owner.submit("bad", "good")
    assert (await owner.answers(2))[1] == b"good"
    assert owner.results[0][1].status == 500
    assert not owner.worker.thread.failed.is_set()


async def test_what_is_withdrawn_never_starts(serve: Serve) -> None:
    held = Held()
    owner = await serve(held)
    running, *waiting = owner.submit("a", "b", "c")
    await until(lambda: running.started)
    assert owner.worker.withdraw() == waiting
    held.open.set()
    assert await owner.answers(1) == [b"a"]
    assert held.started == 1


async def test_a_waiting_request_that_is_given_up_is_done_at_once_and_never_starts(serve: Serve) -> None:
    held = Held()
    owner = await serve(held)
    running, waiting = owner.submit("a", "b")
    await until(lambda: running.started)
    owner.worker.give_up(waiting, GIVEN_UP)
    assert owner.results == [(waiting, GIVEN_UP)]
    held.open.set()
    await owner.answers(2)
    assert held.started == 1


async def waits_for_ever(request: Any) -> None:
    await asyncio.Event().wait()


def asks_now_and_then(request: Any) -> str:
    while not cancelled():
        time.sleep(0.001)
    return "late"


@pytest.mark.parametrize("handler", [waits_for_ever, asks_now_and_then])
async def test_a_call_that_is_given_up_is_cancelled_if_it_is_async_and_else_may_ask(serve: Serve, handler: Any) -> None:
    owner = await serve(handler)
    (job,) = owner.submit("a")
    await until(lambda: job.started)
    owner.worker.give_up(job, GIVEN_UP)
    await owner.answers(1)
    assert owner.results[0][0] is job


async def test_a_request_whose_time_is_spent_before_it_starts_is_told_so(serve: Serve) -> None:
    def ran(request: Any) -> None: ...

    owner = await serve(ran)
    owner.submit("a", deadline=time.monotonic() - 1)
    await owner.answers(1)
    assert owner.results[0][1].status == 504


@pytest.mark.parametrize("is_async", [False, True])
async def test_what_was_delivered_before_is_marked_before_it_runs(serve: Serve, is_async: bool) -> None:
    def plain(request: Any) -> int:
        return len(owner.marked)

    async def handler(request: Any) -> int:
        return len(owner.marked)

    owner: Owner = await serve(handler if is_async else plain)
    (job,) = owner.submit("a", suspect=True)
    assert await owner.answers(1) == [b"1"]
    assert owner.marked == [job]


async def test_a_call_that_follows_a_suspect_waits_for_it_too(serve: Serve) -> None:
    """It may kill the replica while the result of the suspect is on its way."""
    owner: Owner = await serve(lambda request: owner.told)
    owner.submit("a", suspect=True)
    owner.submit("b", "c")
    assert await owner.answers(3) == [b"1", b"2", b"2"]


async def test_a_worker_tells_for_how_long_no_call_could_start(serve: Serve) -> None:
    held = Held()
    owner: Owner = await serve(held)
    assert owner.worker.blocked_s == 0
    owner.submit("a", "b")
    await until(lambda: owner.worker.blocked_s > 0.03)
    assert owner.worker.waiting == 1
    held.open.set()
    await owner.answers(2)
    await until(lambda: owner.worker.blocked_s == 0)


async def test_what_construction_raises_comes_to_whoever_asked_for_it(serve: Serve) -> None:
    class Model:
        def __init__(self) -> None:
            raise SystemExit("no weights")

        def __call__(self, request: Any) -> None: ...

    with pytest.raises(Raised, match="no weights"):
        await serve(Model)


async def test_a_task_that_a_handler_left_behind_and_that_exits_fails_the_worker_and_what_runs_is_still_answered(serve: Serve) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    tasks: list[asyncio.Task[None]] = []

    async def handler(request: Any) -> Any:
        tasks.append(asyncio.get_running_loop().create_task(leave()))
        await asyncio.sleep(0.05)
        return request.data

    owner = await serve(handler)
    owner.submit("a")
    assert await owner.answers(1) == [b"a"]
    await until(owner.worker.thread.failed.is_set)
    with pytest.raises(BackendFailed, match="user code ended its replica"):
        owner.worker.thread.check()


async def test_more_threads_are_there_for_what_waits_already(serve: Serve) -> None:
    held = Held()
    owner = await serve(held, sync_threads=1)
    owner.submit("a")
    await until(lambda: held.started == 1)
    held.open.set()
    await owner.answers(1)
    held.open.clear()
    owner.worker.configure(BackendConfig(sync_threads=2))
    owner.submit("b", "c")
    await until(lambda: held.started == 3)
    held.open.set()
    assert sorted(await owner.answers(3)) == [b"a", b"b", b"c"]
