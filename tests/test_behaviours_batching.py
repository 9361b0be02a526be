"""Handlers that take lists, and methods of single items that gather them; in both forms."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally

Requests = list[serve.ServeRequest]


def sizes(tally: Tally) -> list[int]:
    return [int(line) for line in tally.lines]


def held(client: serve.Client, name: str, gate: Gate, values: list[int]) -> list[serve.Future]:
    """One request that holds the replica's only thread at `gate`, then these, which come together once it is opened."""
    handle = client.get_handle(name)
    first = handle.remote("hold")
    wait_until(lambda: gate.came == 1)
    return [first, *(handle.remote(value) for value in values)]


# accept_batch: on what.


def on_a_function() -> Any:
    @serve.accept_batch
    def double(requests: Requests) -> list[int]:
        return [request.data * 2 for request in requests]

    return double


def on_an_async_function() -> Any:
    @serve.accept_batch
    async def double(requests: Requests) -> list[int]:
        await asyncio.sleep(0)
        return [request.data * 2 for request in requests]

    return double


def on_a_method() -> Any:
    class Doubler:
        @serve.accept_batch
        def __call__(self, requests: Requests) -> list[int]:
            return [request.data * 2 for request in requests]

    return Doubler


def on_a_class() -> Any:
    @serve.accept_batch
    class Doubler:
        def __call__(self, requests: Requests) -> list[int]:
            return [request.data * 2 for request in requests]

    return Doubler


@pytest.mark.parametrize("make", [on_a_function, on_an_async_function, on_a_method, on_a_class])
def test_accept_batch_marks(client: serve.Client, deploy: Deploy, make: Callable[[], Any]) -> None:
    handle = client.get_handle(deploy(make(), max_batch_size=4, batch_wait_timeout=0.01))
    assert serve.get([handle.remote(number) for number in range(10)], timeout=30) == [number * 2 for number in range(10)]


