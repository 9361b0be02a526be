"""Python callers, in both forms: handles and futures."""

import asyncio
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until


@dataclass
class Picture:
    name: str
    pixels: Any


class OddDigit(Exception):
    """An exception of the user's own."""

    def __init__(self, digit: int) -> None:
        super().__init__(f"{digit} is odd")
        self.digit = digit


class Unopenable(Exception):
    """One that pickles and does not unpickle: its constructor wants more than `args` holds."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class Tools:
    """A class with public methods."""

    def __call__(self, request: serve.ServeRequest) -> Any:
        return request.data

    def inspect(self, request: serve.ServeRequest) -> dict[str, Any]:
        return {
            "method": request.method,
            "color": request.headers.get("X-Color"),
            "query": dict(request.query_params),
            "data": request.data,
        }

    def append(self, request: serve.ServeRequest) -> list[int]:
        request.data.append(4)
        return list(request.data)

    def fail(self, request: serve.ServeRequest) -> None:
        raise OddDigit(request.data)

    def fail_unopenable(self, request: serve.ServeRequest) -> None:
        raise Unopenable("first", "second")

    async def double(self, request: serve.ServeRequest) -> Any:
        await asyncio.sleep(0)
        return request.data * 2


@pytest.fixture(scope="module")
def tools(client: serve.Client) -> Iterator[str]:
    """The endpoint of a Tools."""
    deploy = Deploy(client)
    yield deploy(Tools)
    deploy.undo()


def test_a_handle_gets_the_handlers_value(tools: str) -> None:
    handle = serve.get_handle(tools)
    assert serve.get(handle.remote({"a": [1, 2.5, None, b"\x00"]}), timeout=30) == {"a": [1, 2.5, None, b"\x00"]}


def test_an_async_handle_is_awaited_twice(tools: str) -> None:
    async def main() -> Any:
        handle = serve.get_handle(tools, sync=False)
        return await (await handle.remote(21))

    assert asyncio.run(main()) == 21


def test_an_async_handle_has_many_requests_under_way(tools: str) -> None:
    async def main() -> list[int]:
        handle = serve.get_handle(tools, sync=False).options(method_name="double")
        return await asyncio.gather(*[await handle.remote(number) for number in range(100)])

    assert asyncio.run(main()) == [2 * number for number in range(100)]


def test_keyword_arguments_arrive_as_the_query(tools: str) -> None:
    handle = serve.get_handle(tools).options(method_name="inspect")
    assert serve.get(handle.remote("x", size=7, sure=True), timeout=30) == {
        "method": "GET",
        "color": None,
        "query": {"size": 7, "sure": True},
        "data": "x",
    }


def test_options_make_another_handle_and_leave_the_first_as_it_is(tools: str) -> None:
    plain = serve.get_handle(tools)
    inspecting = plain.options(method_name="inspect", http_method="POST")
    colored = inspecting.options(http_headers={"X-Color": "blue"})
    assert serve.get(plain.remote(1), timeout=30) == 1
    assert serve.get(inspecting.remote(1), timeout=30) == {"method": "POST", "color": None, "query": {}, "data": 1}
    assert serve.get(colored.remote(1), timeout=30) == {"method": "POST", "color": "blue", "query": {}, "data": 1}


def test_an_unknown_option_is_refused_by_name(tools: str) -> None:
    with pytest.raises(TypeError, match="no option colour"):
        serve.get_handle(tools).options(colour="blue")


@pytest.mark.parametrize("method", ["_secret", "reconfigure", "missing"])
def test_a_method_that_is_not_public_cannot_be_called(tools: str, method: str) -> None:
    with pytest.raises(serve.MQServeError, match=method):
        serve.get_handle(tools).options(method_name=method).remote().result(timeout=30)


def test_any_object_travels_both_ways(tools: str) -> None:
    handle = serve.get_handle(tools)
    picture = handle.remote(Picture("seven", np.arange(4, dtype=np.float32))).result(timeout=30)
    assert isinstance(picture, Picture) and picture.name == "seven"
    assert picture.pixels.dtype == np.float32 and picture.pixels.tolist() == [0, 1, 2, 3]
    assert handle.remote((1, {2: {3}})).result(timeout=30) == (1, {2: {3}})


class OpensNothing:
    """Leaves a mark where its pickle is opened."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


