"""Pickles users' values and code by cloudpickle, without giving a process a second copy of a definition (`definitions.py` says how)."""

from __future__ import annotations

import dis
import functools
import io
import pickle
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from enum import EnumMeta
from importlib.util import resolve_name
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import cloudpickle
import msgspec
from cloudpickle import cloudpickle as internals

from .definitions import (
    IMMUTABLE,
    Cached,
    ClassState,
    definition,
    fill_class,
    fill_function,
    home,
    identity_of,
    is_found_by_name,
    main_globals,
    make_cached,
    make_cached_property,
    make_class,
    make_function,
    module_globals,
    named_code,
    sentinel,
)


class CannotTravel(pickle.PicklingError):
    """A definition cannot be pickled by value; the message says which, why and the mend."""


_WORD = re.compile(r"[^\W\d]\w*")
_MAKERS = (internals._make_skeleton_class, internals._make_skeleton_enum)


def dumps(value: object) -> bytes:
    """Pickles a value. Definitions of `__main__` travel by value, or, if one cannot, all by identity: then only processes with the same
    home open the pickle. Raises whatever pickling the value raises."""
    try:
        return dumps_by_value(value)
    except Exception as error:
        try:
            return _dump(value, _IdentityPickler)
        except Exception:
            raise error from None


def dumps_by_value(value: object) -> bytes:
    return _dump(value, _Pickler)


def _dump(value: object, pickler: type[_Pickler]) -> bytes:
    with io.BytesIO() as file:
        pickler(file).dump(value)
        return file.getvalue()


def dumps_code(target: object, is_importable: Callable[[str], bool], modules: Iterable[ModuleType] = ()) -> tuple[bytes, set[str]]:
    """Returns (pickle, the modules that unpickling or calling it imports); `loads_code` opens it. `is_importable` says which modules every
    replica can import: an unpickled function of such a module gets the module's own globals rather than copies. What `modules` have under
    a name (a registry, a client, a lock) goes by that name. Raises whatever pickling raises."""
    with io.BytesIO() as file:
        pickler = _CodePickler(file, is_importable, modules)
        pickler.dump(target)
        return file.getvalue(), pickler.modules


def loads_code(pickled: bytes) -> Any:
    return _CodeUnpickler(io.BytesIO(pickled)).load()


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


def _imported_in(code: CodeType, package: str) -> Iterator[str]:
    """Yields the modules that import statements inside a function name. `package` is what its relative imports start from."""
    constants: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level = constants[-2] if len(constants) > 1 and isinstance(constants[-2], int) else 0
            with suppress(ImportError):  # a relative import outside a package
                yield resolve_name("." * level + instruction.argval, package) if level else instruction.argval
        elif instruction.opname.startswith("LOAD_"):
            constants.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imported_in(constant, package)


def _attributes_of_members(kind: Any) -> dict[str, dict[str, Any]]:
    """Returns what an enum's own `__init__` or `__new__` has set on its members."""
    return {
        name: {attribute: value for attribute, value in vars(member).items() if not (attribute.startswith("_") and attribute.endswith("_"))}
        for name, member in kind.__members__.items()
    }


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


