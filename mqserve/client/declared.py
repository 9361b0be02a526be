"""The short form: a decorator that records declarations, which `mqserve run` or a `deploying()` block deploys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..broker.errors import BadType, BadValue
from ..controller.changes import parse_config, parse_endpoint
from .deploying import Declaration, deploy_in_block

T = TypeVar("T", bound=Callable[..., Any])


_declarations: dict[str, Declaration] = {}


def endpoint(
    route: str | None,
    *,
    name: str | None = None,
    methods: Sequence[str] = ("GET", "POST"),
    actor_options: dict[str, Any] | None = None,
    **config: Any,
) -> Callable[[T], T]:
    """Declares a function or a class as a backend with an endpoint, and returns it unchanged.

    route: such as "/hello/{name}"; None for handles only. name: of both, by default the function's. config: BackendConfig fields. Raises
    BadType and BadValue for a bad route, method or setting, at the decorated line. `mqserve run` deploys it, or the `deploying()` block
    around it.
    """
    if callable(route):
        raise BadType(f"@serve.endpoint needs a route: write @serve.endpoint('/{getattr(route, '__name__', 'name')}')")
    parsed = parse_config(config)

    def declare(target: T) -> T:
        chosen = name or str(getattr(target, "__name__", type(target).__name__))
        parse_endpoint(chosen, chosen, route, methods)
        if chosen in _declarations and _declarations[chosen].target is not target:
            raise BadValue(f"two endpoints are named {chosen!r}: give one of them another name=")
        declaration = Declaration(chosen, target, route, list(methods), parsed, actor_options)
        if not deploy_in_block(declaration):
            _declarations[chosen] = declaration
        return target

    return declare


def take_declarations(only: Any = None) -> list[Declaration]:
    """Returns the declarations since the last call, in order; with `only` just that target's."""
    taken = [declaration for declaration in _declarations.values() if only is None or declaration.target is only]
    _declarations.clear()
    return taken
