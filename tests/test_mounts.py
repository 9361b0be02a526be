"""An app under a prefix: who gets which path, how it is declared, and how it is shown."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import mqserve as serve
from tests import apps
from tests.instances import CommandLine, wait_until
from tests.ports import free_port
from tests.tallies import Tally


@pytest.fixture
def mounted(client: serve.Client) -> Iterator[list[str]]:
    """What a test has mounted, and named here, is gone at its end."""
    mounted: list[str] = []
    yield mounted
    for name in mounted:
        client.delete_endpoint(name)
    for name in mounted:
        client.delete_backend(name)


def test_the_root_as_a_prefix_gets_what_nobody_else_has_and_nothing_of_the_system(
    client: serve.Client, url: str, mounted: list[str]
) -> None:
    client.mount("/", apps.starlette_app)
    mounted.append("root")
    client.create_backend("exact", lambda request: "exact")
    client.create_endpoint("exact", backend="exact", route="/hello/exact", methods=["GET"])
    mounted.append("exact")
    assert httpx.get(f"{url}/hello/ada").json() == {"hello": "ada"}
    assert httpx.get(f"{url}/hello/exact").text == "exact"
    where = httpx.get(f"{url}/where/x").json()
    assert (where["path"], where["root_path"]) == ("/where/x", "")
    assert httpx.get(f"{url}/-/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/-/routes").json() == {"/": ["root", ["*"]], "/hello/exact": ["exact", ["GET"]]}
    assert httpx.get(f"{url}/-/nothing").status_code == 404
    assert httpx.get(f"{url}/%2D/healthz").status_code == 404


def test_the_longest_of_nested_prefixes_gets_a_request(client: serve.Client, url: str, mounted: list[str]) -> None:
    client.mount("/api", apps.starlette_app)
    client.mount("/api/v2/", apps.plain_app)
    mounted.extend(["api", "api-v2"])
    roots = [httpx.get(f"{url}/{path}/where/x").json()["root_path"] for path in ("api", "api/v2")]
    assert roots == ["/api", "/api/v2"]
    assert httpx.get(f"{url}/apiary/where/x").status_code == 404


def test_an_endpoint_of_an_app_is_a_prefix_and_takes_the_methods_that_it_names(client: serve.Client, url: str, mounted: list[str]) -> None:
    client.create_backend("app", apps.shop)
    mounted.append("app")
    client.create_endpoint("app", backend="app", route="/app", methods=["get"])
    facts = client.list_endpoints()["app"]
    assert (facts["route"], facts["methods"], facts.get("prefix")) == ("/app", ["GET"], True)
    assert httpx.get(f"{url}/app/where/x").json()["root_path"] == "/app"
    refused = httpx.post(f"{url}/app/where/x")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


def test_a_prefix_is_counted_by_its_route(client: serve.Client, url: str, mounted: list[str]) -> None:
    client.mount("/counted", apps.shop)
    mounted.append("counted")
    for number in range(3):
        assert httpx.get(f"{url}/counted/items/{number}").status_code == 200
    page = httpx.get(f"{url}/-/metrics").text
    assert 'mqserve_num_http_requests_total{route="/counted"} 3.0' in page and "/counted/items" not in page


def test_a_mount_that_fails_leaves_nothing(client: serve.Client, tmp_path: Path) -> None:
    before = client.list_backends().keys(), client.list_endpoints().keys()
    with pytest.raises(serve.BackendFailed):
        client.mount("/failing", apps.telling, Tally(tmp_path), "startup", factory=True)
    with pytest.raises(serve.BadValue, match="has no parameters"):
        client.mount("/{tenant}", apps.shop)
    for prefix in ("//app", "/a//b", "/a/../b", "/./a", "//"):
        with pytest.raises(serve.BadValue, match="has a segment that is empty"):
            client.mount(prefix, apps.shop)
    with pytest.raises(serve.BadType, match="takes the settings of the backend as config="):
        client.mount("/app", apps.shop, num_replicas=2)  # type: ignore[arg-type]
    with pytest.raises(serve.BadValue, match="belongs to the system"):
        client.mount("/-/app", apps.shop)
    with pytest.raises(serve.BadType, match="no ASGI app, so it cannot be mounted"):
        client.mount("/handler", lambda request: 1)
    with pytest.raises(serve.BadType, match="takes the prefix and then the app"):
        client.mount(apps.shop, "/shop")  # type: ignore[arg-type]
    assert (client.list_backends().keys(), client.list_endpoints().keys()) == before


def test_a_route_belongs_to_one_endpoint_prefix_or_not(client: serve.Client, mounted: list[str]) -> None:
    client.mount("/taken", apps.shop)
    mounted.append("taken")
    for route in ("/taken", "/taken/"):
        with pytest.raises(serve.BadValue, match="belongs to endpoint 'taken'"):
            client.mount(route, apps.plain_app, name="other")
    with pytest.raises(serve.BadValue, match="belongs to endpoint 'taken'"):
        client.create_endpoint("other", backend="taken", route="/taken/")


def test_apps_are_mounted_together_with_other_declarations(client: serve.Client, url: str, mounted: list[str]) -> None:
    with client.deploying():
        client.mount("/one", apps.starlette_app)
        client.create_backend("named", "tests.apps:shop")
        client.create_endpoint("named", backend="named", route="/named")
        assert client.list_endpoints()["one"].get("prefix")
    mounted.extend(["one", "named"])
    assert httpx.get(f"{url}/one/hello/ada").json() == {"hello": "ada"}
    assert httpx.get(f"{url}/named/items/1").json()["item_id"] == 1, "found to be an app once its replica was ready"
    assert client.list_endpoints()["named"]["methods"] == ["*"]


def test_a_new_version_of_an_app_takes_over_without_a_failed_request(client: serve.Client, url: str, mounted: list[str]) -> None:
    client.mount("/version", "tests.apps:shop")
    mounted.append("version")
    client.update_backend("version", apps.plain_app)
    assert httpx.get(f"{url}/version/hello/new").json() == {"hello": "new"}
    assert client.list_endpoints()["version"].get("prefix")


# The command line.

FILE = """
import os

