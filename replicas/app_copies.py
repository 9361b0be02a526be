"""An ASGI app of its own for each replica of an embedded instance, whose replicas share the modules of their process.

An app holds state: its lifespan's, and that of its middlewares. So where an import string names an app, each further replica
executes the module once more, and takes the app from there. An app that is given as an object belongs to one backend with one replica.
"""

from __future__ import annotations

import importlib.util
import inspect
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from ..broker.errors import BackendFailed, words_of
from ..broker.process import forks
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.code import CodeHere, split
from ..controller.state.documents import Backend, CodeKind
from ..controller.state.reading import read_desired
from .asgi_apps import is_asgi_app
from .ingress import app_of

_given: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by id: the apps that replicas of this process have, or had
_giving = forks.Lock()


def holds_an_app(target: Any) -> bool:
    """Whether it is an app object, or a class that has one. A function holds no state, and a class may be constructed again."""
    return app_of(target) is not None or (is_asgi_app(target) and not inspect.isroutine(target))


async def check_is_alone(store: Store, keys: StoreKeys, backend: Backend, app: Any) -> None:
    """Raises BackendFailed if a backend that was deployed before, or together with this one, has the same app object."""
    desired = read_desired(await store.get(keys.desired))
    for other in desired.backends.values():
        if other.name == backend.name or other.kind is not CodeKind.APP_OBJECT or other.version > backend.version:
            continue
        record = await store.get_large(keys.code(other.code))
        if isinstance(record, CodeHere) and _app_in(record.target) is _app_in(app):
            raise BackendFailed(
                f"backend {backend.name!r} is the same app object as backend {other.name!r}, and would run its lifespan twice on one "
                f"state: for a second route write serve.create_endpoint({backend.name!r}, backend={other.name!r}, route=…); for an app of "
                "its own name it by an import string, or give a function that makes it (factory=True)"
            )
    with _giving, suppress(TypeError):
        _given[id(app)] = app  # a replica of the import string gets another one


def _app_in(target: Any) -> Any:
    app = app_of(target)
    return target if app is None else app


def own_copy(name: str, target: Any) -> Any:
    """Returns what the import string names for one more replica: for the first one `target`, as the imported module has it. Raises
    BackendFailed if the module cannot be executed once more."""
    if not holds_an_app(target):
        return target
    with _giving:
        if id(target) not in _given:
            with suppress(TypeError):  # an object without weak references is never the first one
                _given[id(target)] = target
                return target
        return _execute_once_more(name)  # one at a time: what the module imports need not expect to be imported by several threads at once


def _execute_once_more(name: str) -> Any:
    module, attributes = split(name)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.loader is None:
        raise BackendFailed(f"{module} cannot be imported once more: give a function that makes the app (factory=True)")
    found: Any = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except Exception as error:
        raise BackendFailed(
            f"each replica in this process needs an app of its own, and {module} cannot be executed once more for {name} "
            f"({words_of(error)}): give a function that makes the app (factory=True)"
        ) from error
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
