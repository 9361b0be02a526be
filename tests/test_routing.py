"""Which endpoint a request is for: whose route wins, what a look-up takes, and what becomes of routes that cannot be matched."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
from starlette.convertors import CONVERTOR_TYPES, Convertor, StringConvertor

import mqserve as serve
from mqserve.controller.state.beats import read_beats
from mqserve.controller.state.documents import Backend, Desired, Endpoint, Observed
from mqserve.controller.state.reading import read_desired
from mqserve.proxy.routes import NotAllowed, Piped, RouteTable, Target
from tests.convertors import Matching
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, answers, distributed_only, new_name, wait_until
from tests.ports import free_port


@pytest.fixture(scope="module", autouse=True)
def as_it_was() -> Iterator[None]:
    """An embedded instance registers its convertors in this process."""
    before = dict(CONVERTOR_TYPES)
    yield
    CONVERTOR_TYPES.clear()
    CONVERTOR_TYPES.update(before)


def table_of(*routes: str | tuple[str, str], before: RouteTable | None = None) -> RouteTable:
    """Of endpoints that are called like their routes, the oldest first; methods beside a route, or GET. A route that ends in `*` is a
    prefix, which takes all methods."""
    pairs = [(route, "*" if route[-1:] == "*" else "GET") if isinstance(route, str) else route for route in routes]
    endpoints = {name: endpoint_of(name, tuple(methods.split())) for name, methods in pairs}
    return RouteTable(Desired(backends={"b": Backend("b", "c0de", "f")}, endpoints=endpoints), Observed(), before)


def endpoint_of(name: str, methods: tuple[str, ...]) -> Endpoint:
    is_prefix = name.endswith("*")
    return Endpoint(name, (name.removesuffix("*").rstrip("/") or "/") if is_prefix else name, methods, {"b": 1.0}, prefix=is_prefix)


def found(table: RouteTable, path: str, method: str = "GET") -> str | tuple[str, ...] | None:
    """The route, or the methods that there are instead."""
    match table.match(path, method):
        case Piped(target):
            return target.pattern
        case Target(endpoint):
            return endpoint.name
        case NotAllowed(methods):
            return methods
        case None:
            return None


# Who wins.


def test_a_literal_route_wins_over_patterns_and_the_older_pattern_over_the_younger() -> None:
    table = table_of("/{a}/{b}", "/{a}/x", "/y/x", "/y/{b}")
    assert [found(table, path) for path in ("/y/x", "/y/z", "/z/x", "/z")] == ["/y/x", "/{a}/{b}", "/{a}/{b}", None]


@pytest.mark.parametrize("younger", ["/{p:path}", "/{a}/{p:path}", "/{p:path}/c", "/a/{b}-{c}"])
def test_age_counts_between_patterns_of_any_shape(younger: str) -> None:
    path = "/a/b-b/c" if younger != "/a/{b}-{c}" else "/a/b-c"
    other = "/" + "/".join(f"{{s{number}}}" for number in range(path.count("/")))
    assert found(table_of(younger, other), path) == younger
    assert found(table_of(other, younger), path) == other


def test_a_pattern_whose_method_does_not_fit_is_passed_over_for_a_younger_one() -> None:
    table = table_of(("/{a}", "POST"), ("/{a:int}", "PUT"), "/{p:path}")
    assert found(table, "/1") == "/{p:path}"
    assert found(table, "/1", "PUT") == "/{a:int}"
    assert found(table, "/1", "HEAD") == "/{p:path}", "who serves GET serves HEAD"
    assert found(table, "/1", "DELETE") == ("POST",), "of the first one that matches"


def test_a_literal_route_whose_method_does_not_fit_is_not_passed_over() -> None:
    assert found(table_of(("/a", "POST"), "/{a}"), "/a") == ("POST",)


@pytest.mark.parametrize("path", ["/a\n", "/a/5\n", "/a\n/5", "//", "/a//5", "/a/5/", ""])
def test_odd_paths_match_what_starlettes_routes_match(path: str) -> None:
    expected = {"/a/5\n": "/a/{n:int}", "/a\n": "/{x}"}
    assert found(table_of("/a", "/a/{n:int}", "/{x}"), path) == expected.get(path)


def test_the_longest_prefix_wins_and_ends_where_a_segment_ends() -> None:
    table = table_of("/v1/*", "/v1/admin/*", "/*", "/v1/admin/x/*")
    paths = ["/v1", "/v1/", "/v1/a/b", "/v1/admin", "/v1/admin/y", "/v1/admin/x/y/z", "/v1/administrator", "/v10", "/", "/other"]
    ends = ["/v1/*", "/v1/*", "/v1/*", "/v1/admin/*", "/v1/admin/*", "/v1/admin/x/*", "/v1/*", "/*", "/*", "/*"]
    assert [found(table, path) for path in paths] == ends


def test_a_prefix_gets_only_paths_that_no_other_route_matches() -> None:
    table = table_of("/*", "/v1/*", "/v1/exact", "/v1/items/{item:int}", ("/v1/posted/{x}", "POST"))
    assert [found(table, path) for path in ("/v1/exact", "/v1/items/5", "/v1/items/five")] == ["/v1/exact", "/v1/items/{item:int}", "/v1/*"]
    assert found(table, "/v1/exact", "POST") == ("GET",) and found(table, "/v1/posted/a") == ("POST",)


def test_a_prefix_takes_the_methods_that_it_names_or_all_of_them() -> None:
    table = table_of(("/some/*", "GET PUT"), "/all/*")
    assert [found(table, "/some/x", method) for method in ("GET", "HEAD", "PUT", "POST")] == [
        "/some/*",
        "/some/*",
        "/some/*",
        ("GET", "PUT"),
    ]
    assert {found(table, "/all/x", method) for method in ("GET", "OPTIONS", "PURGE", "TRACE")} == {"/all/*"}


def test_a_prefix_is_the_root_path_of_its_requests() -> None:
    table = table_of("/v1/*", "/*", "/exact")
    targets = [table.match(path, "GET") for path in ("/v1/x", "/x", "/exact")]
    assert [target.root_path for target in targets if isinstance(target, Target)] == ["/v1", "", ""]


@pytest.mark.parametrize("path", ["*", "", "v1/x"])
def test_what_is_no_path_has_no_prefix(path: str) -> None:
    assert found(table_of("/*", "/v1/*"), path) is None


# What it takes.


@pytest.mark.parametrize("path", ["/p9/x/y", "/p9", "/nowhere", "/a" * 30_000, "/" * 60_000])
def test_a_thousand_prefixes_take_as_many_steps_as_ten(path: str) -> None:
    few, many = (table_of(*[f"/p{number}/*" for number in range(10**digits)]) for digits in (1, 3))
    assert steps(few, path) == steps(many, path) < 50


def steps(table: RouteTable, path: str) -> int:
    """The calls, of Python and of C, that a look-up takes."""
    count = 0

    def on(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on)
    try:
        table.match(path, "GET")
    finally:
        sys.setprofile(None)
    return count


SHAPES = ["/r%d", "/r%d/{x}", "/api/{t}/r%d/{x:int}", "/r%d/{p:path}", "/{p:path}/r%d", "/r%d/{a}-{b}", "/r%d.{x:int}/r%d"]
PATHS = ["/r%d", "/r%d/a", "/api/t/r%d/5", "/r%d/a/b/c", "/a/b/r%d", "/r%d/a-b", "/nowhere", "/a/nowhere/at/all"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_routes_take_as_many_steps_as_ten(shape: str, path: str) -> None:
    few, many = (table_of(*[shape.replace("%d", str(number)) for number in range(10**digits)]) for digits in (1, 3))
    assert steps(few, path.replace("%d", "9")) == steps(many, path.replace("%d", "9"))


class Counted(Matching):
    """Counts how often its regex is read, as it is whenever a route with it is compiled."""

    read = 0

    def __init__(self) -> None:
        self._convert = str

    @property
    def regex(self) -> str:  # type: ignore[override]
        self.read += 1
        return "[a-z]+"


def test_a_route_is_compiled_again_only_when_its_convertor_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Counted(), Counted()
    monkeypatch.setitem(CONVERTOR_TYPES, "counted", first)
    table = table_of("/{x:counted}")
    read = first.read
    table = table_of("/{x:counted}", "/other", before=table)
    assert first.read == read
    monkeypatch.setitem(CONVERTOR_TYPES, "counted", second)
    assert found(table_of("/{x:counted}", before=table), "/a") == "/{x:counted}"
    assert second.read > 0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("/{x:nobodys}", "there is no convertor 'nobodys'"),
        ("{x}", "does not begin with '/'"),
        ("/{x", "no part of a parameter"),
        ("", "begin"),
    ],
)
def test_a_route_that_cannot_be_matched_is_left_out_alone(bad: str, says: str) -> None:
    table = table_of(bad, "/{x}", "/y")
    assert list(table.left_out) == [bad] and says in table.left_out[bad]
    assert found(table, "/a") == "/{x}" and list(table.listing) == ["/{x}", "/y"]


# Instances.


@pytest.fixture
def params_at(client: serve.Client, deploy: Deploy) -> Iterator[Callable[[str], str]]:
    """Gives a route to a backend that tells its path parameters; what it returns is the URL of the proxy."""
    backend, names = deploy(lambda request: repr(request.path_params)), []

    def at(route: str) -> str:
        names.append(new_name("e"))
        client.create_endpoint(names[-1], backend=backend, route=route)
        return client.http_url()

    yield at
    for name in names:
        client.delete_endpoint(name)


def new_kind() -> str:
    return new_name("kind").replace("-", "_")


HOSTILE = {
    "{year}-{month}-{day}": "-" * 60_000 + "/",
    "{name}.{ext}": "." * 60_000 + "/",
    "{a:path}/{b:path}/{c:path}": "/" * 60_000 + "%0A%0A",
}


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_path_is_answered_and_does_not_stop_the_proxy(params_at: Callable[[str], str], pattern: str) -> None:
    name = new_name("r")
    url = params_at(f"/{name}/{pattern}")
    assert httpx.get(f"{url}/{name}/{HOSTILE[pattern]}").status_code == 404
    assert httpx.get(f"{url}/{name}/1-2-3/4.5/6").status_code == (200 if "path" in pattern else 404)


class Refusing(Convertor[str]):
    """Takes no text: ends the process instead, if it can."""

    regex = "[a-z]+"

    def convert(self, value: str) -> str:
        raise SystemExit(value)

    def to_string(self, value: str) -> str:
        raise SystemExit(value)


def test_a_convertor_that_raises_is_no_match(client: serve.Client, params_at: Callable[[str], str]) -> None:
    kind, name = new_kind(), new_name("r")
    client.register_convertor(kind, Refusing)
    url = params_at(f"/{name}/{{x:{kind}}}")
    response = httpx.get(f"{url}/{name}/abc")
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    params_at(f"/{name}/{{y}}")
    assert httpx.get(f"{url}/{name}/abc").text == "{'y': 'abc'}"


@pytest.mark.parametrize("error", [ValueError("no such thing"), SystemExit(3)], ids=["ValueError", "SystemExit"])
def test_a_convertor_that_raises_in_a_replica_only_is_unprocessable(
    client: serve.Client, params_at: Callable[[str], str], tmp_path: Path, error: BaseException
) -> None:
    converted = tmp_path / "converted"

    class Once(Convertor[str]):
        """Which is in the proxy."""

        regex = "[a-z]+"

        def convert(self, value: str) -> str:
            if converted.exists():
                raise error
            converted.touch()
            return value

        def to_string(self, value: str) -> str:
            return value

    kind, name = new_kind(), new_name("r")
    client.register_convertor(kind, Once)
    url = params_at(f"/{name}/{{x:{kind}}}")

    def refused_by_its_convertor() -> httpx.Response | None:
        """Not for its absence: the replica learns of it a moment after the proxy."""
        converted.unlink(missing_ok=True)
        answer = httpx.get(f"{url}/{name}/abc")
        return None if kind in answer.json()["detail"] else answer

    response = wait_until(refused_by_its_convertor)
    assert response is not None
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert f"the path parameters do not convert ({type(error).__name__}: {error})" in response.json()["detail"]
    other = new_name("r")
    assert httpx.get(f"{params_at(f'/{other}')}/{other}").text == "{}", "the replica lives"


def test_a_convertor_may_be_registered_after_the_backend_and_again(client: serve.Client, params_at: Callable[[str], str]) -> None:
    kind, name = new_kind(), new_name("r")

    class Hexadecimal(Convertor[int]):
        regex, base = "[0-9a-f]+", 16

        def convert(self, value: str) -> int:
            return int(value, self.base)

        def to_string(self, value: int) -> str:
            return f"{value:x}"

    class Octal(Hexadecimal):
        regex, base = "[0-7]+", 8

    other, unlike = new_name("r"), new_name("r")
    params_at(f"/{unlike}/{{x}}")  # so that a replica has started, and served
    client.register_convertor(kind, Hexadecimal)
    url = params_at(f"/{name}/{{x:{kind}}}")
    wait_until(lambda: httpx.get(f"{url}/{name}/1f").text == "{'x': 31}")
    client.register_convertor(kind, Octal)
    wait_until(lambda: httpx.get(f"{url}/{name}/17").text == "{'x': 15}")
    assert httpx.get(f"{url}/{name}/1f").status_code == 404
    params_at(f"/{other}/{{x:{kind}}}/{{y:{kind}}}")
    assert httpx.get(f"{url}/{other}/10/7").text == "{'x': 8, 'y': 7}"


class Waiting:
    """Is unpickled once its gate is open."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __reduce__(self) -> Any:
        return Gate.pass_through, (self._gate,)


