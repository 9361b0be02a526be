"""`with serve.deploying():` what is declared together takes effect as a whole or not at all; in both forms."""

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.convertors import CONVERTOR_TYPES, Convertor

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until


def hello(request: Any) -> str:
    return "hello"


def other(request: Any) -> str:
    return "other"


class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no model")

    def __call__(self, request: Any) -> str:
        return "never"


class Adds:
    def __init__(self) -> None:
        self.amount = 0

    def reconfigure(self, user_config: Any) -> None:
        self.amount = user_config["amount"]

    def __call__(self, request: Any) -> int:
        return self.amount


class Slow:
    def __init__(self, gate: Gate) -> None:
        gate.pass_through()

    def __call__(self, request: Any) -> str:
        return "slow"


class Shout(Convertor[str]):
    regex = "[A-Z]+"

    def convert(self, value: str) -> str:
        return value.lower()

    def to_string(self, value: str) -> str:
        return value.upper()


class Names:
    """Names of backends and endpoints for one test; at its end nothing is left of them."""

    def __init__(self, client: serve.Client) -> None:
        self._client = client
        self._prefix = new_name("d")

    def __call__(self, word: str) -> str:
        return f"{self._prefix}-{word}"

    @property
    def backends(self) -> list[str]:
        return [name for name in self._client.list_backends() if name.startswith(self._prefix)]

    @property
    def endpoints(self) -> list[str]:
        return [name for name in self._client.list_endpoints() if name.startswith(self._prefix)]

    def forget(self) -> None:
        with self._client.deploying():
            for name in self.endpoints:
                self._client.delete_endpoint(name)
            for name in self.backends:
                self._client.delete_backend(name)


@pytest.fixture
def names(client: serve.Client) -> Iterator[Names]:
    names = Names(client)
    yield names
    names.forget()


def version(client: serve.Client) -> int:
    return client.sender.desired.version


def test_fifty_endpoints_on_eight_backends_are_two_commits_of_which_callers_see_one(client: serve.Client, names: Names, url: str) -> None:
    before = version(client)
    with serve.deploying():
        for backend in range(8):
            serve.create_backend(names(f"b{backend}"), hello)
        for endpoint in range(50):
            serve.create_endpoint(names(f"e{endpoint}"), backend=names(f"b{endpoint % 8}"), route=f"/{names(f'e{endpoint}')}/{{x}}")
        assert version(client) == before
    assert version(client) == before + 2  # the backends, and once they are ready the endpoints
    assert len(names.endpoints) == 50
    for endpoint in range(50):
        assert httpx.get(f"{url}/{names(f'e{endpoint}')}/1").text == "hello"


def test_a_bad_declaration_raises_at_its_line_and_the_others_stand(client: serve.Client, names: Names) -> None:
    with client.deploying():
        client.create_backend(names("b"), hello)
        with pytest.raises(serve.BadValue, match="there is a backend"):
            client.create_backend(names("b"), hello)
        with pytest.raises(serve.BadValue, match="nobody"):
            client.create_endpoint(names("e"), backend="nobody")
        with pytest.raises(serve.BadValue, match="num_replicas"):
            client.update_backend_config(names("b"), {"num_replicas": 0})
        with pytest.raises(serve.BadType):
            client.set_traffic(names("e"), {names("b"): "all"})  # type: ignore[dict-item]
        client.create_endpoint(names("e"), backend=names("b"))
    assert client.get_handle(names("e")).remote().result(30) == "hello"


def test_the_lists_show_what_is_declared_so_far_and_others_see_none_of_it(client: serve.Client, names: Names) -> None:
    with client.deploying(), ThreadPoolExecutor(1) as elsewhere:
        client.create_backend(names("b"), hello, config={"num_replicas": 1})
        client.create_endpoint(names("e"), backend=names("b"), route=f"/{names('e')}")
        client.update_backend_config(names("b"), {"max_queued_requests": 7})
        assert names.backends == [names("b")] and names.endpoints == [names("e")]
        assert client.get_backend_config(names("b")).max_queued_requests == 7
        assert elsewhere.submit(lambda: names.backends + names.endpoints).result() == []
        client.delete_endpoint(names("e"))
        assert names.endpoints == []