class ExceptionThatOpens(Exception):
    """One whose pickle leaves a mark."""

    def __init__(self, mark: Path) -> None:
        super().__init__("on purpose")
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


class Traps:
    def __call__(self, request: serve.ServeRequest) -> Any:
        return request.data if request.data != "object" else OpensNothing(Path(request.query_params["mark"]))

    def fail(self, request: serve.ServeRequest) -> None:
        raise ExceptionThatOpens(Path(request.query_params["mark"]))


@pytest.fixture(scope="module")
def traps(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(Traps)
    deploy.undo()


def test_a_caller_of_plain_results_opens_no_pickle(traps: str, tmp_path: Path) -> None:
    mark = tmp_path / "opened"
    handle = serve.get_handle(traps).options(results="plain")
    assert handle.remote({"a": [1, b"x", None]}).result(timeout=30) == {"a": [1, b"x", None]}
    with pytest.raises(serve.NotEncodable, match=f"backend '{traps}'.*travels as a pickle.*results='plain'"):
        handle.remote("object", mark=str(mark)).result(timeout=30)
    with pytest.raises(serve.RemoteError, match="ExceptionThatOpens: on purpose") as failure:
        handle.options(method_name="fail").remote(mark=str(mark)).result(timeout=30)
    assert any("Remote traceback" in note for note in failure.value.__notes__)
    assert not mark.exists()
    serve.get_handle(traps).remote("object", mark=str(mark)).result(timeout=30)
    assert mark.exists(), "anybody else opens it"


def test_plain_results_hold_for_awaiting_for_arguments_and_for_copies_of_the_handle(traps: str, tmp_path: Path) -> None:
    mark = tmp_path / "opened"
    handle = pickle.loads(pickle.dumps(serve.get_handle(traps, sync=False).options(results="plain")))

    async def ask() -> Any:
        return await (await handle.remote("object", mark=str(mark)))

    with pytest.raises(serve.NotEncodable):
        asyncio.run(ask())
    plain = serve.get_handle(traps).options(results="plain")
    with pytest.raises(serve.NotEncodable):
        serve.get_handle(traps).remote(plain.remote("object", mark=str(mark))).result(timeout=30)
    assert not mark.exists()


def test_another_kind_of_results_is_refused(traps: str) -> None:
    with pytest.raises(ValueError, match="'any', or 'plain'"):
        serve.get_handle(traps).options(results="pickle")
    with pytest.raises(ValueError, match="'any', or 'plain'"):
        serve.connect(results="pickle")  # type: ignore[arg-type]


@distributed_only
def test_a_client_of_plain_results_opens_no_pickle(traps: str, environment: dict[str, str], tmp_path: Path) -> None:
    mark = tmp_path / "opened"
    ref = serve.get_handle(traps).remote("object", mark=str(mark))
    script = f"""
import mqserve as serve
serve.connect(results="plain")
handle = serve.get_handle({traps!r}).options(results="any")
for ask in (lambda: handle.remote("object", mark={str(mark)!r}), lambda: serve.future({ref.id!r})):
    try:
        ask().result(timeout=30)
    except serve.NotEncodable:
        print("not opened")
print(serve.get_handle({traps!r}).remote(1).result(timeout=30))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "not opened\nnot opened\n1\n", done.stderr
    assert not mark.exists()


def test_a_large_object_travels_both_ways(tools: str) -> None:
    array = np.arange(400_000, dtype=np.float64)
    assert np.array_equal(serve.get_handle(tools).remote(array).result(timeout=30), array)


def test_a_handler_cannot_change_its_callers_object(tools: str) -> None:
    numbers = [1, 2, 3]
    assert serve.get_handle(tools).options(method_name="append").remote(numbers).result(timeout=30) == [1, 2, 3, 4]
    assert numbers == [1, 2, 3]


def test_a_users_exception_arrives_as_itself_with_the_remote_traceback(tools: str) -> None:
    with pytest.raises(OddDigit, match="7 is odd") as caught:
        serve.get_handle(tools).options(method_name="fail").remote(7).result(timeout=30)
    notes = "\n".join(caught.value.__notes__)
    assert "Remote traceback" in notes and "raise OddDigit(request.data)" in notes


def test_an_exception_that_does_not_unpickle_arrives_as_a_remote_error(tools: str) -> None:
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Unopenable("first", "second")))
    with pytest.raises(serve.RemoteError, match="Unopenable: first") as caught:
        serve.get_handle(tools).options(method_name="fail_unopenable").remote().result(timeout=30)
    assert "Remote traceback" in "\n".join(caught.value.__notes__)


def test_an_awaited_exception_arrives_as_itself_too(tools: str) -> None:
    async def main() -> None:
        await (await serve.get_handle(tools, sync=False).options(method_name="fail").remote(7))

    with pytest.raises(OddDigit, match="7 is odd"):
        asyncio.run(main())


def test_what_cannot_be_pickled_is_refused_where_it_is_sent(tools: str) -> None:
    with pytest.raises(serve.NotEncodable, match="generator"):
        serve.get_handle(tools).remote(number for number in range(3))


def test_get_takes_several_futures_and_gives_their_values_in_order(tools: str) -> None:
    handle = serve.get_handle(tools)
    assert serve.get([handle.remote(number) for number in range(20)], timeout=30) == list(range(20))


def test_wait_returns_those_that_are_done(deploy: Deploy, tools: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.ServeRequest) -> str:
        gate.pass_through()
        return "passed"

    slow = serve.get_handle(deploy(wait)).remote()
    quick = serve.get_handle(tools).remote(1)
    assert serve.wait([slow, quick], timeout=30) == ([quick], [slow])
    assert serve.wait([slow], timeout=0.05) == ([], [slow])
    assert not slow.done()
    with pytest.raises(TimeoutError, match="no result yet"):
        slow.result(timeout=0.05)
    gate.open()
    assert serve.wait([slow, quick], num_returns=2, timeout=30) == ([slow, quick], [])
    assert slow.result(timeout=30) == "passed"


def test_a_cancelled_future_says_so(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.ServeRequest) -> None:
        gate.pass_through()

    ref = serve.get_handle(deploy(wait)).remote()
    assert ref.cancel() and ref.done()
    with pytest.raises(serve.MQServeError, match="cancelled"):
        ref.result(timeout=30)
    gate.open()


def test_a_future_is_read_again_by_its_id(tools: str) -> None:
    ref = serve.get_handle(tools).remote([1, 2])
    assert serve.future(ref.id).result(timeout=30) == [1, 2] == ref.result(timeout=30)


def test_a_late_request_raises_a_timeout_that_says_where(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.ServeRequest) -> None:
        gate.pass_through()

    handle = serve.get_handle(deploy(wait, request_timeout_s=1.5))
    running = handle.remote()
    wait_until(lambda: gate.came == 1)
    waiting = handle.remote()
    with pytest.raises(TimeoutError, match=r"\(run\)"):
        running.result(timeout=30)
    with pytest.raises(serve.RequestTimeout, match=r"\(queue\)"):
        waiting.result(timeout=30)
    gate.open()


def test_an_unknown_endpoint_is_a_key_error_with_a_sentence(client: serve.Client) -> None:
    with pytest.raises(KeyError) as caught:
        serve.get_handle("nobody")
    assert str(caught.value) == "Endpoint 'nobody' does not exist."
    [note] = caught.value.__notes__
    assert note.startswith("Known: ") and note.endswith(". Deploy it first.")


def test_a_missing_endpoint_may_be_made_later(client: serve.Client, tools: str) -> None:
    name = f"later-{uuid.uuid4().hex[:8]}"
    handle = serve.get_handle(name, missing_ok=True)
    early = handle.remote(0)  # waits for its endpoint
    client.create_endpoint(name, backend=tools)
    assert early.result(timeout=30) == 0
    assert handle.remote(1).result(timeout=30) == 1
    client.delete_endpoint(name)


READ_FUTURE = """
import sys, mqserve as serve
print(serve.future(sys.argv[1]).result(timeout=30))
"""


@distributed_only
def test_another_process_reads_a_future_by_its_id(
    deploy: Deploy, tmp_path: Path, client: serve.Client, environment: dict[str, str]
) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.ServeRequest) -> list[object]:
        gate.pass_through()
        return [request.data, "passed"]

    ref = serve.get_handle(deploy(wait)).remote("x")
    command = [sys.executable, "-c", READ_FUTURE, ref.id]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        wait_until(lambda: gate.came == 1)
        gate.open()
        assert other.communicate(timeout=60)[0] == "['x', 'passed']\n"