@distributed_only  # in the embedded form proxies use the client's own class
def test_a_convertor_that_takes_long_to_import_keeps_nobody_waiting(
    client: serve.Client, params_at: Callable[[str], str], tmp_path: Path
) -> None:
    gate, kind, name = Gate(tmp_path), new_kind(), new_name("r")

    class Slow(StringConvertor):
        imported = Waiting(gate)

    url = params_at(f"/{name}/{{x}}")
    with ThreadPoolExecutor(1) as background:
        registering = background.submit(client.register_convertor, kind, Slow)
        try:
            wait_until(lambda: gate.came >= 2)  # in the proxy and in the replica
            assert httpx.get(f"{url}/{name}/word", timeout=20).text == "{'x': 'word'}"
            assert not registering.done()
        finally:
            gate.open()
        registering.result(30)


def test_what_is_no_convertor_is_refused_with_a_sentence(client: serve.Client) -> None:
    for convertor in (5, Refusing()):
        with pytest.raises(TypeError, match="a convertor is a Starlette Convertor class or its import string"):
            client.register_convertor(new_kind(), convertor)
    with pytest.raises(ValueError, match="is no name for a convertor"):
        client.register_convertor("größe", Refusing)


def test_a_convertor_that_a_route_could_not_be_matched_with_is_refused(
    client: serve.Client, params_at: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slug(Convertor[str]):
        regex = "[a-z]+"

        def convert(self, value: str) -> str:
            return value

        def to_string(self, value: str) -> str:
            return value

    class Nested(Slug):
        regex = "([a-z]+)*"

    kind, name = new_kind(), new_name("r")
    client.register_convertor(kind, Slug)
    url = params_at(f"/{name}/{{x:{kind}}}")
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(ValueError, match=r"cannot be matched in linear time by Python's re"):
        client.register_convertor(kind, Nested)
    assert httpx.get(f"{url}/{name}/abc").text == "{'x': 'abc'}"


@distributed_only
def test_a_route_that_only_its_client_can_match_is_refused_and_gone_again(
    client: serve.Client, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name = new_kind(), new_name("e")
    monkeypatch.setitem(CONVERTOR_TYPES, kind, Matching("[a-z]+"))  # with Starlette, and not with the instance
    backend = deploy(lambda request: "hello")
    with pytest.raises(serve.BackendFailed, match=f"a proxy cannot follow the change, which is undone: .*there is no convertor '{kind}'"):
        client.create_endpoint(name, backend=backend, route=f"/{name}/{{x:{kind}}}")
    assert name not in client.list_endpoints()
    client.create_endpoint(name, backend=backend, route=f"/{name}/{{x}}")
    assert httpx.get(f"{client.http_url()}/{name}/abc").text == "hello"
    client.delete_endpoint(name)


@distributed_only
def test_a_stored_route_that_cannot_be_matched_stops_no_proxy_and_is_told(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], joining: CommandLine, store_url: str
) -> None:
    key, bad = f"mqserve:{environment['MQSERVE_NAMESPACE']}", new_name("e")
    path = httpx.URL(deploy.at(lambda request: "hello")).path
    with redis.Redis.from_url(store_url) as store:

        def troubles() -> dict[str, str]:
            beats: Any = store.hgetall(f"{key}:beats")
            read = read_beats({field.decode(): raw for field, raw in beats.items()})
            return {beat.id: beat.error for beat in read.values() if beat.kind == "proxy" and beat.error}

        raw: Any = store.get(f"{key}:desired")
        desired = read_desired(raw)
        endpoint = Endpoint(bad, f"/{bad}/{{x:older}}", ("GET",), {next(iter(desired.backends)): 1.0})
        older = msgspec.structs.replace(desired, version=desired.version + 1, endpoints={bad: endpoint, **desired.endpoints})
        store.set(f"{key}:desired", older.to_bytes())
        store.publish(f"{key}:changed", b"")
        wait_until(lambda: len(troubles()) == 1)
        new_proxy = f"http://127.0.0.1:{(port := free_port())}"
        program = joining.start("proxy", "--port", str(port))
        wait_until(lambda: answers(f"{new_proxy}/-/readyz"), told=lambda: program.output)
        for url in (client.http_url(), new_proxy):
            assert httpx.get(url + path).text == "hello"
            assert httpx.get(f"{url}/{bad}/x").status_code == 404
        assert "there is no convertor 'older'" in program.wait_for("serving all routes but one")
        assert "there is no convertor 'older'" in joining.run("status").stdout
        later = deploy.at(lambda request: "later")
        assert httpx.get(later).text == "later", "others may change what they like"
        client.delete_endpoint(bad)
        wait_until(lambda: not troubles(), told=troubles)