def test_an_exception_in_the_block_commits_nothing(client: serve.Client, names: Names) -> None:
    before = version(client)
    with pytest.raises(ZeroDivisionError), client.deploying():
        client.create_backend(names("b"), hello)
        client.register_convertor("shout", Shout)
        client.create_endpoint(names("e"), backend=names("b"), route="/{word:shout}")
        raise ZeroDivisionError
    assert version(client) == before and names.backends == []
    client.create_backend(names("b"), hello)
    with pytest.raises(serve.BadValue, match="shout"):
        client.create_endpoint(names("e"), backend=names("b"), route="/{word:shout}")


def test_a_convertor_and_a_route_that_uses_it_are_declared_together(client: serve.Client, names: Names, url: str) -> None:
    with client.deploying():
        client.register_convertor("upper", Shout)
        client.create_backend(names("b"), lambda request: request.path_params["word"])
        client.create_endpoint(names("e"), backend=names("b"), route=f"/{names('e')}/{{word:upper}}")
    assert httpx.get(f"{url}/{names('e')}/ABC").text == "abc"
    assert httpx.get(f"{url}/{names('e')}/abc").status_code == 404


def test_a_block_inside_a_block_joins_it_and_its_exception_takes_back_only_its_own(client: serve.Client, names: Names) -> None:
    before = version(client)
    with client.deploying():
        client.create_backend(names("outer"), hello)
        with serve.deploying():
            client.create_backend(names("inner"), hello)
        assert version(client) == before
        with contextlib.suppress(ZeroDivisionError), client.deploying():
            client.create_backend(names("failed"), hello)
            raise ZeroDivisionError
        assert names.backends == [names("outer"), names("inner")]
    assert version(client) == before + 1 and names.backends == [names("outer"), names("inner")]


def test_a_block_is_for_one_with(client: serve.Client, names: Names) -> None:
    block = client.deploying()
    with block:
        client.create_backend(names("b"), hello)
        with pytest.raises(serve.BadValue, match="was entered before"), block:
            pass
    with pytest.raises(serve.BadValue, match="was entered before"), block:
        pass
    assert names.backends == [names("b")]


def test_a_handle_of_what_is_only_declared_says_so_when_it_is_called(client: serve.Client, names: Names) -> None:
    with client.deploying():
        client.create_backend(names("b"), hello)
        client.create_endpoint(names("e"), backend=names("b"))
        handle = client.get_handle(names("e"))
        with pytest.raises(serve.UnknownEndpoint, match=r"declared in a deploying.. block that is still open"):
            handle.remote()
        waiting = client.get_handle(names("e"), missing_ok=True).remote()
        with pytest.raises(serve.UnknownEndpoint, match="does not exist"):
            client.get_handle(names("nowhere"))
    assert handle.remote().result(30) == waiting.result(30) == "hello"


def test_another_thread_is_not_in_the_block(client: serve.Client, names: Names) -> None:
    with client.deploying(), ThreadPoolExecutor(1) as elsewhere:
        client.create_backend(names("mine"), hello)
        elsewhere.submit(client.create_backend, names("theirs"), hello).result(60)
        assert elsewhere.submit(lambda: names.backends).result() == [names("theirs")]
        assert names.backends == [names("mine")]
    assert set(names.backends) == {names("mine"), names("theirs")}


def test_what_others_did_meanwhile_is_merged(client: serve.Client, names: Names) -> None:
    with client.deploying(), ThreadPoolExecutor(1) as elsewhere:
        client.create_backend(names("mine"), hello)
        elsewhere.submit(client.create_backend, names("theirs"), other).result(60)
        elsewhere.submit(client.create_endpoint, names("theirs"), backend=names("theirs")).result(60)
        client.create_endpoint(names("mine"), backend=names("mine"))
    assert client.get_handle(names("mine")).remote().result(30) == "hello"
    assert client.get_handle(names("theirs")).remote().result(30) == "other"


