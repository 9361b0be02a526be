"""Many requests at once, in both forms: `handle.map`, `serve.as_completed` and `serve.gather`."""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally


async def double(request: serve.ServeRequest) -> Any:
    if request.data == "odd":
        raise ValueError("that is odd")
    return request.data * 2


@pytest.fixture(scope="module")
def doubling(client: serve.Client) -> Iterator[str]:
    deploy = Deploy(client)
    yield deploy(double)
    deploy.undo()


@pytest.mark.parametrize("in_flight", [1, 7, 1000])
def test_map_yields_the_values_in_the_order_of_the_items(doubling: str, in_flight: int) -> None:
    handle = serve.get_handle(doubling)
    assert list(handle.map(range(200), in_flight=in_flight)) == [2 * number for number in range(200)]


def test_map_without_an_order_yields_what_comes_first(deploy: Deploy, gate: Gate) -> None:
    async def wait_for_the_gate(request: serve.ServeRequest) -> int:
        if request.data == 0:
            await gate.pass_through_async()
        return int(request.data)

    values = serve.get_handle(deploy(wait_for_the_gate)).map(range(5), ordered=False)
    first = [next(values) for _ in range(4)]
    gate.open()
    assert sorted(first) == [1, 2, 3, 4] and list(values) == [0]


def test_map_in_a_coroutine_yields_the_same(doubling: str) -> None:
    async def main() -> list[list[int]]:
        handle = serve.get_handle(doubling, sync=False)
        return [
            [value async for value in handle.map(range(50), in_flight=8)],
            sorted([value async for value in handle.map(range(50), ordered=False, in_flight=8)]),
        ]

    assert asyncio.run(main()) == [[2 * number for number in range(50)]] * 2


def test_map_sends_no_more_than_it_may(deploy: Deploy, tally: Tally) -> None:
    def note(request: serve.ServeRequest) -> Any:
        tally.note("ran")
        return request.data

    values = serve.get_handle(deploy(note)).map(itertools.count(), in_flight=3)
    assert list(itertools.islice(values, 10)) == list(range(10))
    values.close()
    assert len(tally) <= 12


