"""Pickles users' values and code by cloudpickle, without giving a process a second copy of a definition (`definitions.py` says how)."""

from __future__ import annotations

import dis
import functools
import io
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import cloudpickle
from cloudpickle import cloudpickle as internals

from .definitions import (
    Cached,
    fill_class,
    fill_function,
    identity_of,
    is_found_by_name,
    make_cached,
    make_cached_property,
    make_class,
    make_function,
    module_globals,
    named_code,
    sentinel,
)

_MAKERS = (internals._make_skeleton_class, internals._make_skeleton_enum)


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


def _reduce_code(code: CodeType) -> tuple[Callable[..., CodeType], tuple[Any, ...]]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)  # pyright: ignore[reportAssignmentType]
    return named_code, (code.co_filename, make, arguments)


def _reduce_cached(cached: Any) -> Any:
    module = sys.modules.get(cached.__module__)
    if module is not None and module.__name__ != "__main__" and is_found_by_name(cached, module):
        return cached.__qualname__
    return make_cached, (identity_of(cached), cached.__qualname__, cached.__wrapped__, cached.cache_parameters())


def _reduce_cached_property(prop: Any) -> Any:
    return make_cached_property, (prop.func, prop.attrname)


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
            Cached: _reduce_cached,
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
            return make_class, (identity_of(obj), obj.__qualname__, make, arguments), state, None, None, fill_class
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
        if self._is_importable is not None:
            self.modules |= set(_imported_in(func.__code__))
        arguments = (identity_of(func), func.__qualname__, code, shared, tuple(rest))
        return make_function, arguments, (attributes, slots), None, None, fill_function


class _Globals:
    """Stands for the globals of a module in a pickle; unpickling imports the module."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> Any:
        return module_globals, (self._module,)