def test_a_declaration_that_is_refused_at_the_end_is_named_and_nothing_is_committed(client: serve.Client, names: Names) -> None:
    with (
        pytest.raises(serve.BadValue, match=rf"create_endpoint\('{names('e')}'\): there is an endpoint"),
        client.deploying(),
        ThreadPoolExecutor(1) as elsewhere,
    ):
        client.create_backend(names("mine"), hello)
        client.create_endpoint(names("e"), backend=names("mine"))
        elsewhere.submit(client.create_backend, names("theirs"), other).result(60)
        elsewhere.submit(client.create_endpoint, names("e"), backend=names("theirs")).result(60)
    assert names.backends == [names("theirs")]
    assert client.get_handle(names("e")).remote().result(30) == "other"


def test_if_one_backend_does_not_get_ready_all_is_undone(client: serve.Client, names: Names, deploy: Deploy) -> None:
    name = deploy(hello, max_queued_requests=9)
    with pytest.raises(serve.BackendFailed, match="no model"), client.deploying():
        client.create_backend(names("good"), other)
        client.create_backend(names("bad"), Broken)
        client.create_endpoint(names("e"), backend=names("bad"), route=f"/{names('e')}")
        client.set_traffic(name, {names("good"): 1.0})
        client.update_backend_config(name, {"num_replicas": 2, "max_queued_requests": 8})
    assert names.backends == names.endpoints == []
    assert client.list_endpoints()[name]["traffic"] == {name: 1.0}
    assert client.get_backend_config(name).num_replicas == 1 and client.get_backend_config(name).max_queued_requests == 9
    assert client.get_handle(name).remote().result(30) == "hello"
    client.create_backend(names("bad"), hello)  # its name is free again


def test_updates_and_deletions_take_effect_together(client: serve.Client, names: Names) -> None:
    with client.deploying():
        client.create_backend(names("old"), hello)
        client.create_backend(names("gone"), hello)
        client.create_backend(names("adds"), Adds, config={"user_config": {"amount": 1}})
        for word in ("old", "gone", "adds"):
            client.create_endpoint(names(word), backend=names(word))
    before = version(client)
    with client.deploying():
        client.update_backend(names("old"), other)
        client.update_backend_config(names("adds"), {"user_config": {"amount": 5}})
        client.delete_endpoint(names("gone"))
        client.delete_backend(names("gone"))
        with pytest.raises(serve.BadValue, match="is deleted in this deploying"):
            client.create_backend(names("gone"), other)
    assert version(client) == before + 2
    assert client.get_handle(names("old")).remote().result(30) == "other"
    assert client.get_handle(names("adds")).remote().result(30) == 5
    assert set(names.backends) == {names("old"), names("adds")}


def test_what_is_decorated_in_a_block_is_deployed_with_it(client: serve.Client, names: Names, url: str) -> None:
    before = version(client)
    with client.deploying():

        @serve.endpoint(f"/{names('e')}", name=names("e"))
        def decorated(request: Any) -> str:
            return defined_later()

        def defined_later() -> str:
            return "decorated"

        assert names.endpoints == names.backends == [names("e")]
        with pytest.raises(serve.BadValue, match="there is a backend"):
            serve.endpoint(f"/{names('e2')}", name=names("e"))(hello)
    assert version(client) == before + 2
    assert httpx.get(f"{url}/{names('e')}").text == "decorated"


def test_traffic_moves_to_a_new_backend_only_once_that_is_ready(client: serve.Client, names: Names, deploy: Deploy, tmp_path: Path) -> None:
    url, name = deploy.named(hello)
    gate = Gate(tmp_path)
    with ThreadPoolExecutor(1) as elsewhere:

        def declare() -> None:
            with client.deploying():
                client.create_backend(names("slow"), Slow, gate)
                client.create_endpoint(names("e"), backend=names("slow"))
                client.set_traffic(name, {names("slow"): 1.0})

        declaring = elsewhere.submit(declare)
        wait_until(lambda: names.backends)
        assert httpx.get(url).text == "hello"
        assert names.endpoints == []
        gate.open()
        declaring.result(60)
    assert httpx.get(url).text == client.get_handle(names("e")).remote().result(30) == "slow"
    client.set_traffic(name, {name: 1.0})


