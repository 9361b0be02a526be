"""User code that does what it should not, and requests that nobody could read: one request suffers, the replica lives."""

import asyncio
import dataclasses
import sys
import uuid
from collections.abc import Iterator

import pytest

import mqserve as serve
from mqserve.broker.errors import BadEnvelope
from mqserve.broker.values.codecs import JSON, decode_plain
from tests.ports import free_port


@pytest.fixture(scope="module")
def client() -> Iterator[serve.Client]:
    client = serve.start(http_options={"port": free_port(), "location": "NoServer"}, namespace=f"hostile-{uuid.uuid4().hex[:8]}")
    yield client
    client.shutdown()


def deploy(client: serve.Client, name: str, target: object, **config: object) -> serve.Handle:
    client.create_backend(name, target, config=config)
    client.create_endpoint(name, backend=name)
    return client.get_handle(name)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_that_exits_fails_its_request_and_the_next_one_is_served(client: serve.Client, threads: int) -> None:
    def leave(request: serve.ServeRequest) -> str:
        if request.data == "leave":
            sys.exit(3)
        return "still here"

    handle = deploy(client, f"leave-{threads}", leave, sync_threads=threads)
    with pytest.raises(serve.RemoteError, match="SystemExit: 3"):
        handle.remote("leave").result(30)
    assert serve.get([handle.remote("stay") for _ in range(4)], timeout=30) == ["still here"] * 4


def test_a_cancellation_of_the_handlers_own_is_its_requests_failure(client: serve.Client) -> None:
    async def cancelled(request: serve.ServeRequest) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    with pytest.raises(serve.RemoteError, match="CancelledError"):
        deploy(client, "cancelled", cancelled).remote().result(30)


def test_a_handlers_own_timeout_is_told_as_what_it_is(client: serve.Client) -> None:
    def late(request: serve.ServeRequest) -> None:
        raise TimeoutError("the database did not answer")

    ref = deploy(client, "late", late).remote()
    with pytest.raises(TimeoutError, match="the database did not answer"):
        ref.result()
    with pytest.raises(TimeoutError, match="the database did not answer"):
        ref.result(30)


def test_a_batch_handler_need_not_be_hashable(client: serve.Client) -> None:
    @dataclasses.dataclass
    class Model:
        factor: int

        @serve.accept_batch
        def __call__(self, requests: list[serve.ServeRequest]) -> list[int]:
            return [self.factor * request.data for request in requests]

    client.create_backend("dataclass", Model, 3, config={"max_batch_size": 4})
    client.create_endpoint("dataclass", backend="dataclass")
    handle = client.get_handle("dataclass")
    assert serve.get([handle.remote(number) for number in range(5)], timeout=30) == [0, 3, 6, 9, 12]


def test_nesting_beyond_reason_is_refused_like_any_bad_body() -> None:
    with pytest.raises(BadEnvelope):
        decode_plain(b"[" * 300_000, JSON)


def test_nothing_waited_for_is_nothing() -> None:
    assert serve.get([]) == []


def test_the_log_of_a_failed_request_names_the_users_line(client: serve.Client, caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: serve.ServeRequest) -> None:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        deploy(client, "broken", broken).remote().result(30)
    assert "test_hostile_handlers.py" in caplog.text and "no such row" in caplog.text


@pytest.mark.parametrize("wrong", ["an id", 5, ["an id"]])
def test_what_is_no_future_is_told_what_to_do(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"serve.future\(id\)"):
        serve.get(wrong)  # type: ignore[arg-type]


def test_methods_in_one_string_are_refused_where_they_are_written() -> None:
    with pytest.raises(TypeError, match="must be a list of names"):
        serve.endpoint("/one", methods="GET")(lambda request: None)
