"""The user's code as a handler: a function as it is, a class constructed with its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..broker.errors import BadType
from .asgi_apps import HostedApp, is_asgi_app
from .batch_decorators import accepts_batch

RESERVED_METHODS = frozenset({"reconfigure", "check_health"})


class NoSuchMethod(BadType):
    """The caller named a method that the backend does not offer."""

    status = 404


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity, since the user's instance inside may not be hashable
class Method:
    """A function or method that requests call, or an ASGI app that answers them."""

    function: Callable[..., Any]
    is_async: bool
    accepts_batch: bool
    takes_request: bool
    steps_batch: bool = False  # it yields a list of items, one for each request of its batch, again and again
    is_app: bool = False


class Handler:
    """A deployed function or instance, or an ASGI `app`. Looks up each of its methods once."""

    def __init__(self, target: Any, *, is_function: bool) -> None:
        self._target = target
        self._is_function = is_function
        self._methods: dict[str, Method] = {}
        self.app = HostedApp(target) if is_asgi_app(target) else None
        self.is_async = self.app is not None or is_async_callable(target)
        self.accepts_batch = self.app is None and accepts_batch(target)
        self._hooks = {} if is_function else {name: getattr(target, name, None) for name in RESERVED_METHODS}

    def __repr__(self) -> str:
        return f"<Handler of {type(self._target).__name__}>"

    def hook(self, name: str) -> Callable[..., Any] | None:
        """Returns `reconfigure` or `check_health`, which only we call, or None if the code has none."""
        found = self._hooks.get(name)
        return found if callable(found) else None

    def method(self, call: str) -> Method:
        """Returns a public method of the user's class by its name, which is empty for `__call__`. Raises NoSuchMethod."""
        found = self._methods.get(call)
        if found is None:
            found = self._methods[call] = make_method(self._find(call)) if self.app is None else _make_app_method(self.app, call)
        return found

    def _find(self, call: str) -> Callable[..., Any]:
        if call in ("", "__call__"):
            if not callable(self._target):
                raise NoSuchMethod(f"{type(self._target).__name__} has no __call__: name a method, or give the class one")
            return self._target  # type: ignore[no-any-return]
        offered = [] if self._is_function else _public_methods(type(self._target))
        if call not in offered:
            raise NoSuchMethod(f"the backend has no method {call!r} to call (it offers {', '.join(['__call__', *offered])})")
        return getattr(self._target, call)  # type: ignore[no-any-return]


def make_handler(target: Any, args: list[Any], *, is_factory: bool = False, must_be_app: bool = False) -> Handler:
    """Returns the handler; constructs a class, and calls a function that makes an app. Raises the exceptions of the user's constructor, and
    BadType for a handler that cannot be called with a request, or for anything else than the app that it must be."""
    is_class = inspect.isclass(target)
    made = target(*args) if is_class or is_factory else target
    handler = Handler(made, is_function=not is_class)
    if must_be_app and handler.app is None:
        what = f"its factory returned a {type(made).__name__}" if is_factory else f"it is a {type(made).__name__}"
        raise BadType(f"{what}, which is no ASGI app: an app is called as `await app(scope, receive, send)`")
    if callable(made):  # a class may have named methods only
        handler.method("")
    return handler


def _make_app_method(app: HostedApp, call: str) -> Method:
    if call not in ("", "__call__"):
        raise NoSuchMethod(f"the backend is an ASGI app, which has no method {call!r} to call: its routes are what it offers")
    return Method(app, is_async=True, accepts_batch=False, takes_request=False, is_app=True)


def make_method(function: Callable[..., Any]) -> Method:
    """Returns the Method of a function. Raises BadType if a request does not fit its signature."""
    in_batches = accepts_batch(function)
    takes_request = is_given_the_request(function)
    if in_batches and not takes_request:
        raise BadType("a handler of batches needs a parameter for the list of requests: def handler(requests)")
    steps_batch = in_batches and _is_any(_GENERATOR_FUNCTIONS, function)
    return Method(function, is_async_callable(function), in_batches, takes_request, steps_batch)


def is_given_the_request(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter for the request; True if its signature cannot be read. Raises BadType if it needs more than the
    request."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    for arguments, is_given in (((None,), True), ((), False)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return is_given
    raise BadType(f"a handler is called with the request alone, and {signature} needs more: give the other parameters defaults")


def is_async_callable(target: Any) -> bool:
    """Whether calls of it run on the worker's loop: an `async def`, also one that yields."""
    return _is_any((inspect.iscoroutinefunction, inspect.isasyncgenfunction), target)


_GENERATOR_FUNCTIONS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def _is_any(kinds: Sequence[Callable[[Any], bool]], target: Any) -> bool:
    """Whether the function, or the `__call__` of an instance, is of one of the kinds."""
    call = target if inspect.isroutine(target) else getattr(target, "__call__", None)  # noqa: B004
    return any([kind(target) or kind(call) for kind in kinds])


def _public_methods(kind: type) -> list[str]:
    return [
        name
        for name in dir(kind)
        if not name.startswith("_") and name not in RESERVED_METHODS and inspect.isroutine(inspect.getattr_static(kind, name))
    ]
