"""Pickles users' values and code by cloudpickle, without giving a process a second copy of a definition.

A class or function of `__main__` travels by value, since importing its file would run the program again. Its pickle names
the `__main__` that it comes from (its home) and the definition. A process with the same home that has the definition uses
it, and no arriving pickle changes it. A definition that replaces another under the same name is a new one.
"""

from __future__ import annotations

import dis
import functools
import importlib
import io
import secrets
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import cloudpickle
from cloudpickle import cloudpickle as internals

from ..process import forks

_Cached = type(functools.lru_cache(str))
_home = secrets.token_hex(8)  # of this process's `__main__`; a forked child has its parent's definitions, and so its home
_stands_in = False  # whether `__main__` was made for what arrives, rather than by executing a file
_arrived: dict[str, Any] = {}  # what a pickle set last under each global name of such a `__main__`
_unfinished: WeakSet[Any] = WeakSet()  # classes and functions that a pickle has made here and not filled in yet
_MAKERS = (internals._make_skeleton_class, internals._make_skeleton_enum)
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


def dumps(value: object) -> bytes:
    """Like `cloudpickle.dumps`. Raises whatever pickling the value raises."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def dumps_code(target: object, is_importable: Callable[[str], bool]) -> tuple[bytes, set[str]]:
    """Returns (pickle, the modules that unpickling or calling it imports). `is_importable` says which modules every replica can import: an
    unpickled function of such a module gets the module's own globals rather than copies. Raises whatever pickling raises."""
    with io.BytesIO() as file:
        pickler = _Pickler(file, is_importable)
        pickler.dump(target)
        return file.getvalue(), pickler.modules


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
        issubclass(type(value), type | FunctionType | _Cached)  # rather than isinstance, which believes what an object says of itself
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


# Reductions, called while a value is pickled.


def _reduce_code(code: CodeType) -> tuple[Callable[..., CodeType], tuple[Any, ...]]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)  # pyright: ignore[reportAssignmentType]
    return named_code, (code.co_filename, make, arguments)


def _reduce_cached(cached: Any) -> Any:
    module = sys.modules.get(cached.__module__)
    if module is not None and module.__name__ != "__main__" and is_found_by_name(cached, module):
        return cached.__qualname__
    return make_cached, (_identity_of(cached), cached.__qualname__, cached.__wrapped__, cached.cache_parameters())


def _reduce_cached_property(prop: Any) -> Any:
    return make_cached_property, (prop.func, prop.attrname)


def _identity_of(definition: Any) -> Identity:
    """Returns the identity of a definition that `__main__` has under its name, or had when it was pickled before."""
    id = _definitions.id_of(definition, may_be_new=_is_of_main(definition))
    return (_home, id) if id else ("", "")


def _imported_in(code: CodeType) -> Iterator[str]:
    """Yields the modules that import statements inside a function name."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imported_in(constant)


def _sentinel_name(value: Any) -> tuple[str, str] | None:
    """Returns (module, name) of a sentinel: an object without state that its type's module has under a name, such as `dataclasses.MISSING`.
    A copy would not be identical to it."""
    kind: Any = type(value)
    if getattr(value, "__dict__", None) or kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return None
    module = sys.modules.get(kind.__module__)
    if module is None or module.__name__ == "__main__" or getattr(kind, "__slots__", None):
        return None
    return next(((module.__name__, name) for name, found in vars(module).items() if found is value), None)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {
            CodeType: _reduce_code,
            _Cached: _reduce_cached,
            functools.cached_property: _reduce_cached_property,
        },
        cloudpickle.Pickler.dispatch_table,  # pyright: ignore[reportArgumentType]
    )

    def __init__(self, file: io.BytesIO, is_importable: Callable[[str], bool] | None = None) -> None:
        super().__init__(file)
        self._is_importable = is_importable
        self.modules: set[str] = set()  # that unpickling or calling it imports

    def reducer_override(self, obj: Any) -> Any:
        reduced: Any = super().reducer_override(obj)
        if reduced is NotImplemented:
            return self._by_name(obj)
        if reduced[0] in _MAKERS:
            make, arguments, state = reduced[:3]
            return make_class, (_identity_of(obj), obj.__qualname__, make, arguments), state, None, None, fill_class
        return reduced

    def _by_name(self, obj: Any) -> Any:
        kind = type(obj)  # rather than isinstance, which believes what an object says of itself
        if issubclass(kind, type | FunctionType):
            self.modules.add(str(obj.__module__))
        elif issubclass(kind, ModuleType):
            self.modules.add(obj.__name__)
        elif (name := _sentinel_name(obj)) is not None:
            return sentinel, name
        return NotImplemented

    def _dynamic_function_reduce(self, func: Any) -> Any:
        _, (code, copied, *rest), (attributes, slots), *_ = super()._dynamic_function_reduce(func)
        shared: Any = copied
        name = func.__globals__.get("__name__", "")
        is_of_module = func.__globals__ is getattr(sys.modules.get(name), "__dict__", None)
        if is_of_module and slots["__globals__"] and self._is_importable is not None and self._is_importable(name):
            self.modules.add(name)
            shared, slots["__globals__"] = _Globals(name), {}
        self.modules |= set(_imported_in(func.__code__))
        arguments = (_identity_of(func), func.__qualname__, code, shared, tuple(rest))
        return make_function, arguments, (attributes, slots), None, None, fill_function


class _Globals:
    """Stands for the globals of a module in a pickle; unpickling imports the module."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> Any:
        return module_globals, (self._module,)
