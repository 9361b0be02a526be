"""Any route is refused with a sentence or matches any path as Starlette does, alone and among others."""

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import Match, Route, compile_path

from mqserve.broker.errors import BadValue
from mqserve.controller.endpoint_parsing import parse_endpoint
from mqserve.controller.state.documents import Backend, Desired, Endpoint, Observed
from mqserve.controller.state.route_patterns import compile_route
from mqserve.proxy.routes import NotAllowed, RouteTable, Target
from tests.convertors import Matching

OWN = ["str", "path", "int", "float", "uuid"]
REGISTERED = {
    "word": "[a-z]+",
    "date": r"\d{4}-\d{2}",
    "signed": r"-?\d+",
    "size": "ab|c",
    "undotted": r"[^.]*",
    "slug": "[a-z]+(-[a-z]+)*",
    "text": r"\w+",
    "odd": "(a|ab)(c|bcd)*",
}
UUID = "6b4e0342-3667-401b-9ef3-a04c5d9f3b0e"

literals = st.lists(
    st.sampled_from(["/", "/", "-", ".", "a", "1", "ab", "//", "é", "%", "%2f", "\n", " ", "+", "a-", "-/"]),
    max_size=3,
).map("".join)
texts = st.lists(
    st.sampled_from(
        ["a", "b", "c", "1", "2", ".", "-", "/", "//", "\n", "\r", "é", "٣", "%", "%20", " ", "ab", "1.5", "2024-05", "", UUID],
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, regex in REGISTERED.items():
            patch.setitem(CONVERTOR_TYPES, name, Matching(regex))
        yield


@st.composite
def routes(draw: st.DrawFn, kinds: list[str]) -> str:
    route = "/"
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(kinds))
        name = f"v{9 - number}"  # not in the order of the alphabet
        route += draw(literals) + "{" + (name if kind == "str" else f"{name}:{kind}") + "}"
    return route + draw(literals)


@st.composite
def paths(draw: st.DrawFn, route: str) -> str:
    """Some that match it, some that nearly do."""
    if draw(st.integers(0, 4)) == 0:
        return "/" + draw(texts)
    parts = route.replace("}", "{").split("{")
    path = "".join([part if number % 2 == 0 else draw(texts) for number, part in enumerate(parts)])
    return path + draw(st.sampled_from(["", "", "", "\n", "\n\n", "/", "a"]))


def starlettes(route: str, path: str) -> list[tuple[str, str]] | None:
    found = compile_path(route)[0].match(path)
    return None if found is None else list(found.groupdict().items())


def ours(route: str, path: str) -> list[tuple[str, str]] | None:
    pattern = compile_route(route)
    found = pattern.find(path)
    return None if found is None else list(zip([variable.name for variable in pattern.variables], found, strict=True))


def check(route: str, path: str) -> None:
    if "{" in route:  # Starlette's table of literal routes is ours: there a line feed at the end counts
        assert ours(route, path) == starlettes(route, path)


@given(st.data())
def test_a_route_of_starlettes_own_convertors_matches_as_starlettes_does(data: st.DataObject) -> None:
    route = data.draw(routes(OWN))
    check(route, data.draw(paths(route)))


@given(st.data())
def test_a_route_of_registered_convertors_matches_as_starlettes_does(data: st.DataObject) -> None:
    route = data.draw(routes([*OWN, *REGISTERED]))
    check(route, data.draw(paths(route)))


@given(st.data())
def test_without_re2_it_matches_so_or_is_refused(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "re2", None)
        route = data.draw(routes([*OWN, *REGISTERED]))
        try:
            compile_route(route)
        except BadValue as refused:
            assert "mqserve[re2]" in str(refused)
        else:
            check(route, data.draw(paths(route)))


@given(
    st.lists(st.text(st.characters(exclude_categories=())) | st.sampled_from(["{", "}", "{a}", ":int", "{a:int}", "/", "-"]), max_size=8)
)
def test_any_text_is_a_route_or_refused(parts: list[str]) -> None:
    try:
        endpoint = parse_endpoint("e", "b", "/" + "".join(parts), ["GET"])
    except BadValue as refused:
        assert str(refused)
    else:
        compile_path(endpoint.route or "")


# Many routes.

METHODS = st.lists(st.sampled_from(["GET", "POST", "HEAD"]), min_size=1, max_size=2, unique=True)
PREFIXES = st.sampled_from(["/", "/a", "/b", "/a/b", "/a//b", "/a/b/a", "/1", "/a-1"])
SEGMENTS = st.sampled_from(["a", "b", "", "{x}", "{x:int}", "{x}-{y}", "a{x}", "{x:path}", "{x:path}a", "{x:int}.{y}"])


@st.composite
def tables(draw: st.DrawFn) -> Desired:
    endpoints: dict[str, Endpoint] = {}
    for number in range(draw(st.integers(1, 12))):
        segments = draw(st.lists(SEGMENTS, min_size=1, max_size=4))
        route = "/" + "/".join(segment.replace("{x", f"{{x{at}").replace("{y", f"{{y{at}") for at, segment in enumerate(segments))
        if route not in {endpoint.route for endpoint in endpoints.values()}:
            endpoints[f"e{number}"] = Endpoint(f"e{number}", route, tuple(draw(METHODS)), {"b": 1.0})
    for prefix in draw(st.lists(PREFIXES, max_size=4, unique=True)):
        if prefix not in {endpoint.route for endpoint in endpoints.values()}:
            endpoints[prefix] = Endpoint(prefix, prefix, tuple(draw(METHODS)), {"b": 1.0}, prefix=True)
    return Desired(backends={"b": Backend("b", "c0de", "f")}, endpoints=endpoints)


def one_by_one(desired: Desired, path: str, method: str) -> Target | NotAllowed | None:
    """Literal paths first; then the oldest pattern that takes path and method; then the oldest that takes the path; then the longest
    prefix."""
    refused = None
    exact = [endpoint for endpoint in desired.endpoints.values() if not endpoint.prefix]
    endpoints = sorted(exact, key=lambda endpoint: "{" in (endpoint.route or ""))
    for endpoint in endpoints:
        assert endpoint.route is not None
        route = Route(endpoint.route, endpoint=check, methods=list(endpoint.methods))
        if not route.param_convertors and endpoint.route != path:
            continue
        match, _ = route.matches({"type": "http", "path": path, "method": method})
        if match is Match.FULL:
            found = route.path_regex.match(path)
            params = [(name, text) for name, text in found.groupdict().items()] if found else []
            kinds = {name: next(kind for kind in OWN if CONVERTOR_TYPES[kind] is one) for name, one in route.param_convertors.items()}
            return Target(endpoint, endpoint.route, tuple((name, kinds[name], text) for name, text in params))
        if match is Match.PARTIAL and not route.param_convertors:
            return NotAllowed(endpoint.methods)
        if match is Match.PARTIAL:
            refused = refused or NotAllowed(endpoint.methods)
    return refused or longest_prefix(desired, path, method)


def longest_prefix(desired: Desired, path: str, method: str) -> Target | NotAllowed | None:
    prefixes = sorted((endpoint for endpoint in desired.endpoints.values() if endpoint.prefix), key=lambda one: -len(one.route or ""))
    for endpoint in prefixes:
        assert endpoint.route is not None
        root = endpoint.route.rstrip("/")
        if (path + "/").startswith(root + "/"):
            allowed = {*endpoint.methods, *(["HEAD"] if "GET" in endpoint.methods else [])}
            return Target(endpoint, endpoint.route, (), root) if method in allowed else NotAllowed(endpoint.methods)
    return None


@given(tables(), st.data())
def test_a_table_finds_what_trying_one_by_one_finds(desired: Desired, data: st.DataObject) -> None:
    table = RouteTable(desired, Observed())
    assert not table.left_out
    rebuilt = RouteTable(desired, Observed(), table)
    for _ in range(5):
        route = data.draw(st.sampled_from([endpoint.route or "" for endpoint in desired.endpoints.values()]))
        below = data.draw(st.sampled_from(["", "", "/", "/x", "x", "//b"]))
        path, method = data.draw(paths(route)) + below, data.draw(st.sampled_from(["GET", "POST", "HEAD", "PUT"]))
        assert table.match(path, method) == one_by_one(desired, path, method)
        assert rebuilt.match(path, method) == table.match(path, method)