from fastapi import FastAPI, Request

import mqserve as serve

app = FastAPI()


@app.get("/pid")
def pid(request: Request) -> dict[str, object]:
    return {"pid": os.getpid(), "root": request.scope["root_path"]}


serve.mount("/api", app, config={"num_replicas": REPLICAS})

words = FastAPI()


@serve.endpoint("/words")
@serve.ingress(words)
class Words:
    def __init__(self):
        self.known = {"hello"}

    @words.get("/{word}")
    def knows(self, word: str) -> bool:
        return word in self.known
"""


@pytest.mark.parametrize("shell_of", ["shell", "distributed_shell"])
def test_a_file_that_mounts_an_app_is_run(shell_of: str, request: pytest.FixtureRequest) -> None:
    shell: CommandLine = request.getfixturevalue(shell_of)
    is_distributed = shell_of == "distributed_shell"
    port = free_port()
    file = shell.file("app.py", FILE.replace("REPLICAS", "2" if is_distributed else "1"))
    program = shell.start("run", file, "--port", str(port))
    program.wait_for("Ctrl-C stops")
    curl = program.wait_for("curl ").strip()
    assert curl == f"curl http://127.0.0.1:{port}/api/docs" and httpx.get(curl.removeprefix("curl ")).status_code == 200
    url = f"http://127.0.0.1:{port}"
    pids = set()

    def has_seen_all() -> bool:
        answer = httpx.get(f"{url}/api/pid").json()
        assert answer["root"] == "/api"
        pids.add(answer["pid"])
        return len(pids) == (2 if is_distributed else 1)

    wait_until(has_seen_all)
    assert [httpx.get(f"{url}/words/{word}").json() for word in ("hello", "goodbye")] == [True, False]
    shown = shell.run("status")
    if is_distributed:
        assert "/api/…" in shown.stdout, shown.stdout
