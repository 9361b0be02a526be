"""`@serve.ingress(app)`: a class whose methods are routes of an ASGI app, and whose instance each replica constructs once.

FastAPI reads the parameters of a route from the function's signature. So the first parameter of a method, `self`, is declared as a
dependency there, which reads the instance from the scope of the request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..broker.errors import BadType
from .asgi_apps import ASGIApp, Message, Scope, is_asgi_app

K = TypeVar("K", bound=type)

_APP = "_mqserve_app"
_SELF = "mqserve.self"  # in the scope of a request
_IS_GIVEN = "_mqserve_self"  # an attribute of methods that declare `self` as a dependency


def ingress(app: ASGIApp) -> Callable[[K], K]:
    """Makes a class an ASGI backend that answers by `app`. Each replica constructs the class once; methods that are FastAPI routes of `app`
    get the instance as `self`, and other code finds it in the request's scope, under "mqserve.self". Returns the class itself.

    Raises BadType for an app that is none, a class that has a `__call__` of its own, and anything that is no class.
    """
    if not is_asgi_app(app):
        raise BadType(f"@serve.ingress takes an ASGI app, such as FastAPI(), and {app!r} is none: write @serve.ingress(app)")

    def decorate(target: K) -> K:
        if not inspect.isclass(target):
            raise BadType(f"@serve.ingress({type(app).__name__}) decorates a class, not {target!r}: serve.mount takes an app by itself")
        if any("__call__" in vars(base) for base in target.__mro__):
            raise BadType(f"{target.__qualname__} has a __call__, and @serve.ingress makes one that calls the app: name it otherwise")
        _give_self(app, target)

        async def call(self: Any, scope: Scope, receive: Callable[[], Any], send: Callable[[Message], Any]) -> None:
            if scope["type"] == "lifespan":
                _give_self(app, target)  # routes of routers that the app has included after the class
            scope[_SELF] = self
            await app(scope, receive, send)

        setattr(target, _APP, app)
        setattr(target, "__call__", call)  # noqa: B010  # an assignment would look like one to a method of `type`
        return target  # pyright: ignore[reportReturnType]  `isclass` has narrowed it to something else than K

    return decorate


def app_of(target: Any) -> ASGIApp | None:
    """Returns the app of a class that `ingress` decorated, else None."""
    return getattr(target, _APP, None) if inspect.isclass(target) else None


def _give_self(app: Any, target: type) -> None:
    """Declares `self` as a dependency in each method of the class that is a FastAPI route of the app, or of a router that the app includes,
    and lets FastAPI read it again. Leaves alone those that have it."""
    methods = [value for base in target.__mro__ for value in vars(base).values() if inspect.isfunction(value)]
    found = [
        (router, route)
        for router in _routers(getattr(app, "router", None))
        for route in router.routes
        if any(getattr(route, "endpoint", None) is method and _IS_GIVEN not in vars(method) for method in methods)
    ]
    if not found:
        return
    from fastapi import APIRouter, Depends
    from fastapi.requests import HTTPConnection

    async def instance(connection: HTTPConnection) -> Any:  # async, since FastAPI runs plain ones in threads
        return connection.scope[_SELF]

    instance.__annotations__["connection"] = HTTPConnection  # where annotations are text, FastAPI would look for the name in this module
    for method in {route.endpoint for _, route in found}:
        _declare_self(method, Depends(instance))
    for router, route in found:
        _read_again(router, route, APIRouter())


def _routers(router: Any) -> list[Any]:
    """Returns the router of a FastAPI app and those that it includes, each once. Some versions of FastAPI keep an included router, others
    copy its routes."""
    found: list[Any] = [router] if hasattr(router, "include_router") else []
    for one in found:
        for route in one.routes:
            included = getattr(route, "original_router", None)
            if included is not None and all(included is not other for other in found):
                found.append(included)
    return found


def _declare_self(method: Any, dependency: Any) -> None:
    signature = inspect.signature(method)
    first, *others = signature.parameters.values()
    keyword_only = [one.replace(kind=one.KEYWORD_ONLY) if one.kind is one.POSITIONAL_OR_KEYWORD else one for one in others]
    declared = first.replace(default=dependency, kind=first.KEYWORD_ONLY, annotation=Any)
    method.__signature__ = signature.replace(parameters=[declared, *keyword_only])
    setattr(method, _IS_GIVEN, True)


def _read_again(router: Any, route: Any, own: Any) -> None:
    """Includes the route in its own router once more, in its place: FastAPI reads the signature of a route that is included."""
    own.routes.append(route)
    common = {name: getattr(router, name) for name in ("prefix", "dependencies", "tags", "callbacks")}  # the route has them
    count, at = len(router.routes), router.routes.index(route)
    try:
        for name, value in common.items():
            setattr(router, name, type(value)())
        router.include_router(own)
    finally:
        for name, value in common.items():
            setattr(router, name, value)
    included = router.routes[count:]
    del router.routes[count:]
    router.routes[at : at + 1] = included
