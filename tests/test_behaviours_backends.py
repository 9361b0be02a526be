"""Creating, listing and deleting backends, and what a handler may be and return; in both forms."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until


class Adder:
    def __init__(self, increment: int, *, base: int = 0) -> None:
        self.increment = increment

    def __call__(self, request: Any) -> int:
        return int(request.data or 0) + self.increment


def hello(request: Any) -> str:
    return "hello"


def test_a_function_sees_get_and_post_of_its_route_and_the_method(client: serve.Client, deploy: Deploy) -> None:
    name = new_name("r")
    endpoint = deploy(lambda request: request.method, route=f"/{name}", methods=("GET", "POST"))
    url = f"{deploy.url}/{name}"
    assert (httpx.get(url).text, httpx.post(url).text) == ("GET", "POST")
    assert httpx.get(f"{deploy.url}/-/routes").json()[f"/{name}"] == [endpoint, ["GET", "POST"]]


def test_constructor_arguments_reach_the_class(client: serve.Client, deploy: Deploy) -> None:
    assert client.get_handle(deploy(Adder, 3)).remote(4).result(30) == 7


@pytest.mark.parametrize("target", [Adder(1), partial(hello), len, 7, None], ids=["instance", "partial", "builtin", "int", "None"])
def test_what_is_neither_function_nor_class_is_a_type_error(client: serve.Client, target: Any) -> None:
    name = new_name("b")
    with pytest.raises(TypeError, match="function, a class, an ASGI app or an import string"):
        client.create_backend(name, target)
    assert name not in client.list_backends()


def test_a_function_takes_no_constructor_arguments(client: serve.Client) -> None:
    with pytest.raises(ValueError, match="constructor arguments"):
        client.create_backend(new_name("b"), hello, 1)


def test_a_name_that_is_taken_is_refused_and_the_first_stays(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(hello)
    with pytest.raises(ValueError, match="already"):
        client.create_backend(name, Adder, 1)
    assert client.get_handle(name).remote().result(30) == "hello"


def test_two_replicas_that_wait_for_each_other_in_their_constructors_both_come_up(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    class Waiting:
        def __init__(self) -> None:
            import time

            (tmp_path / serve.get_current_replica_tag().replace("#", "-")).touch()
            while len([path for path in tmp_path.iterdir() if path.is_file()]) < 2:
                time.sleep(0.01)

        def __call__(self, request: Any) -> str:
            return "both"

    gate.open()
    assert client.get_handle(deploy(Waiting, num_replicas=2)).remote().result(30) == "both"


def test_a_class_without_call_serves_its_methods(client: serve.Client, deploy: Deploy) -> None:
    class Only:
        def method(self, request: Any) -> str:
            return "method"

    handle = client.get_handle(deploy(Only))
    assert handle.options(method_name="method").remote().result(30) == "method"
    with pytest.raises(serve.MQServeError, match="no __call__"):
        handle.remote().result(30)


def test_code_by_import_string_needs_nothing_here_and_takes_user_config_and_methods(client: serve.Client, deploy: Deploy) -> None:
    name = deploy("tests.imported:Threshold", user_config={"threshold": 1})
    handle = client.get_handle(name)
    assert handle.remote().result(30) == 1
    client.update_backend_config(name, {"user_config": {"threshold": 2}})
    assert handle.remote().result(30) == 2
    assert handle.options(method_name="twice").remote().result(30) == 4


def test_arrays_become_lists_and_bytes_text_in_json(deploy: Deploy) -> None:
    def answer(request: Any) -> Any:
        return {"floats": np.array([1.5]), "ints": np.array([[1, 2]]), "unsigned": np.array([3], dtype=np.uint8), "deep": [{"b": b"text"}]}

    assert httpx.get(deploy.at(answer)).json() == {"floats": [1.5], "ints": [[1, 2]], "unsigned": [3], "deep": [{"b": "text"}]}


# Listing and deleting.


def test_list_backends_shows_the_config_of_each_and_shrinks(client: serve.Client) -> None:
    before = client.list_backends()
    name = new_name("b")
    client.create_backend(name, hello, config={"max_concurrent_queries": 3})
    listed = client.list_backends()
    assert set(listed) == {*before, name} and listed[name] == serve.BackendConfig(max_concurrent_queries=3)
    client.delete_backend(name)
    assert client.list_backends() == before


def test_a_backend_in_traffic_or_shadow_cannot_be_deleted_and_is_gone_afterwards(client: serve.Client, deploy: Deploy) -> None:
    name, other = new_name("b"), deploy(hello)
    client.create_backend(name, hello)
    client.set_traffic(other, {other: 0.5, name: 0.5})
    with pytest.raises(ValueError, match=other):
        client.delete_backend(name)
    client.set_traffic(other, {other: 1.0})
    client.shadow_traffic(other, name, 0.5)
    with pytest.raises(ValueError, match=other):
        client.delete_backend(name)
    client.shadow_traffic(other, name, 0)
    client.delete_backend(name)
    with pytest.raises(ValueError, match=name):
        client.set_traffic(other, {name: 1.0})
    client.create_backend(name, Adder, 1)
    client.set_traffic(other, {name: 1.0})
    assert client.get_handle(other).remote(1).result(30) == 2, "the name has new code"
    client.set_traffic(other, {other: 1.0})
    client.delete_backend(name)


def test_a_name_that_is_used_again_while_old_replicas_drain_has_the_new_code(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate, name = Gate(tmp_path), new_name("b")

    def old(request: Any) -> str:
        gate.pass_through()
        return "old"

    client.create_backend(name, old)
    client.create_endpoint(name, backend=name)
    handle = client.get_handle(name)
    held = handle.remote()
    wait_until(lambda: gate.came == 1)
    client.delete_endpoint(name)
    with ThreadPoolExecutor(1) as background:
        deleting = background.submit(client.delete_backend, name)
        wait_until(lambda: name not in client.list_backends())
        client.create_backend(name, hello)
        client.create_endpoint(name, backend=name)
        assert serve.get([handle.remote() for _ in range(5)], timeout=30) == ["hello"] * 5
        gate.open()
        assert held.result(30) == "old"
        client.delete_endpoint(name)
        client.delete_backend(name)
        deleting.result(60)


def test_deleting_what_is_not_there_is_nothing(client: serve.Client) -> None:
    client.delete_backend("nobody")
    client.delete_endpoint("nowhere")
