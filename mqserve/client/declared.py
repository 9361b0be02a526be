"""The short forms: a decorator and a function that record declarations, which `mqserve run` or a `deploying()` block deploys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..broker.errors import BadType, BadValue
from ..controller.changes import check_prefix, parse_config
from ..controller.endpoint_parsing import parse_endpoint
from ..controller.state.config import BackendConfig
from ..replicas.asgi_apps import is_asgi_app, makes_asgi_apps
from ..replicas.context import is_importing
from .deploying import Declaration, deploy_in_block

T = TypeVar("T", bound=Callable[..., Any])


_declarations: dict[str, Declaration] = {}


def endpoint(
    route: str | None,
    *,
    name: str | None = None,
    methods: Sequence[str] = (),
    actor_options: dict[str, Any] | None = None,
    **config: Any,
) -> Callable[[T], T]:
    """Declares a function or a class as a backend with an endpoint, and returns it unchanged.

    route: such as "/hello/{name}"; None for handles only; a prefix if the class is an ASGI app (`serve.ingress`). name: of both, by default
    the function's. methods: GET and POST by default, all of them for an app. config: BackendConfig fields. Raises BadType and BadValue for
    a bad route, method or setting, at the decorated line. `mqserve run` deploys it, or the `deploying()` block around it.
    """
    if callable(route):
        raise BadType(f"@serve.endpoint needs a route: write @serve.endpoint('/{getattr(route, '__name__', 'name')}')")
    if "config" in config:
        raise BadValue("@serve.endpoint takes settings of the backend as keywords: num_replicas=2, not config={'num_replicas': 2}")
    parsed = parse_config(config)

    def declare(target: T) -> T:
        chosen = name or str(getattr(target, "__name__", type(target).__name__))
        is_app = is_asgi_app(target) or makes_asgi_apps(target)
        chosen_methods = methods if methods != () or is_app else ("GET", "POST")
        parse_endpoint(chosen, chosen, route, chosen_methods)
        declaration = Declaration(chosen, target, route, chosen_methods, parsed, actor_options)
        if not deploy_in_block(declaration):
            declare_with_file(declaration)
        return target

    return declare


def make_mount(
    route: str,
    app: Any,
    init_args: tuple[Any, ...],
    name: str | None,
    methods: Sequence[str],
    config: BackendConfig | dict[str, Any] | None,
    actor_options: dict[str, Any] | None,
    misplaced: Mapping[str, Any],
    *,
    factory: bool,
) -> Declaration:
    """Returns the declaration of an app under a prefix. Raises BadType and BadValue for a bad route, method or setting, and for keywords
    that `serve.mount` does not have."""
    if misplaced:
        settings = ", ".join(f"{name!r}: …" for name in misplaced)
        raise BadType(f"serve.mount has no {', '.join(misplaced)}: it takes the settings of the backend as config={{{settings}}}")
    if not isinstance(route, str):
        raise BadType(f"serve.mount takes the prefix and then the app, as in serve.mount('/v1', app), not {route!r}")
    check_prefix(route)
    chosen = name or route.strip("/").replace("/", "-") or "root"
    parse_endpoint(chosen, chosen, route, methods)
    parsed = parse_config(config)
    return Declaration(chosen, app, route, methods, parsed, actor_options, init_args, factory=factory, is_mount=True)


def declare_with_file(declaration: Declaration) -> None:
    """Keeps a declaration for `mqserve run`, which deploys it when the file has been executed; in a replica nobody would. Raises BadValue
    if its name is taken."""
    if is_importing():
        return
    known = _declarations.get(declaration.name)
    if known is not None and known.target is not declaration.target:
        raise BadValue(f"two endpoints are named {declaration.name!r}: give one of them another name=")
    _declarations[declaration.name] = declaration


def take_declarations(only: Any = None) -> list[Declaration]:
    """Returns the declarations since the last call, in order; with `only` just that target's."""
    taken = [declaration for declaration in _declarations.values() if only is None or declaration.target is only]
    _declarations.clear()
    return taken
