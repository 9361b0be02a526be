"""Finds modules whose file changed after the program imported them. Replicas import the file anew, and would run other code."""

from __future__ import annotations

import marshal
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_STARTED = time.time()
_PYC_HEADER_BYTES = 16


def has_changed(module: ModuleType) -> bool:
    """Whether the file no longer has the code that was imported. Only files that are newer than the program are read. Without Python's
    cache (`__pycache__`) of what was imported, only the code of functions is compared, and a changed value at the top is not noticed."""
    if type(getattr(module.__spec__, "loader", None)) is not SourceFileLoader or not module.__file__:
        return False  # pytest's, for one, makes other code of a file
    path = Path(module.__file__)
    try:
        if path.stat().st_mtime <= _STARTED:
            return False
        now = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        return True
    imported = _cached(module)
    if imported is not None and _traits(imported) != _traits(now):
        return True
    return not {_traits(code) for code in _in_use(module)} <= set(_all_of(now))


def _cached(module: ModuleType) -> CodeType | None:
    """Returns the code that Python cached when it last imported the file, which may have been another process, after a change."""
    with suppress(OSError, EOFError, ValueError, TypeError):
        with Path(module.__cached__ or "").open("rb") as file:
            file.seek(_PYC_HEADER_BYTES)
            code = marshal.load(file)
        return code if isinstance(code, CodeType) else None
    return None


def _in_use(module: ModuleType) -> Iterator[CodeType]:
    """Yields the code of the module's functions and methods."""
    waiting: list[Any] = [module]
    for holder in waiting:
        for value in vars(holder).values():
            function = getattr(value, "__func__", value) if isinstance(value, classmethod | staticmethod) else value
            if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                yield function.__code__
            elif isinstance(value, type) and value.__module__ == module.__name__ and value not in waiting:
                waiting.append(value)


def _all_of(code: CodeType) -> Iterator[Any]:
    yield _traits(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_of(constant)


def _traits(code: CodeType) -> Any:
    """Returns what the code does, without its line numbers."""
    constants = tuple(_constant(one) for one in code.co_consts)
    return code.co_qualname, code.co_code, code.co_names, code.co_varnames, constants


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _traits(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
