"""The arguments of a deployment, checked before anything is sent."""

from __future__ import annotations

from typing import Any, cast

from starlette.convertors import Convertor

from ..broker.errors import BadType, BadValue
from ..broker.values import code
from ..controller.changes import check_app
from ..controller.state.config import BackendConfig
from ..controller.state.documents import CodeKind
from ..controller.state.resources import ActorOptions, parse_actor_options
from ..replicas.app_copies import holds_an_app
from ..replicas.asgi_apps import is_asgi_app, makes_asgi_apps
from ..replicas.batch_decorators import accepts_batch
from ..replicas.handler import make_method


def make_convertor(convertor: Any) -> Convertor[Any]:
    """Raises BadType for what is neither a class nor the import string of one, and what importing and making it raises."""
    kind = code.load_import_string(convertor) if isinstance(convertor, str) else convertor
    if not callable(kind):
        raise BadType(f"a convertor is a Starlette Convertor class or its import string 'pkg.mod:Class', and {convertor!r} is neither")
    return cast("Convertor[Any]", kind())


def read_actor_options(options: dict[str, Any] | None, seed_options: dict[str, Any] | None, *, embedded: bool) -> ActorOptions:
    """`ray_actor_options` is an alias. Raises BadValue for what one process cannot give its replicas."""
    parsed = parse_actor_options(options if options is not None else seed_options)
    refused = {"num_gpus": parsed.demand.num_gpus, "python": parsed.python, "pip": parsed.pip}
    if embedded and any(refused.values()):
        names = ", ".join(name for name, value in refused.items() if value)
        raise BadValue(
            f"actor_options {names} cannot be had in the embedded form, where all replicas share one process: "
            "set MQSERVE_BROKER_URL and MQSERVE_STORE_URL"
        )
    return parsed


def kind_of(target: Any, *, factory: bool, embedded: bool) -> CodeKind:
    """Returns what the code is, as far as that can be seen before it is imported or constructed."""
    if factory:
        return CodeKind.APP
    if isinstance(target, str):
        return CodeKind.NAMED
    if embedded and holds_an_app(target):
        return CodeKind.APP_OBJECT
    return CodeKind.APP if is_asgi_app(target) or makes_asgi_apps(target) else CodeKind.HANDLER


def mounted(name: str, kind: CodeKind) -> CodeKind:
    """Returns the kind of what is mounted, which is an app also where only its import string is known. Raises BadType for a handler."""
    if kind is CodeKind.HANDLER:
        raise BadType(
            f"{name!r} is no ASGI app, so it cannot be mounted: decorate a function or a class with @serve.endpoint, or write factory=True "
            "for a function that returns an app"
        )
    return CodeKind.APP if kind is CodeKind.NAMED else kind


def check_target(name: object, target: Any, init_args: tuple[Any, ...], *, factory: bool = False) -> None:
    if not isinstance(name, str):
        raise BadType(f"a backend's name must be a str, not {type(name).__name__}")
    if factory:
        if not (isinstance(target, str) or callable(target)) or is_asgi_app(target):
            raise BadType(
                f"backend {name!r} needs a function that returns an ASGI app, or its import string, for factory=True, not "
                f"{target!r}: leave factory out for the app itself"
            )
        return
    if is_asgi_app(target):
        if init_args:
            raise BadValue(f"backend {name!r} is an ASGI app, which takes no constructor arguments: leave them out, or give a factory")
        return
    is_function = callable(target) and hasattr(target, "__code__")
    if not (isinstance(target, str | type) or is_function):
        raise BadType(
            f"backend {name!r} needs a function, a class, an ASGI app or an import string 'pkg.mod:attr', not a {type(target).__name__}: "
            "wrap it in a function, or give its class and constructor arguments"
        )
    if is_function:
        _check_signature(name, target)
    if is_function and init_args:
        raise BadValue(f"backend {name!r} is a function, which takes no constructor arguments: use a class, or leave them out")


def _check_signature(name: str, function: Any) -> None:
    try:
        make_method(function)
    except BadType as error:
        raise BadValue(f"backend {name!r} cannot be called: {error}") from error


def check_fits(name: str, target: Any, config: BackendConfig, kind: CodeKind) -> None:
    """What can be said before anything is sent; code named by an import string is checked where it is imported."""
    check_app(name, kind, config)
    if isinstance(target, str):
        return
    if not kind.is_app and (config.max_batch_size or 1) > 1 and not accepts_batch(target):
        raise BadValue(f"backend {name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    if config.on_death == "replay" and accepts_batch(target):
        raise BadValue(f"backend {name!r} takes batches, which cannot be replayed: leave on_death at 'fail'")
    if config.user_config is not None and not (isinstance(target, type) and hasattr(target, "reconfigure")):
        raise BadValue(f"backend {name!r} has a user_config but no reconfigure(user_config) to take it: use a class that has one")
