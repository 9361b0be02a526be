"""Reads what users say of endpoints: routes, methods and traffic."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..broker.errors import BadType, BadValue
from .state.documents import Endpoint
from .state.route_patterns import compile_route


def parse_endpoint(name: str, backend: object, route: object, methods: object) -> Endpoint:
    """Returns the endpoint. Without methods it has none yet: `create_endpoint` fills in those that its backend suggests. Raises BadType
    as Ray Serve 1.x does, and BadValue for a route that does not parse."""
    if not isinstance(backend, str):
        raise BadType(f"endpoint {name!r} needs the name of its backend as a str: create_endpoint({name!r}, backend='…')")
    read = read_methods(name, methods)
    return Endpoint(name, parse_route(name, route), tuple(method.upper() for method in read), {backend: 1.0})


def parse_route(name: str, route: object) -> str | None:
    """Raises BadType and BadValue for a route that cannot be served."""
    if route is None:
        return None
    if not (isinstance(route, str) and route.startswith("/")):
        raise BadType(f"route {route!r} of endpoint {name!r} must be None or a str that starts with '/', such as '/{name}'")
    _check_route(route)
    return route


def read_methods(name: str, methods: object) -> Sequence[str]:
    if methods == ():
        return ()
    if not isinstance(methods, list | tuple) or not methods or not all(isinstance(method, str) for method in methods):
        raise BadType(f"methods of endpoint {name!r} must be a list of names such as ['GET', 'POST'], not {methods!r}")
    for method in methods:
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", method):
            raise BadValue(f"{method!r} is no HTTP method: methods of endpoint {name!r} are names such as 'GET'")
    return methods


def _check_route(route: str) -> None:
    if route == "/-" or route.startswith("/-/"):
        raise BadValue(f"route {route!r} lies under '/-/', which belongs to the system: choose another")
    compile_route(route)


def parse_traffic(traffic: object) -> dict[str, float]:
    """Returns the weights. Raises BadType unless `traffic` is a dict of numbers, BadValue for negative weights or a sum other than 1
    (within 1e-5, as in Ray Serve 1.x)."""
    if not isinstance(traffic, dict):
        raise BadType(f"traffic must be a dict such as {{'new': 0.1, 'old': 0.9}}, not {type(traffic).__name__}")
    for backend, weight in traffic.items():
        if not isinstance(backend, str):
            raise BadType(f"traffic goes to backends by name, and {backend!r} is no str")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadType(f"the weight of backend {backend!r} must be a number, not {weight!r}")
        if not 0 <= weight < 2:
            raise BadValue(f"the weight of backend {backend!r} is {weight}: weights are 0 or more, and sum to 1")
    if abs(sum(traffic.values()) - 1) > 1e-5:
        raise BadValue(f"the weights {traffic} sum to {sum(traffic.values()):g}: they must sum to 1")
    return {backend: float(weight) for backend, weight in traffic.items()}
