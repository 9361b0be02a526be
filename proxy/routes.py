"""Finds the endpoint of a request: the desired document's routes, as the proxies match them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..broker.errors import BadValue
from ..controller.state.documents import Desired, Endpoint, Observed
from ..controller.state.route_patterns import Params, RoutePattern, compile_route
from .route_index import PatternRoute, RouteIndex


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a request: its endpoint, the route's pattern, and the path parameters as (name, convertor, text)."""

    endpoint: Endpoint
    pattern: str
    params: Params


@dataclass(frozen=True, slots=True)
class NotAllowed:
    """The path exists, but not with this method."""

    methods: tuple[str, ...]


class RouteTable:
    """One version of the routes, replaced as a whole when the document changes. Literal paths win over patterns, then the older route
    wins.

    Compiled patterns that still apply are reused from `before`, the previous table. `left_out` holds the routes that cannot be matched
    here, with the reason: one such route, accepted by an older version, must not affect the others.
    """

    def __init__(self, desired: Desired, observed: Observed, before: RouteTable | None = None) -> None:
        self.version = (desired.epoch, desired.version)
        self.timeouts_s = {name: backend.config.request_timeout_s for name, backend in desired.backends.items()}
        self.at_most_once = {name for name, backend in desired.backends.items() if backend.config.delivery == "at_most_once"}
        self.down_since = observed.down_since  # backend -> store ms since which no replica has been ready or starting
        self.listing: dict[str, list[Any]] = {}
        self.left_out: dict[str, str] = {}
        self._compiled: dict[str, RoutePattern] = {}
        self._literal: dict[str, tuple[frozenset[str], Target]] = {}
        patterns: list[PatternRoute] = []
        for age, endpoint in enumerate(desired.endpoints.values()):
            if endpoint.route is not None:
                pattern = self._compile(endpoint.route, before)
                if pattern is None:
                    continue
                if pattern.variables:
                    patterns.append(PatternRoute(age, pattern, endpoint, _allowed(endpoint)))
                else:
                    self._literal[endpoint.route] = (_allowed(endpoint), Target(endpoint, endpoint.route, ()))
            self.listing[endpoint.route or endpoint.name] = [endpoint.name, list(endpoint.methods)]
        self._index = RouteIndex(patterns)

    def __repr__(self) -> str:
        return f"<RouteTable {self.version}, {len(self.listing)} endpoints, {len(self.left_out)} left out>"

    def match(self, path: str, method: str) -> Target | NotAllowed | None:
        literal = self._literal.get(path)
        if literal is not None:
            allowed, target = literal
            return target if method in allowed else NotAllowed(target.endpoint.methods)
        refused: NotAllowed | None = None
        for route in self._index.find(path):
            params = route.pattern.match(path)
            if params is None:
                continue
            if method in route.methods:
                return Target(route.endpoint, route.pattern.route, params)
            refused = refused or NotAllowed(route.endpoint.methods)
        return refused

    def _compile(self, route: str, before: RouteTable | None) -> RoutePattern | None:
        """Compiles a route, or reuses it from the table `before` if its convertors are unchanged."""
        pattern = before._compiled.get(route) if before is not None else None
        if pattern is None or not pattern.is_current():
            try:
                pattern = compile_route(route)
            except BadValue as error:
                self.left_out[route] = str(error)
                return None
        self._compiled[route] = pattern
        return pattern


def _allowed(endpoint: Endpoint) -> frozenset[str]:
    return frozenset((*endpoint.methods, "HEAD") if "GET" in endpoint.methods else endpoint.methods)