def test_the_first_error_of_map_ends_the_rest(deploy: Deploy, tally: Tally) -> None:
    async def fail_once(request: serve.ServeRequest) -> Any:
        if request.data == 0:
            while len(tally) < 3:
                await asyncio.sleep(0.01)
            raise ValueError("that is odd")
        tally.note("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            tally.note("cancelled")
            raise

    values = serve.get_handle(deploy(fail_once)).map(range(4))
    with pytest.raises(ValueError, match="odd"):
        next(values)
    wait_until(lambda: tally.lines.count("cancelled") == 3)


def test_leaving_map_cancels_what_is_under_way(deploy: Deploy, tally: Tally) -> None:
    async def hold(request: serve.ServeRequest) -> Any:
        if request.data == 0:
            return 0
        tally.note("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            tally.note("cancelled")
            raise

    values = serve.get_handle(deploy(hold)).map([0, 1])
    assert next(values) == 0
    wait_until(lambda: tally.lines == ["began"])
    values.close()
    wait_until(lambda: tally.lines == ["began", "cancelled"])


def test_a_bar_is_shown_where_it_is_asked_for_and_not_in_a_pipe(doubling: str, capfd: pytest.CaptureFixture[str]) -> None:
    handle = serve.get_handle(doubling)
    assert list(handle.map(range(3))) == [0, 2, 4]
    assert capfd.readouterr().err == ""
    assert list(handle.map(range(3), progress=True)) == [0, 2, 4]
    assert "3/3" in capfd.readouterr().err
    assert not sys.stderr.isatty()


@pytest.mark.parametrize("arguments", [{"in_flight": 0}, {"in_flight": 1.5}, {"in_flight": "many"}])
def test_a_number_in_flight_that_makes_no_sense_is_refused_before_anything_is_sent(doubling: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(serve.BadValue, match="in_flight"):
        serve.get_handle(doubling).map([1], **arguments)


def test_map_refuses_what_is_no_series_of_items(doubling: str) -> None:
    with pytest.raises(serve.BadType, match="iterate"):
        serve.get_handle(doubling).map(7)  # type: ignore[arg-type]


def test_as_completed_yields_futures_as_they_get_done(deploy: Deploy, gate: Gate) -> None:
    async def wait_for_the_gate(request: serve.ServeRequest) -> str:
        if request.data == "slow":
            await gate.pass_through_async()
        return str(request.data)

    handle = serve.get_handle(deploy(wait_for_the_gate))
    slow, quick = handle.remote("slow"), handle.remote("quick")
    completed = iter(serve.as_completed([slow, quick]))
    assert next(completed) is quick
    gate.open()
    assert next(completed) is slow
    assert next(completed, None) is None


def test_as_completed_takes_futures_of_any_process_and_coroutines_too(doubling: str) -> None:
    refs = [serve.get_handle(doubling).remote(number) for number in range(5)]

    async def values() -> list[int]:
        return [ref.result() async for ref in serve.as_completed([serve.future(ref.id) for ref in refs])]

    assert sorted(asyncio.run(values())) == [0, 2, 4, 6, 8]


def test_as_completed_does_not_wait_longer_than_it_is_told(doubling: str) -> None:
    with pytest.raises(TimeoutError, match="1 of the futures"):
        list(serve.as_completed([serve.get_handle(doubling).remote(1), serve.future("0" * 32)], timeout=0.5))


def test_gather_returns_the_values_in_their_order(doubling: str) -> None:
    refs = [serve.get_handle(doubling).remote(number) for number in range(5)]

    async def main() -> Any:
        return await serve.gather(*refs)

    assert serve.gather(*refs).result(timeout=30) == asyncio.run(main()) == [0, 2, 4, 6, 8]
    assert serve.gather().result() == []


def test_gather_without_time_returns_what_is_there(doubling: str) -> None:
    handle = serve.get_handle(doubling)
    refs = [handle.submit(1), handle.remote(2)]
    assert serve.gather(*refs).result(timeout=30) == [2, 4]
    found = serve.job(refs[0].id), serve.future(refs[1].id)  # whose results have to be read from the store
    assert serve.gather(*found).result(timeout=0) == [2, 4]
    with pytest.raises(TimeoutError):
        serve.gather(found[0], serve.future("0" * 32)).result(timeout=0)


def test_gather_raises_the_first_error_or_returns_it_in_its_place(doubling: str) -> None:
    handle = serve.get_handle(doubling)
    refs = [handle.remote(1), handle.remote("odd"), handle.remote(2)]
    with pytest.raises(ValueError, match="that is odd"):
        serve.gather(*refs).result(timeout=30)
    one, error, two = serve.gather(*refs, return_exceptions=True).result(timeout=30)
    assert (one, str(error), two) == (2, "that is odd", 4)


def test_gather_raises_an_error_while_others_are_under_way(deploy: Deploy) -> None:
    async def hold_or_fail(request: serve.ServeRequest) -> Any:
        if request.data:
            raise ValueError("that is odd")
        await asyncio.Event().wait()

    handle = serve.get_handle(deploy(hold_or_fail))
    gathered = serve.gather(handle.remote(0), handle.remote(1))
    with pytest.raises(ValueError, match="odd"):
        gathered.result(timeout=30)
    assert not gathered.done()
    gathered.cancel()
    assert wait_until(gathered.done)


@pytest.mark.parametrize("name", ["as_completed", "gather"])
def test_what_is_no_future_is_refused_in_one_sentence(client: serve.Client, name: str) -> None:
    arguments: list[Any] = {"as_completed": [[1]], "gather": [1]}[name]  # type: ignore[assignment]
    with pytest.raises(serve.BadType, match="futures and jobs"):
        getattr(serve, name)(*arguments)