def test_without_a_batch_size_lists_have_one_request(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        tally.note(len(requests))
        return [len(requests)] * len(requests)

    handle = client.get_handle(deploy(count))
    assert serve.get([handle.remote() for _ in range(10)], timeout=30) == [1] * 10
    assert sizes(tally) == [1] * 10


def test_a_batch_size_without_accept_batch_is_refused(client: serve.Client) -> None:
    name = new_name("b")
    with pytest.raises(ValueError, match="accept_batch"):
        client.create_backend(name, lambda request: request.data, config={"max_batch_size": 2})
    assert name not in client.list_backends()


def test_a_batch_serves_http_too(deploy: Deploy) -> None:
    @serve.accept_batch
    def shout(requests: list[serve.Request]) -> list[str]:
        return [request.query_params["word"].upper() for request in requests]

    assert httpx.get(deploy.at(shout, max_batch_size=3), params={"word": "hello"}).text == "HELLO"


# How batches fill.


def test_three_requests_of_batch_size_two_take_calls_of_two_and_one(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        tally.note(len(requests))
        return [len(requests)] * len(requests)

    handle = client.get_handle(deploy(count, max_batch_size=2, batch_wait_timeout=5.0))
    assert serve.get([handle.remote() for _ in range(3)], timeout=30) == [2, 2, 1]
    assert sizes(tally) == [2, 1]


def test_a_batch_that_does_not_fill_goes_off_when_its_wait_is_over(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        return [len(requests)] * len(requests)

    handle = client.get_handle(deploy(count, max_batch_size=100, batch_wait_timeout=2.0))
    assert serve.get([handle.remote() for _ in range(5)], timeout=30) == [5] * 5


def test_a_full_batch_does_not_wait(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        return [len(requests)] * len(requests)

    handle = client.get_handle(deploy(count, max_batch_size=4, batch_wait_timeout=60.0))
    assert serve.get([handle.remote() for _ in range(8)], timeout=20) == [4] * 8


def test_without_a_wait_a_batch_takes_what_has_queued_up(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate, tally = Gate(tmp_path), Tally(tmp_path)

    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        tally.note(len(requests))
        if requests[0].data == "hold":
            gate.pass_through()
        time.sleep(0.3)  # a call that lasts: those that had not come yet when the gate opened come during the next one
        return [len(requests)] * len(requests)

    refs = held(client, deploy(count, max_batch_size=4), gate, list(range(9)))
    gate.open()
    answers = serve.get(refs, timeout=30)
    assert answers[0] == 1 and sum(sizes(tally)) == 10
    assert max(sizes(tally)) == 4 and len(tally) <= 5, f"9 that waited need few calls: {tally}"


def test_twenty_calls_of_batch_size_five_need_fewer_than_twenty_invocations(client: serve.Client, deploy: Deploy) -> None:
    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        @serve.accept_batch
        def __call__(self, requests: Requests) -> list[int]:
            self.calls += 1
            return [self.calls] * len(requests)

    handle = client.get_handle(deploy(Counter, max_batch_size=5, batch_wait_timeout=1.0))
    calls = serve.get([handle.remote() for _ in range(20)], timeout=30)
    assert max(calls) < 20 and calls == sorted(calls)


def test_batches_are_as_large_whichever_of_two_replicas_takes_them(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    """They fill from one queue, and the prefetch knows the batch."""
    tally = Tally(tmp_path)

    @serve.accept_batch
    def count(requests: Requests) -> list[int]:
        tally.note(len(requests))
        return [len(requests)] * len(requests)

    handle = client.get_handle(deploy(count, num_replicas=2, max_batch_size=5, batch_wait_timeout=5.0))
    assert serve.get([handle.remote() for _ in range(20)], timeout=30) == [5] * 20
    assert sizes(tally) == [5] * 4


def test_one_gathering_is_one_call_for_each_method(client: serve.Client, deploy: Deploy) -> None:
    class Two:
        @serve.accept_batch
        def a(self, requests: Requests) -> list[str]:
            return [f"a-{number}-of-{len(requests)}" for number in range(len(requests))]

        @serve.accept_batch
        def b(self, requests: Requests) -> list[str]:
            return [f"b-{number}-of-{len(requests)}" for number in range(len(requests))]

        @serve.accept_batch
        def __call__(self, requests: Requests) -> list[None]:
            return [None] * len(requests)

    handle = client.get_handle(deploy(Two, max_batch_size=4, batch_wait_timeout=60.0))
    refs = [handle.options(method_name=name).remote() for name in "abab"]
    assert serve.get(refs, timeout=30) == ["a-0-of-2", "b-0-of-2", "a-1-of-2", "b-1-of-2"]


# What comes back.


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda count: [0] * (count + 1), "doesn't preserve batch size"),
        (lambda count: [], "doesn't preserve batch size"),
        (lambda count: 7, "ordered iterable"),
        (lambda count: dict.fromkeys(range(count)), "ordered iterable"),
        (lambda count: set(range(count)), "ordered iterable"),
        (lambda count: "x" * count, "ordered iterable"),
        (lambda count: None, "ordered iterable"),
    ],
    ids=["too-many", "too-few", "int", "dict", "set", "str", "None"],
)
def test_a_batch_result_that_does_not_fit_is_told_to_every_member(
    client: serve.Client, deploy: Deploy, answer: Callable[[int], Any], words: str
) -> None:
    @serve.accept_batch
    def odd(requests: Requests) -> Any:
        return answer(len(requests))

    handle = client.get_handle(deploy(odd, max_batch_size=3, batch_wait_timeout=60.0))
    for ref in [handle.remote() for _ in range(3)]:
        with pytest.raises(serve.MQServeError, match=words):
            ref.result(30)


def test_an_exception_in_a_batch_is_every_members_and_the_next_batch_is_served(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def fussy(requests: Requests) -> list[Any]:
        if any(request.data == "bad" for request in requests):
            raise LookupError("one of them is bad")
        return [request.data for request in requests]

    handle = client.get_handle(deploy(fussy, max_batch_size=2, batch_wait_timeout=2.0))
    for ref in [handle.remote("good"), handle.remote("bad")]:
        with pytest.raises(LookupError, match="one of them is bad"):
            ref.result(30)
    assert handle.remote("good").result(30) == "good"


def test_one_result_that_cannot_travel_is_only_its_own_requests_trouble(deploy: Deploy, client: serve.Client) -> None:
    @serve.accept_batch
    def mixed(requests: Requests) -> list[Any]:
        return [threading.Lock() if request.data == "lock" else request.data for request in requests]

    handle = client.get_handle(deploy(mixed, max_batch_size=2, batch_wait_timeout=60.0))
    lock, good = handle.remote("lock"), handle.remote("good")
    assert good.result(30) == "good"
    with pytest.raises(serve.MQServeError, match="lock"):
        lock.result(30)


def test_an_array_is_a_batch_of_its_elements(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def add_one(requests: Requests) -> Any:
        return np.array([request.data for request in requests], dtype=np.int32) + 1

    name = deploy(add_one, max_batch_size=4, batch_wait_timeout=0.05)
    results = serve.get([client.get_handle(name).remote(number) for number in range(4)], timeout=30)
    assert results == [1, 2, 3, 4] and {type(result) for result in results} == {np.int32}


def test_tuples_and_generators_are_ordered_too(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def either(requests: Requests) -> Any:
        found = [request.data for request in requests]
        return tuple(found) if found[0] == 0 else (one for one in found)

    handle = client.get_handle(deploy(either, max_batch_size=2, batch_wait_timeout=60.0))
    assert serve.get([handle.remote(number) for number in range(4)], timeout=30) == [0, 1, 2, 3]


# Tuning.


def test_batch_size_and_wait_are_tuned_live_on_the_same_replica(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def count(requests: Requests) -> list[Any]:
        return [[serve.get_current_replica_tag(), len(requests)]] * len(requests)

    name = deploy(count, max_batch_size=2, batch_wait_timeout=60.0)
    handle = client.get_handle(name)
    (tag, size), _ = serve.get([handle.remote() for _ in range(2)], timeout=30)
    assert size == 2
    client.update_backend_config(name, {"max_batch_size": 6})
    assert serve.get([handle.remote() for _ in range(6)], timeout=30) == [[tag, 6]] * 6
    client.update_backend_config(name, {"batch_wait_timeout": 2.0})
    assert serve.get([handle.remote() for _ in range(3)], timeout=30) == [[tag, 3]] * 3


# serve.batch.


@pytest.fixture(scope="module")
def gathering(client: serve.Client) -> Iterator[str]:
    """An async backend whose method of single items gathers them; tuned by a request of its own."""

    class Model:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        @serve.batch(max_batch_size=3, batch_wait_timeout_s=60)
        async def predict(self, items: list[Any]) -> Any:
            self.sizes.append(len(items))
            if "fail" in items:
                raise LookupError("the whole batch")
            if "short" in items:
                return items[1:]
            return [item * 2 for item in items]

        async def __call__(self, request: serve.ServeRequest) -> Any:
            match request.data:
                case {"size": size, "wait": wait}:
                    type(self).predict.set_max_batch_size(size)
                    type(self).predict.set_batch_wait_timeout_s(wait)
                    self.sizes.clear()
                case "sizes":
                    return self.sizes
                case item:
                    return await self.predict(item)

    deploy = Deploy(client)
    yield deploy(Model)
    deploy.undo()


@pytest.mark.parametrize(
    ("size", "wait", "count", "expected"),
    [(3, 60, 6, [3, 3]), (1, 60, 2, [1, 1]), (10, 2.0, 4, [4])],
    ids=["a-long-wait-needs-a-full-batch", "size-one-never-waits", "a-short-wait-takes-what-there-is"],
)
def test_a_batch_method_gathers_single_items(
    client: serve.Client, gathering: str, size: int, wait: float, count: int, expected: list[int]
) -> None:
    handle = client.get_handle(gathering)
    handle.remote({"size": size, "wait": wait}).result(30)
    assert serve.get([handle.remote(number) for number in range(count)], timeout=30) == [number * 2 for number in range(count)]
    assert handle.remote("sizes").result(30) == expected


@pytest.mark.parametrize(("item", "error", "words"), [("fail", LookupError, "the whole batch"), ("short", ValueError, "batch size")])
def test_an_error_of_a_batch_method_is_every_callers(
    client: serve.Client, gathering: str, item: str, error: type[Exception], words: str
) -> None:
    handle = client.get_handle(gathering)
    handle.remote({"size": 2, "wait": 60}).result(30)
    for ref in [handle.remote(1), handle.remote(item)]:
        with pytest.raises(error, match=words):
            ref.result(30)


def test_zero_wait_batches_what_comes_in_the_same_turn() -> None:
    seen: list[int] = []

    @serve.batch
    async def double(items: list[int]) -> list[int]:
        seen.append(len(items))
        return [item * 2 for item in items]

    async def main() -> list[int]:
        return list(await asyncio.gather(*(double(number) for number in range(15))))

    assert asyncio.run(main()) == [number * 2 for number in range(15)]
    assert seen == [10, 5]


def test_each_instance_gathers_its_own_items() -> None:
    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        @serve.batch(max_batch_size=2, batch_wait_timeout_s=30)
        async def predict(self, items: list[int]) -> list[str]:
            return [f"{self.name}{item}" for item in items]

    async def main() -> list[str]:
        a, b = Model("a"), Model("b")
        return list(await asyncio.gather(a.predict(1), b.predict(1), a.predict(2), b.predict(2)))

    assert asyncio.run(main()) == ["a1", "b1", "a2", "b2"]


def test_batch_refuses_what_is_not_async() -> None:
    with pytest.raises(TypeError, match="async def"):
        serve.batch(lambda items: items)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_batch_size": 0}, ValueError),
        ({"max_batch_size": -1}, ValueError),
        ({"max_batch_size": 1.5}, TypeError),
        ({"max_batch_size": "3"}, TypeError),
        ({"batch_wait_timeout_s": -1}, ValueError),
        ({"batch_wait_timeout_s": "1"}, TypeError),
    ],
    ids=str,
)
def test_batch_refuses_a_bad_size_or_wait(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        serve.batch(**options)


def test_a_batch_function_is_called_with_exactly_one_item() -> None:
    @serve.batch
    async def double(items: list[int]) -> list[int]:
        return [item * 2 for item in items]

    async def call(*items: int, **named: int) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            await double(*items, **named)

    asyncio.run(call())
    asyncio.run(call(1, 2))
    asyncio.run(call(item=1))
