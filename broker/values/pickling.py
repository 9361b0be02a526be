"""Pickles users' values and code by cloudpickle, without giving a process a second copy of a definition.

A class or function of `__main__` travels by value, since importing its file would run the program again. Its pickle names
the `__main__` that it comes from (its home). A process with the same home uses its own definition, and no arriving pickle
changes that.
"""

from __future__ import annotations

import functools
import importlib
import io
import secrets
import sys
from collections import ChainMap
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar
from weakref import WeakSet

import cloudpickle
from cloudpickle import cloudpickle as internals

_home = secrets.token_hex(8)  # of this process's `__main__`; a forked child has its parent's definitions, and so its home
_unfinished: WeakSet[Any] = WeakSet()  # classes and functions that a pickle has made here and not filled in yet
_MAKERS = (internals._make_skeleton_class, internals._make_skeleton_enum)


def home() -> str:
    """Returns the identifier of this process's `__main__`."""
    return _home


def settle_at(new: str) -> None:
    """From now on `sys.modules["__main__"]` of this process counts as the `__main__` of that home."""
    global _home
    _home = new


def dumps(value: object) -> bytes:
    """Like `cloudpickle.dumps`. Raises whatever pickling the value raises."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def dumps_code(target: object, is_importable: Callable[[str], bool]) -> tuple[bytes, set[str]]:
    """Returns (pickle, the modules that it imports). `is_importable` says which modules every replica can import: when a function of such
    a module is unpickled, it gets the module's own globals rather than copies. Raises whatever pickling raises."""
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


def _own(of_home: str, qualname: str) -> Any:
    """Returns this process's own definition, or None if the home is another's or nothing has that name."""
    return _find(sys.modules["__main__"], qualname) if of_home == _home else None


def _bind(of_home: str, qualname: str, made: Any) -> None:
    """Puts a definition from this process's own home into its `__main__`, so that it is found there by name."""
    if of_home == _home and qualname.isidentifier():
        sys.modules["__main__"].__dict__.setdefault(qualname, made)


# Pickles call these functions by name, so renaming one breaks pickles that are stored.


def named_code(filename: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """Keeps the user's file name for tracebacks: cloudpickle replaces it by `<dynamic-code>` since 3.1.3."""
    return make(*arguments).replace(co_filename=filename)


def make_class(of_home: str, qualname: str, make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """`make` is cloudpickle's, which returns the class of an earlier pickle with the same tracker id, if there is one."""
    if isinstance(own := _own(of_home, qualname), type):
        return own
    tracker_id = arguments[-2]
    known = internals._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    made = make(*arguments)
    if made is not known:
        _unfinished.add(made)
    _bind(of_home, qualname, made)
    return made


def fill_class(made: type, state: Any) -> None:
    """Fills a new class only: one that is in use keeps what was set on it."""
    if made in _unfinished:
        internals._class_setstate(made, state)
        _unfinished.discard(made)


def make_function(of_home: str, qualname: str, code: CodeType, module_globals: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    own = _own(of_home, qualname)
    if isinstance(own, FunctionType):
        return own
    if of_home == _home:
        module_globals = sys.modules["__main__"].__dict__
    made = internals._make_function(code, module_globals, *arguments)
    _unfinished.add(made)
    _bind(of_home, qualname, made)
    return made


def fill_function(made: Any, state: Any) -> None:
    if made not in _unfinished:
        return
    _unfinished.discard(made)
    attributes, slots = state
    if made.__globals__ is sys.modules["__main__"].__dict__:  # the program may have set them anew since an earlier pickle
        for name, value in slots["__globals__"].items():
            made.__globals__.setdefault(name, value)
        slots = {**slots, "__globals__": {}}
    internals._function_setstate(made, (attributes, slots))


def make_cached(of_home: str, qualname: str, function: Any, parameters: dict[str, Any]) -> Any:
    """Makes an `lru_cache`, which starts empty."""
    own = _own(of_home, qualname)
    if own is not None:
        return own
    made = functools.lru_cache(**parameters)(function)
    _bind(of_home, qualname, made)
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
    return make_cached, (_home_of(cached), cached.__qualname__, cached.__wrapped__, cached.cache_parameters())


def _reduce_cached_property(prop: Any) -> Any:
    return make_cached_property, (prop.func, prop.attrname)


def _home_of(definition: Any) -> str:
    """Returns our home for a definition that `__main__` has under its name: all processes with that home have it, too. Else ''."""
    is_of_main = getattr(definition, "__module__", "") == "__main__"
    return _home if is_of_main and is_found_by_name(definition, sys.modules["__main__"]) else ""


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
            type(functools.lru_cache(_home_of)): _reduce_cached,
            functools.cached_property: _reduce_cached_property,
        },
        cloudpickle.Pickler.dispatch_table,  # pyright: ignore[reportArgumentType]
    )

    def __init__(self, file: io.BytesIO, is_importable: Callable[[str], bool] | None = None) -> None:
        super().__init__(file)
        self._is_importable = is_importable
        self.modules: set[str] = set()  # that unpickling imports

    def reducer_override(self, obj: Any) -> Any:
        reduced: Any = super().reducer_override(obj)
        if reduced is NotImplemented:
            return self._by_name(obj)
        if reduced[0] in _MAKERS:
            make, arguments, state = reduced[:3]
            return make_class, (_home_of(obj), obj.__qualname__, make, arguments), state, None, None, fill_class
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
        arguments = (_home_of(func), func.__qualname__, code, shared, tuple(rest))
        return make_function, arguments, (attributes, slots), None, None, fill_function


class _Globals:
    """Stands for the globals of a module in a pickle; unpickling imports the module."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> Any:
        return module_globals, (self._module,)
