"""Pickles users' values with cloudpickle, and keeps the file names of code, so that tracebacks and logs show them."""

from __future__ import annotations

import io
from collections import ChainMap
from collections.abc import Callable
from types import CodeType
from typing import Any, ClassVar

import cloudpickle


def dumps(value: object) -> bytes:
    """As `cloudpickle.dumps`. Raises whatever pickling the value raises."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _reduce_code(code: CodeType) -> tuple[Callable[..., CodeType], tuple[Any, ...]]:
    """Cloudpickle 3.1.3 and later say `<dynamic-code>` for every file, so the file name travels beside the code."""
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)  # pyright: ignore[reportAssignmentType]
    return named_code, (code.co_filename, make, arguments)


def named_code(filename: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """Rebuilds a code object with its file name; pickles call this."""
    return make(*arguments).replace(co_filename=filename)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {CodeType: _reduce_code},
        cloudpickle.Pickler.dispatch_table,  # pyright: ignore[reportArgumentType]
    )
