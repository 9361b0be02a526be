"""Creating, listing and deleting endpoints; in both forms."""

from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.instances import Deploy, new_name


def hello(request: Any) -> str:
    return "hello"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"route": "/r"}, {"backend": 7}, {"backend": None}, {"backend": "b", "route": "r"}, {"backend": "b", "route": 7}]
    + [{"backend": "b", "methods": methods} for methods in ("GET", [], [7], None)],
    ids=str,
)
def test_an_endpoint_of_the_wrong_types_is_a_type_error(client: serve.Client, arguments: dict[str, Any]) -> None:
    name = new_name("e")
    with pytest.raises(TypeError):
        client.create_endpoint(name, **arguments)
    assert name not in client.list_endpoints()


def test_an_unknown_backend_is_refused_and_leaves_no_route(client: serve.Client, url: str) -> None:
    name = new_name("e")
    with pytest.raises(ValueError, match="nobody"):
        client.create_endpoint(name, backend="nobody", route=f"/{name}")
    assert f"/{name}" not in httpx.get(f"{url}/-/routes").json()


def test_a_name_or_a_route_that_is_taken_is_refused(client: serve.Client, deploy: Deploy) -> None:
    route = f"/{new_name('r')}"
    name = deploy(hello, route=route)
    for endpoint, path in ((name, f"{route}-other"), (new_name("e"), route), (name, route)):
        with pytest.raises(ValueError):
            client.create_endpoint(endpoint, backend=name, route=path, methods=["GET", "POST"])
    assert f"{route}-other" not in httpx.get(f"{deploy.url}/-/routes").json()


@pytest.mark.parametrize("route", ["/-/mine", "/{a}/{a}", "/{a:color}", "/{a", "/{1a}", "/{a :int}", "/a?b=1"])
def test_a_route_that_cannot_be_served_is_refused(client: serve.Client, deploy: Deploy, route: str) -> None:
    with pytest.raises(ValueError, match="route"):
        client.create_endpoint(new_name("e"), backend=deploy(hello), route=route)


def test_list_endpoints_has_the_seeds_shape_and_shrinks(client: serve.Client, deploy: Deploy) -> None:
    route = f"/{new_name('r')}"
    name, other = deploy(hello, route=route, methods=("get", "POST")), deploy(hello)
    client.set_traffic(name, {name: 0.75, other: 0.25})
    client.shadow_traffic(name, other, 0.5)
    listed = client.list_endpoints()
    assert listed[name] == {
        "route": route,
        "methods": ["GET", "POST"],
        "traffic": {name: 0.75, other: 0.25},
        "shadows": {other: 0.5},
    }
    assert listed[other] == {"route": None, "methods": ["GET", "POST"], "traffic": {other: 1.0}, "shadows": {}}
    client.delete_endpoint(name)
    assert name not in client.list_endpoints()


def test_get_is_the_only_method_unless_others_are_named(client: serve.Client, deploy: Deploy) -> None:
    name, backend = new_name("e"), deploy(hello)
    client.create_endpoint(name, backend=backend, route=f"/{name}")
    assert client.list_endpoints()[name]["methods"] == ["GET"]
    assert httpx.post(f"{deploy.url}/{name}").status_code == 405
    client.delete_endpoint(name)


@pytest.mark.parametrize("routed", [True, False], ids=["with-a-route", "headless"])
def test_a_deleted_endpoint_frees_its_name_and_route_and_keeps_its_backend(client: serve.Client, deploy: Deploy, routed: bool) -> None:
    backend, name = deploy(hello), new_name("e")
    route = f"/{name}" if routed else None
    for _ in range(2):
        client.create_endpoint(name, backend=backend, route=route)
        assert client.get_handle(name).remote().result(30) == "hello"
        if route:
            assert httpx.get(deploy.url + route).text == "hello"
        client.delete_endpoint(name)
        assert name not in client.list_endpoints() and backend in client.list_backends()
        with pytest.raises(KeyError):
            client.get_handle(name)
        if route:
            assert httpx.get(deploy.url + route).status_code == 404
