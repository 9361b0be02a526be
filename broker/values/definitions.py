"""The definitions of this process's `__main__`, and what pickles call to make classes and functions without a second copy of one.

A class or function of `__main__` travels by value, since importing its file would run the program again. Its pickle names
the `__main__` that it comes from (its home) and the definition. A process with the same home that has the definition uses
it, and no arriving pickle changes it. A definition that replaces another under the same name is a new one.
"""

from __future__ import annotations

import functools
import importlib
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from cloudpickle import cloudpickle as internals

from ..process import forks

Cached = type(functools.lru_cache(str))
_home = secrets.token_hex(8)  # of this process's `__main__`; a forked child has its parent's definitions, and so its home
_stands_in = False  # whether `__main__` was made for what arrives, rather than by executing a file
_arrived: dict[str, Any] = {}  # what a pickle set last under each global name of such a `__main__`
_unfinished: WeakSet[Any] = WeakSet()  # classes and functions that a pickle has made here and not filled in yet
_IMMUTABLE = (int, float, complex, str, bytes, tuple, frozenset, type(None), type, FunctionType, ModuleType)

Identity = tuple[str, str]  # (home, id of the definition there); both empty for one that no name leads to


class _Definitions:
    """The classes and functions of this process's `__main__` by id, whether they were defined here or have arrived."""

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._by_id: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._lock = forks.Lock()

    def __repr__(self) -> str:
        return f"<_Definitions, {len(self._by_id)} known>"

    def add(self, id: str, definition: Any) -> None:
        with self._lock:
            self._ids[definition] = id
            self._by_id[id] = definition

    def find(self, id: str) -> Any:
        return self._by_id.get(id)

    def id_of(self, definition: Any, *, may_be_new: bool) -> str:
        if id := self._ids.get(definition, ""):
            return id
        if may_be_new:
            self.add(secrets.token_hex(8), definition)
        return self._ids.get(definition, "")


_definitions = _Definitions()


def home() -> str:
    """Returns the identifier of this process's `__main__`."""
    return _home


def settle_at(new: str, *, stands_in: bool) -> None:
    """From now on `sys.modules["__main__"]` of this process counts as the `__main__` of that home."""
    global _home, _stands_in
    _home, _stands_in = new, stands_in


def name_definitions() -> None:
    """Gives each definition of `__main__` its qualified name as id. All processes that executed the same file then agree on the ids."""
    waiting: list[Any] = [sys.modules["__main__"]]
    for holder in waiting:
        for value in list(vars(holder).values()):
            if _is_of_main(value):
                with suppress(TypeError):  # a metaclass made the class unhashable
                    _definitions.add(value.__qualname__, value)
                if isinstance(value, type) and all(value is not known for known in waiting):
                    waiting.append(value)


def is_found_by_name(target: Any, module: ModuleType) -> bool:
    """Whether `module` has exactly this object under the object's qualified name."""
    return _find(module, getattr(target, "__qualname__", "")) is target


def _find(module: ModuleType, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _is_of_main(value: Any) -> bool:
    """Whether it is a class, a function or an `lru_cache` that `__main__` has under its qualified name."""
    return (
        issubclass(type(value), type | FunctionType | Cached)  # rather than isinstance, which believes what an object says of itself
        and getattr(value, "__module__", "") == "__main__"
        and is_found_by_name(value, sys.modules["__main__"])
    )


def _definition_here(identity: Identity) -> Any:
    """Returns this process's own definition, or None if the home is another's or the definition is not known here."""
    home, id = identity
    return _definitions.find(id) if home == _home else None


def _keep(identity: Identity, qualname: str, made: Any) -> None:
    """Keeps a definition that arrived from this process's home. A `__main__` that stands in for the program's has the newest under its
    name; one that a file has made stays as it is."""
    home, id = identity
    if home != _home:
        return
    _definitions.add(id, made)
    if _stands_in and qualname.isidentifier():
        _arrived[qualname] = sys.modules["__main__"].__dict__[qualname] = made


def _set_globals(arrived: dict[str, Any]) -> None:
    """Sets globals of this `__main__`, those that the function used where it was pickled. A global stays as it is if code here has set it,
    or may have changed the object: each replica has state of its own."""
    known = sys.modules["__main__"].__dict__
    for name, value in arrived.items():
        is_as_it_came = _stands_in and name in _arrived and known.get(name) is _arrived[name] and isinstance(known[name], _IMMUTABLE)
        if name not in known or is_as_it_came:
            _arrived[name] = known[name] = value


def identity_of(definition: Any) -> Identity:
    """Returns the identity of a definition that `__main__` has under its name, or had when it was pickled before."""
    id = _definitions.id_of(definition, may_be_new=_is_of_main(definition))
    return (_home, id) if id else ("", "")


# Pickles call these functions by name, so renaming one breaks pickles that are stored.


def named_code(filename: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """Keeps the user's file name for tracebacks: cloudpickle replaces it by `<dynamic-code>` since 3.1.3."""
    return make(*arguments).replace(co_filename=filename)


def make_class(identity: Identity, qualname: str, make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """`make` is cloudpickle's, which returns the class of an earlier pickle with the same tracker id, if there is one."""
    if isinstance(own := _definition_here(identity), type):
        return own
    tracker_id = arguments[-2]
    known = internals._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    made = make(*arguments)
    if made is not known:
        _unfinished.add(made)
    _keep(identity, qualname, made)
    return made


def fill_class(made: type, state: Any) -> None:
    """Fills a new class only: one that is in use keeps what was set on it."""
    if made in _unfinished:
        internals._class_setstate(made, state)
        _unfinished.discard(made)


def make_function(identity: Identity, qualname: str, code: CodeType, module_globals: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    own = _definition_here(identity)
    if isinstance(own, FunctionType):
        return own
    if identity[0] == _home:
        module_globals = sys.modules["__main__"].__dict__
    made = internals._make_function(code, module_globals, *arguments)
    _unfinished.add(made)
    _keep(identity, qualname, made)
    return made


def fill_function(made: Any, state: Any) -> None:
    """Fills a new function only. The globals are set for a known one, too: the program may have changed them since an earlier pickle."""
    attributes, slots = state
    if made.__globals__ is sys.modules["__main__"].__dict__:
        _set_globals(slots["__globals__"])
        slots = {**slots, "__globals__": {}}
    if made in _unfinished:
        internals._function_setstate(made, (attributes, slots))
        _unfinished.discard(made)


def make_cached(identity: Identity, qualname: str, function: Any, parameters: dict[str, Any]) -> Any:
    """Makes an `lru_cache`, which starts empty."""
    own = _definition_here(identity)
    if own is not None:
        return own
    made = functools.lru_cache(**parameters)(function)
    _keep(identity, qualname, made)
    return made


def make_cached_property(function: Any, name: str) -> Any:
    made = functools.cached_property(function)
    made.__set_name__(object, name)
    return made


def module_globals(module: str) -> dict[str, Any]:
    return importlib.import_module(module).__dict__


def sentinel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