def test_an_empty_block_commits_nothing(client: serve.Client) -> None:
    before = version(client)
    with client.deploying(), client.deploying():
        pass
    assert version(client) == before


def test_a_block_of_an_async_program_belongs_to_its_task(client: serve.Client, names: Names) -> None:
    async def declare(word: str, begun: asyncio.Event, others: asyncio.Event) -> None:
        with client.deploying():
            await asyncio.to_thread(client.create_backend, names(word), hello)
            begun.set()
            await others.wait()
            assert names.backends == [names(word)]

    async def both() -> None:
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(declare("one", one, two), declare("two", two, one))

    asyncio.run(both())
    assert set(names.backends) == {names("one"), names("two")}


def test_what_is_declared_is_what_the_line_said_whatever_the_program_does_to_its_objects_later(client: serve.Client, names: Names) -> None:
    user_config = {"amount": 1}
    config: dict[str, Any] = {"user_config": user_config}
    with client.deploying():
        client.create_backend(names("a"), Adds, config=config)
        user_config["amount"] = 2
        client.create_backend(names("b"), Adds, config=config)
        user_config["amount"] = 3
        client.update_backend_config(names("b"), config)
        user_config["amount"] = 4
        for word in "ab":
            client.create_endpoint(names(word), backend=names(word))
    assert [client.get_handle(names(word)).remote().result(30) for word in "ab"] == [1, 3]


def test_a_backend_created_and_deleted_in_a_block_is_not_created_once_more(client: serve.Client, names: Names) -> None:
    with client.deploying():
        client.create_backend(names("b"), hello)
        client.delete_backend(names("b"))
        with pytest.raises(serve.BadValue, match="is deleted in this deploying"):
            client.create_backend(names("b"), other)
    assert names.backends == []


def test_a_handle_of_what_others_created_during_the_block_is_found_in_it(client: serve.Client, names: Names) -> None:
    with client.deploying(), ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(client.create_backend, names("theirs"), hello).result(60)
        elsewhere.submit(client.create_endpoint, names("theirs"), backend=names("theirs")).result(60)
        assert client.get_handle(names("theirs")).remote().result(30) == "hello"


def test_an_exception_takes_back_the_convertors_of_this_process_too(client: serve.Client, names: Names) -> None:
    with pytest.raises(TypeError, match="not today"), client.deploying():
        client.register_convertor("shouted", Shout)
        client.create_backend(names("b"), hello)
        client.create_endpoint(names("e"), backend=names("b"), route=f"/{names('e')}/{{word:shouted}}")
        raise TypeError("not today")
    assert "shouted" not in CONVERTOR_TYPES and names.backends == []


class Composed:
    def __init__(self, endpoint: str) -> None:
        self.handle = serve.get_handle(endpoint)

    def __call__(self, request: Any) -> str:
        answer: str = self.handle.remote().result(30)
        return f"composed {answer}"


def test_a_constructor_gets_a_handle_of_what_is_declared_with_its_backend(client: serve.Client, names: Names) -> None:
    with client.deploying():
        client.create_backend(names("part"), hello)
        client.create_endpoint(names("part"), backend=names("part"))
        client.create_backend(names("whole"), Composed, names("part"))
        client.create_endpoint(names("whole"), backend=names("whole"))
    assert client.get_handle(names("whole")).remote().result(30) == "composed hello"


def test_a_handle_of_an_unknown_endpoint_that_a_constructor_gets_says_so_when_it_is_called(client: serve.Client, names: Names) -> None:
    client.create_backend(names("whole"), Composed, names("nowhere"))
    client.create_endpoint(names("whole"), backend=names("whole"))
    with pytest.raises(serve.UnknownEndpoint, match="does not exist"):
        client.get_handle(names("whole")).remote().result(30)
