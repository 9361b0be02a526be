"""What user code may do without harm to what is around it: leave, run loops of its own, set context variables. In both forms."""

import asyncio
import decimal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests import imported
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally

Request = Any


def leaves(error: type[BaseException], *words: str) -> Callable[..., None]:
    def leave(self: Any, *arguments: Any) -> None:
        raise error(*words)

    return leave


# Leaving: sys.exit() and its kin.

LEAVING = [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, asyncio.CancelledError]


@pytest.mark.parametrize("error", LEAVING)
def test_a_constructor_that_leaves_fails_its_backend_with_its_words(
    client: serve.Client, deploy: Deploy, error: type[BaseException]
) -> None:
    fine = client.get_handle(deploy(lambda request: "fine"))
    with pytest.raises(serve.BackendFailed, match="no weights"):
        client.create_backend(new_name("b"), type("Leaves", (), {"__init__": leaves(error, "no weights"), "__call__": leaves(error)}))
    assert fine.remote().result(30) == "fine"


@pytest.mark.parametrize("error", [SystemExit, StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_reconfigure_that_leaves_is_refused_with_its_words(
    client: serve.Client, deploy: Deploy, error: type[BaseException], is_async: bool
) -> None:
    class Picky:
        config: Any

        def __call__(self, request: Request) -> Any:
            return self.config

    def reconfigure(self: Any, config: Any) -> None:
        if config == "bad":
            raise error("not that one")
        self.config = config

    async def reconfigure_later(self: Any, config: Any) -> None:
        await asyncio.sleep(0)
        reconfigure(self, config)

    Picky.reconfigure = reconfigure_later if is_async else reconfigure  # type: ignore[attr-defined]
    name = deploy(Picky, user_config="good")
    with pytest.raises(serve.BackendFailed, match=r"not that one|StopIteration"):
        client.update_backend_config(name, {"user_config": "bad"})
    assert client.get_handle(name).remote().result(30) == "good"


def test_a_health_check_that_leaves_replaces_its_replica(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    made = Tally(tmp_path)

    class Ill:
        def __init__(self) -> None:
            made.note()
            self.is_ill = len(made) == 1

        def check_health(self) -> None:
            if self.is_ill:
                sys.exit("I do not feel well")

        def __call__(self, request: Request) -> int:
            return len(made)

    handle = client.get_handle(deploy(Ill, health_check_period_s=0.1))
    wait_until(lambda: len(made) == 2)
    assert handle.remote().result(30) == 2


def test_a_task_that_leaves_replaces_its_replica(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    made = Tally(tmp_path)
    tasks: set[Any] = set()

    class Leaving:
        def __init__(self) -> None:
            made.note()

        async def __call__(self, request: Request) -> int:
            async def leave() -> None:
                sys.exit("out of memory")

            if request.data == "leave":
                tasks.add(asyncio.get_running_loop().create_task(leave()))
                await asyncio.sleep(0.01)
            return len(made)

    handle = client.get_handle(deploy(Leaving))
    assert handle.remote("leave").result(30) == 1  # what runs beside it is answered
    wait_until(lambda: len(made) == 2)
    assert handle.remote().result(30) == 2


def test_a_loop_that_is_stopped_goes_on(client: serve.Client, deploy: Deploy) -> None:
    async def stop(request: Request) -> str:
        if request.data == "stop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
        return "fine"

    handle = client.get_handle(deploy(stop))
    assert serve.get([handle.remote(data) for data in ("stop", "go on", "stop", "go on")], timeout=30) == ["fine"] * 4


def test_a_gathered_batch_that_leaves_fails_its_members(client: serve.Client, deploy: Deploy) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0.05)
    async def together(items: list[str]) -> list[str]:
        if "leave" in items:
            sys.exit("all of us")
        return items

    async def handler(request: Request) -> Any:
        return await together(request.data)

    handle = client.get_handle(deploy(handler))
    for ref in [handle.remote("leave"), handle.remote("leave")]:
        with pytest.raises(serve.RemoteError, match="all of us"):
            ref.result(30)
    assert handle.remote("stay").result(30) == "stay"


@pytest.mark.parametrize("error", [*LEAVING, StopAsyncIteration])
def test_what_would_end_the_caller_arrives_as_a_remote_error(client: serve.Client, deploy: Deploy, error: type[BaseException]) -> None:
    def leave(request: Request) -> None:
        raise error("over there")

    name = deploy(leave)
    with pytest.raises(serve.RemoteError, match="over there"):
        client.get_handle(name).remote().result(30)

    async def caller() -> bool:
        async def work() -> None:
            await (await client.get_handle(name, sync=False).remote())

        (task,), _ = await asyncio.wait([asyncio.create_task(work())])
        return not task.cancelled() and isinstance(task.exception(), serve.RemoteError)

    assert asyncio.run(caller())


def test_a_handler_that_cancels_its_own_task_is_answered(client: serve.Client, deploy: Deploy) -> None:
    async def cancels(request: Request) -> str:
        if request.data == "cancel":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(60)
        return "fine"

    handle = client.get_handle(deploy(cancels))
    with pytest.raises(serve.RemoteError, match="CancelledError"):
        handle.remote("cancel").result(30)
    assert handle.remote("go on").result(30) == "fine"


# Loops of its own.


async def fetch() -> int:
    await asyncio.sleep(0)
    return 3


def runs_a_loop(request: Request) -> int:
    return asyncio.run(fetch())


class RunsLoops:
    """Wherever plain code of a class runs."""

    def __init__(self) -> None:
        self.seen = [asyncio.run(fetch())]

    def reconfigure(self, config: Any) -> None:
        self.seen.append(asyncio.run(fetch()))

    def check_health(self) -> None:
        self.seen.append(asyncio.run(fetch()))

    def __call__(self, request: Request) -> list[int]:
        return [*self.seen, asyncio.run(fetch())]


@serve.accept_batch
def runs_a_loop_for_a_batch(requests: list[Request]) -> list[int]:
    return [asyncio.run(fetch())] * len(requests)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", [runs_a_loop, runs_a_loop_for_a_batch])
def test_plain_code_may_run_a_loop(client: serve.Client, deploy: Deploy, target: Any, threads: int) -> None:
    handle = client.get_handle(deploy(target, sync_threads=threads))
    assert serve.get([handle.remote() for _ in range(4)], timeout=30) == [3] * 4


def test_construction_and_the_hooks_may_run_a_loop(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(RunsLoops, user_config="any"))
    assert set(handle.remote().result(30)) == {3}


def test_plain_code_has_no_loop_around_it_and_async_code_has_one(client: serve.Client, deploy: Deploy) -> None:
    def around_plain(request: Request) -> str:
        try:
            return type(asyncio.get_running_loop()).__name__
        except RuntimeError:
            return "none"

    async def around_async(request: Request) -> str:
        return "running" if asyncio.get_running_loop().is_running() else "none"

    assert client.get_handle(deploy(around_plain)).remote().result(30) == "none"
    assert client.get_handle(deploy(around_async)).remote().result(30) == "running"


def test_one_thread_constructs_and_runs_all_plain_calls(client: serve.Client, deploy: Deploy) -> None:
    class Affine:
        def __init__(self) -> None:
            self.thread = threading.get_ident()

        def __call__(self, request: Request) -> bool:
            return threading.get_ident() == self.thread

        async def later(self, request: Request) -> bool:
            return threading.get_ident() == self.thread

    handle = client.get_handle(deploy(Affine))
    assert all(serve.get([handle.remote() for _ in range(8)], timeout=30))
    assert handle.options(method_name="later").remote().result(30)


# Context variables.


def sets_plainly(request: Request) -> str:
    before = imported.COLOR.get()
    imported.COLOR.set(request.data)
    return before


async def sets_later(request: Request) -> str:
    before = imported.COLOR.get()
    imported.COLOR.set(request.data)
    await asyncio.sleep(0)
    return before


@serve.accept_batch
def sets_in_batches(requests: list[Request]) -> list[str]:
    return [sets_plainly(request) for request in requests]


@pytest.mark.parametrize("target, threads", [(sets_plainly, 1), (sets_plainly, 2), (sets_later, 1), (sets_in_batches, 1)])
def test_what_one_request_sets_the_next_does_not_see(client: serve.Client, deploy: Deploy, target: Any, threads: int) -> None:
    handle = client.get_handle(deploy(target, sync_threads=threads))
    assert serve.get([handle.remote("red") for _ in range(8)], timeout=30) == ["none"] * 8
    assert [handle.remote("blue").result(30) for _ in range(4)] == ["none"] * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_what_construction_sets_every_request_sees(client: serve.Client, deploy: Deploy, threads: int) -> None:
    class Painted:
        def __init__(self) -> None:
            imported.COLOR.set("green")
            decimal.getcontext().prec = 5

        def reconfigure(self, config: str) -> None:
            imported.COLOR.set(config)

        def __call__(self, request: Request) -> list[Any]:
            found = [imported.COLOR.get(), decimal.getcontext().prec]
            imported.COLOR.set("red")
            decimal.getcontext().prec = 50
            return found

        async def later(self, request: Request) -> list[Any]:
            return self(request)

    name = deploy(Painted, sync_threads=threads)
    handle = client.get_handle(name)
    assert serve.get([handle.remote() for _ in range(6)], timeout=30) == [["green", 5]] * 6
    assert serve.get([handle.options(method_name="later").remote() for _ in range(6)], timeout=30) == [["green", 5]] * 6
    client.update_backend_config(name, {"user_config": "yellow"})
    assert serve.get([handle.remote() for _ in range(6)], timeout=30) == [["yellow", 5]] * 6


def test_a_decimal_context_that_a_request_changes_is_its_own(client: serve.Client, deploy: Deploy) -> None:
    def precise(request: Request) -> int:
        before = decimal.getcontext().prec
        decimal.getcontext().prec = request.data
        return before

    handle = client.get_handle(deploy(precise))
    assert [handle.remote(40 + number).result(30) for number in range(4)] == [28] * 4


# Handlers without a parameter.


class Parameterless:
    def __call__(self) -> str:
        return "called"

    def other(self, request: Request = "nothing") -> Any:
        return request if isinstance(request, str) else "the request"

    async def later(self) -> str:
        return "called later"


def parameterless() -> str:
    return "called"


async def parameterless_later() -> str:
    return "called"


@pytest.mark.parametrize("target", [parameterless, parameterless_later, Parameterless])
def test_a_handler_without_a_parameter_is_called_without_one(client: serve.Client, deploy: Deploy, target: Any) -> None:
    handle = client.get_handle(deploy(target))
    assert handle.remote().result(30) == "called"
    for arguments, named in ((("something",), {}), ((), {"key": 1})):
        with pytest.raises(TypeError, match="no parameter for a request"):
            handle.remote(*arguments, **named).result(30)
    assert handle.remote().result(30) == "called"


def test_each_method_is_asked_for_its_own_parameters(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(Parameterless))
    assert handle.options(method_name="later").remote().result(30) == "called later"
    assert handle.options(method_name="other").remote("data").result(30) == "the request"


def test_a_handler_whose_signature_cannot_be_read_gets_the_request(client: serve.Client, deploy: Deploy) -> None:
    class Unreadable:
        __signature__ = "none"

        def __call__(self, *arguments: Any) -> int:
            return len(arguments)

    assert client.get_handle(deploy(Unreadable)).remote(1).result(30) == 1


def test_a_batch_handler_without_a_parameter_is_refused(client: serve.Client) -> None:
    @serve.accept_batch
    def nothing() -> list[str]:
        return []

    with pytest.raises(ValueError, match="list of requests"):
        client.create_backend(new_name("b"), nothing)


def test_a_handler_that_needs_more_than_the_request_is_refused(client: serve.Client) -> None:
    def needy(request: Request, database: Any) -> None:
        pass

    with pytest.raises(ValueError, match="give the other parameters defaults"):
        client.create_backend(new_name("b"), needy)


def test_a_class_whose_call_needs_more_than_the_request_is_refused(client: serve.Client) -> None:
    class Needy:
        def __call__(self, request: Request, database: Any) -> None:
            pass

    with pytest.raises(serve.BackendFailed, match="give the other parameters defaults"):
        client.create_backend(new_name("b"), Needy)


def test_data_is_a_keyword_like_any_other(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(lambda request: [request.data, dict(request.query_params)]))
    assert handle.remote(1, data=2).result(30) == [1, {"data": 2}]
    assert handle.remote(data=2).result(30) == [None, {"data": 2}]


@serve.accept_batch
class TakesBatches:
    """No `__call__`: its methods take batches."""

    def double(self, requests: list[Request]) -> list[int]:
        return [request.data * 2 for request in requests]

    async def triple(self, requests: list[Request]) -> list[int]:
        return [request.data * 3 for request in requests]


def test_accept_batch_on_a_class_without_call_marks_its_methods(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(TakesBatches, max_batch_size=4, batch_wait_timeout=0.01))
    for method, factor in (("double", 2), ("triple", 3)):
        refs = [handle.options(method_name=method).remote(number) for number in range(6)]
        assert serve.get(refs, timeout=30) == [number * factor for number in range(6)]


def test_whole_floats_are_whole_numbers(client: serve.Client, deploy: Deploy) -> None:
    @serve.batch(max_batch_size=4.0)  # type: ignore[call-overload,untyped-decorator]
    async def together(items: list[int]) -> list[int]:
        return items

    async def handler(request: Request) -> Any:
        return await together(request.data)

    name = deploy(handler, num_replicas=1.0, max_concurrent_queries=2.0)
    assert client.get_handle(name).remote(1).result(30) == 1
    assert client.get_backend_config(name).max_concurrent_queries == 2
