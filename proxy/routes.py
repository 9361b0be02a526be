"""Which endpoint a request is for: Starlette's routes and convertors over the desired document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import Match, Route

from ..controller.state import Desired, Endpoint, Observed

Params = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: its endpoint, the route's pattern, and the path parameters as (name, convertor, text)."""

    endpoint: Endpoint
    pattern: str
    params: Params


@dataclass(frozen=True, slots=True)
class NotAllowed:
    """The path exists, the method does not."""

    methods: tuple[str, ...]


class RouteTable:
    """One version of the routes; replaced whole when the document changes. Literal paths win over patterns, then the older wins."""

    def __init__(self, desired: Desired, observed: Observed) -> None:
        self.version = (desired.epoch, desired.version)
        self.timeouts_s = {name: backend.config.request_timeout_s for name, backend in desired.backends.items()}
        self.at_most_once = {name for name, backend in desired.backends.items() if backend.config.delivery == "at_most_once"}
        self.down_since = observed.down_since  # backend -> store ms since which no replica has been ready or starting
        self._literal: dict[str, tuple[Route, Target]] = {}
        self._patterns: list[tuple[Route, Endpoint, dict[str, str]]] = []
        self.listing: dict[str, list[Any]] = {}
        for endpoint in desired.endpoints.values():
            self.listing[endpoint.route or endpoint.name] = [endpoint.name, list(endpoint.methods)]
            if endpoint.route is not None:
                self._add(endpoint, endpoint.route)

    def __repr__(self) -> str:
        return f"<RouteTable {self.version}, {len(self.listing)} endpoints>"

    def match(self, scope: dict[str, Any]) -> Target | NotAllowed | None:
        literal = self._literal.get(scope["path"])
        if literal is not None:
            route, target = literal
            return target if scope["method"] in (route.methods or ()) else NotAllowed(target.endpoint.methods)
        refused: NotAllowed | None = None
        for route, endpoint, convertors in self._patterns:
            try:
                match, _ = route.matches(scope)
            except ValueError:
                continue  # a convertor refused the text: it is no such path
            if match is Match.FULL:
                return Target(endpoint, route.path, _params(route, convertors, scope["path"]))
            if match is Match.PARTIAL:
                refused = refused or NotAllowed(endpoint.methods)
        return refused

    def _add(self, endpoint: Endpoint, path: str) -> None:
        route = Route(path, endpoint=_never_called, methods=list(endpoint.methods))
        if not route.param_convertors:
            self._literal[path] = (route, Target(endpoint, path, ()))
            return
        names = {convertor: name for name, convertor in CONVERTOR_TYPES.items()}
        self._patterns.append((route, endpoint, {name: names[convertor] for name, convertor in route.param_convertors.items()}))


def _params(route: Route, convertors: dict[str, str], path: str) -> Params:
    found = route.path_regex.match(path)
    return tuple((name, convertors[name], text) for name, text in found.groupdict().items()) if found else ()


async def _never_called(request: object) -> None:
    """Starlette wants an endpoint; the queue is ours."""