def _named_in(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the types and modules among the globals of `__main__` that annotations name in strings, for `get_type_hints`."""
    known = sys.modules["__main__"].__dict__
    words = {word for text in annotations.values() if isinstance(text, str) for word in _WORD.findall(text)}
    return {word: known[word] for word in words if word in known and _is_for_hints(known[word])}


def _is_for_hints(value: Any) -> bool:
    return issubclass(type(value), type | ModuleType) or type(value).__module__ in ("typing", "types", "typing_extensions")


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {
            CodeType: _reduce_code,
            Cached: _reduce_cached,
            functools.cached_property: _reduce_cached_property,
        },
        cloudpickle.Pickler.dispatch_table,  # pyright: ignore[reportArgumentType]
    )

    def reducer_override(self, obj: Any) -> Any:
        reduced: Any = super().reducer_override(obj)
        if reduced is NotImplemented:
            return self._by_name(obj)
        if reduced[0] in _MAKERS:
            return self._class_by_value(obj, *reduced[:3])
        return reduced

    def _by_name(self, obj: Any) -> Any:
        if not issubclass(type(obj), type | FunctionType | ModuleType) and (name := _sentinel_name(obj)) is not None:
            return sentinel, name
        return NotImplemented

    def _class_by_value(self, kind: Any, make: Any, arguments: Any, state: Any) -> Any:
        if isinstance(kind, type(msgspec.Struct)):
            raise CannotTravel(
                f"the msgspec.Struct {kind.__qualname__} is defined in the program itself, and loses its fields by value: put it into a "
                "module beside the program"
            )
        if vars(kind).get("__pydantic_complete__") is False:  # what stands in for its validators until then does not pickle
            kind.model_rebuild(raise_errors=False)
            state = super().reducer_override(kind)[2]
        members: dict[str, Any] = _attributes_of_members(kind) if isinstance(kind, EnumMeta) else {}
        named = _named_in(vars(kind).get("__annotations__", {})) if kind.__module__ == "__main__" else {}
        filling = ClassState(state, members, home(), named)
        return make_class, (identity_of(kind), kind.__qualname__, make, arguments), filling, None, None, fill_class

    def _dynamic_function_reduce(self, func: Any) -> Any:
        _, (code, copied, *rest), (attributes, slots), *_ = super()._dynamic_function_reduce(func)
        if func.__globals__ is sys.modules["__main__"].__dict__:
            slots["__globals__"] |= _named_in(func.__annotations__)
        arguments = (identity_of(func), func.__qualname__, code, self._globals_of(func, copied, slots), tuple(rest))
        return make_function, arguments, (attributes, slots), None, None, fill_function

    def _globals_of(self, func: Any, copied: dict[str, Any], slots: dict[str, Any]) -> Any:
        return _Globals(main_globals, home(), copied) if func.__globals__ is sys.modules["__main__"].__dict__ else copied


class _IdentityPickler(_Pickler):
    """Lets definitions of `__main__` travel by identity."""

    def reducer_override(self, obj: Any) -> Any:
        if issubclass(type(obj), type | FunctionType | Cached) and (identity := identity_of(obj))[1]:
            return definition, (*identity, obj.__qualname__)
        return super().reducer_override(obj)


class _CodePickler(_Pickler):
    """Notes the modules that replicas have to import."""

    def __init__(self, file: io.BytesIO, is_importable: Callable[[str], bool], modules: Iterable[ModuleType]) -> None:
        super().__init__(file)
        self._is_importable = is_importable
        self._names = {
            id(value): (module.__name__, name)
            for module in modules
            for name, value in vars(module).items()
            if not name.startswith("__") and not issubclass(type(value), IMMUTABLE)
        }
        self.modules: set[str] = set()

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if (name := self._names.get(id(obj))) is not None:
            self.modules.add(name[0])
        return name

    def _by_name(self, obj: Any) -> Any:
        kind = type(obj)  # rather than isinstance, which believes what an object says of itself
        if issubclass(kind, type | FunctionType):
            self.modules.add(str(obj.__module__))
        elif issubclass(kind, ModuleType):
            self.modules.add(obj.__name__)
        return super()._by_name(obj)

    def _globals_of(self, func: Any, copied: dict[str, Any], slots: dict[str, Any]) -> Any:
        self.modules |= set(_imported_in(func.__code__, func.__globals__.get("__package__") or ""))
        name = func.__globals__.get("__name__", "")
        is_of_module = func.__globals__ is getattr(sys.modules.get(name), "__dict__", None)
        if not is_of_module or not self._is_importable(name):
            return super()._globals_of(func, copied, slots)
        self.modules.add(name)
        slots["__globals__"] = {}
        return _Globals(module_globals, name)


class _CodeUnpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return sentinel(*pid)


class _Globals:
    """Stands for the globals of a function in a pickle: `find` returns them where it is opened."""

    def __init__(self, find: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        self._reduced = find, arguments

    def __reduce__(self) -> Any:
        return self._reduced
