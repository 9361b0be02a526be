"""Finds the endpoint of a request: the desired document's routes, as the proxies match them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..broker.errors import BadValue, NotRouted
from ..controller.state.documents import ANY_METHOD, Desired, Endpoint, Observed
from ..controller.state.route_patterns import Params, compile_route
from ..controller.state.traffic import entry_of, longest_s
from .route_index import PatternRoute, PrefixIndex, RouteIndex


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a request: its endpoint, the route's pattern, the path parameters as (name, convertor, text), and the `root_path` that
    the app gets if the route is a prefix."""

    endpoint: Endpoint
    pattern: str
    params: Params
    root_path: str = ""


@dataclass(frozen=True, slots=True)
class Piped:
    """The target is a pipeline, whose requests are jobs. It is no `Target`, so that nobody who serves other requests has to ask."""

    target: Target

    @property
    def endpoint(self) -> Endpoint:
        return self.target.endpoint


@dataclass(frozen=True, slots=True)
class NotAllowed:
    """The path exists, but not with this method."""

    methods: tuple[str, ...]


class _AnyMethod(frozenset[str]):
    """The methods of an endpoint that takes them all."""

    def __contains__(self, method: object) -> bool:
        return True


_ANY = _AnyMethod()
Leads = tuple[frozenset[str], Target | Piped]
"""The methods that an endpoint takes, and the target of requests with one of them."""


class RouteTable:
    """One version of the routes, replaced as a whole when the document changes. Literal paths win over patterns, then the older route
    wins. A path that neither matches goes to the longest prefix.

    What still applies is taken over from `before`, the previous table, so that a change of one endpoint costs little beside many.
    `left_out` holds the routes that cannot be matched here, with the reason: one such route, accepted by an older version, must not
    affect the others.
    """

    def __init__(self, desired: Desired, observed: Observed, before: RouteTable | None = None) -> None:
        self.version = (desired.epoch, desired.version)
        self.timeouts_s = {name: backend.config.request_timeout_s for name, backend in desired.backends.items()}
        self.replays_s = {name: backend.config.replay_s for name, backend in desired.backends.items()}
        self.at_most_once = {name for name, backend in desired.backends.items() if backend.config.delivery == "at_most_once"}
        self.apps = {name for name, backend in desired.backends.items() if backend.kind.is_app}  # which alone take WebSockets
        self.down_since = observed.down_since  # backend -> store ms since which no replica has been ready or starting
        self.left_out: dict[str, str] = {}
        self._endpoints = desired.endpoints
        self._patterns: dict[str, PatternRoute] = {}  # by route, as the two below
        self._literal: dict[str, Leads] = {}
        prefixes: dict[str, Leads] = {}
        for age, endpoint in enumerate(desired.endpoints.values()):
            if endpoint.route is None:
                continue
            if endpoint.prefix:
                prefixes[endpoint.route] = _allowed(endpoint), Target(endpoint, endpoint.route, (), endpoint.route.rstrip("/"))
            else:
                self._add(age, endpoint.route, endpoint, before)
        self._index = RouteIndex(self._patterns.values())
        self._prefixes = PrefixIndex(prefixes)

    def _add(self, age: int, route: str, endpoint: Endpoint, before: RouteTable | None) -> None:
        """Adds a route, as it is in `before` if nothing of it has changed."""
        literal = before._literal.get(route) if before is not None else None
        if literal is not None:
            is_same = literal[1].endpoint is endpoint
            self._literal[route] = literal if is_same else (_allowed(endpoint), _target(endpoint, route, ()))
            return
        known = before._patterns.get(route) if before is not None else None
        if known is not None and known.pattern.is_current():
            is_same = known.endpoint is endpoint and known.age == age
            self._patterns[route] = known if is_same else PatternRoute.of(age, known.pattern, endpoint, _allowed(endpoint))
            return
        try:
            pattern = compile_route(route)
        except BadValue as error:
            self.left_out[route] = str(error)
            return
        if pattern.variables:
            self._patterns[route] = PatternRoute.of(age, pattern, endpoint, _allowed(endpoint))
        else:
            self._literal[route] = (_allowed(endpoint), _target(endpoint, route, ()))

    def entry(self, endpoint: Endpoint) -> Endpoint:
        """Returns the endpoint whose traffic decides where a request goes first. Raises NotRouted for a pipeline of an earlier table
        whose endpoints have gone with it."""
        try:
            return entry_of(endpoint, self._endpoints)
        except KeyError as error:
            raise NotRouted(f"pipeline {endpoint.name!r} was deleted a moment ago, with its endpoints") from error

    def longest_s(self, pipeline: Endpoint) -> float:
        """Returns how long its requests may be awaited."""
        return longest_s(pipeline, self._endpoints, self.timeouts_s)

    @property
    def listing(self) -> dict[str, list[Any]]:
        """The served routes, and endpoints without one by their names, with the endpoint's name and methods."""
        return {
            endpoint.route or name: [name, list(endpoint.methods)]
            for name, endpoint in self._endpoints.items()
            if endpoint.route not in self.left_out
        }

    def __repr__(self) -> str:
        return f"<RouteTable {self.version}, {len(self._endpoints)} endpoints, {len(self.left_out)} left out>"

    def match(self, path: str, method: str) -> Target | Piped | NotAllowed | None:
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
                return _target(route.endpoint, route.pattern.route, params)
            refused = refused or NotAllowed(route.endpoint.methods)
        if refused is not None:
            return refused
        prefix = self._prefixes.find(path)
        if prefix is None:
            return None
        allowed, target = prefix
        return target if method in allowed else NotAllowed(target.endpoint.methods)


def _target(endpoint: Endpoint, pattern: str, params: Params) -> Target | Piped:
    target = Target(endpoint, pattern, params)
    return Piped(target) if endpoint.stages else target


def _allowed(endpoint: Endpoint) -> frozenset[str]:
    if ANY_METHOD in endpoint.methods:
        return _ANY
    return frozenset((*endpoint.methods, "HEAD") if "GET" in endpoint.methods else endpoint.methods)
