"""Exceptions whose classes do what no exception should, built where they are raised from a spec in plain data.

A spec names a base and some oddities; every combination makes a class, though not each oddity shows with each base.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import mqserve as serve

Namespace = dict[str, Any]


class Text(str):
    """A str whose methods fail."""

    def encode(self, *arguments: Any, **named: Any) -> NoReturn:
        raise SystemExit("encode")

    def partition(self, *arguments: Any) -> NoReturn:
        raise SystemExit("partition")

    __len__ = __getitem__ = __format__ = __add__ = encode


class OddMeta(type):
    """A class whose own attributes cannot be asked for."""

    def __getattribute__(cls, name: str) -> Any:
        if name in ("__module__", "__qualname__", "__name__", "__mro__", "__dict__"):
            raise SystemExit(f"no {name}")
        return super().__getattribute__(name)

    def __repr__(cls) -> str:
        raise SystemExit("no repr of the class")


def fails(error: type[BaseException], words: str) -> Callable[..., NoReturn]:
    def fail(self: Any, *arguments: Any, **named: Any) -> NoReturn:
        raise error(words)

    return fail


def returns(value: Any) -> Callable[..., Any]:
    return lambda self, *arguments, **named: value


BASES: dict[str, Callable[[], tuple[type[BaseException], tuple[Any, ...]]]] = {
    "Exception": lambda: (Exception, ("words",)),
    "BaseException": lambda: (BaseException, ("words",)),
    "SystemExit": lambda: (SystemExit, ("words",)),
    "KeyboardInterrupt": lambda: (KeyboardInterrupt, ()),
    "GeneratorExit": lambda: (GeneratorExit, ()),
    "CancelledError": lambda: (asyncio.CancelledError, ()),
    "StopIteration": lambda: (StopIteration, (1,)),
    "StopAsyncIteration": lambda: (StopAsyncIteration, ()),
    "TimeoutError": lambda: (TimeoutError, ()),
    "KeyError": lambda: (KeyError, ("key",)),
    "OSError": lambda: (OSError, (2, "no such file", b"\xff\xfe")),
    "SyntaxError": lambda: (SyntaxError, ("bad", ("file", -3, 10**9, None))),
    "UnicodeDecodeError": lambda: (UnicodeDecodeError, ("utf-8", b"\xff" * 1000, 0, 1, "words")),
    "ExceptionGroup": lambda: (ExceptionGroup, ("several", [ValueError("one"), KeyError("two")])),
    "BaseExceptionGroup": lambda: (BaseExceptionGroup, ("several", [SystemExit("one")])),
    "MQServeError": lambda: (serve.MQServeError, ("words",)),
    "RequestTimeout": lambda: (serve.RequestTimeout, ("words",)),
    "Overloaded": lambda: (serve.Overloaded, ("words",)),
}

ODDITIES: dict[str, Callable[[], Namespace]] = {
    "str raises": lambda: {"__str__": fails(ValueError, "no str")},
    "str exits": lambda: {"__str__": fails(SystemExit, "no str")},
    "str is cancelled": lambda: {"__str__": fails(asyncio.CancelledError, "no str")},
    "str is none": lambda: {"__str__": returns(None)},
    "str is odd": lambda: {"__str__": returns(Text("odd"))},
    "str is long": lambda: {"__str__": returns("long " * 400_000)},
    "str has lines": lambda: {"__str__": returns("line\n" * 100_000)},
    "str has surrogates": lambda: {"__str__": returns("\ud800 and \udfff")},
    "str recurses": lambda: {"__str__": lambda self: str(self)},
    "repr exits": lambda: {"__repr__": fails(SystemExit, "no repr")},
    "reduce raises": lambda: {"__reduce_ex__": fails(ValueError, "no reduce")},
    "reduce exits": lambda: {"__reduce_ex__": fails(SystemExit, "no reduce")},
    "reduce is odd": lambda: {"__reduce_ex__": returns((5,))},
    "reduce exits where it arrives": lambda: {"__reduce_ex__": returns((leave, ("on arrival",)))},
    "reduce makes no exception": lambda: {"__reduce_ex__": returns((int, ("5",)))},
    "reduce makes another": lambda: {"__reduce_ex__": returns((SystemExit, ("made over there",)))},
    "setstate exits": lambda: {"__setstate__": fails(SystemExit, "no state")},
    "module is none": lambda: {"__module__": None},
    "module is odd": lambda: {"__module__": Text("odd")},
    "module raises": lambda: {"__module__": property(fails(SystemExit, "no module"))},
    "class raises": lambda: {"__class__": property(fails(SystemExit, "no class"))},
    "dict raises": lambda: {"__dict__": property(fails(SystemExit, "no dict"))},
    "cause raises": lambda: {"__cause__": property(fails(SystemExit, "no cause"))},
    "cause is no exception": lambda: {"__cause__": property(returns(5))},
    "cause is itself": lambda: {"__cause__": property(lambda self: self)},
    "context raises": lambda: {"__context__": property(fails(ValueError, "no context"))},
    "traceback raises": lambda: {"__traceback__": property(fails(SystemExit, "no traceback"))},
    "with_traceback raises": lambda: {"with_traceback": fails(SystemExit, "no with_traceback")},
    "notes are odd": lambda: {"__notes__": 5},
    "notes raise": lambda: {"__notes__": property(fails(SystemExit, "no notes"))},
    "add_note raises": lambda: {"add_note": fails(SystemExit, "no add_note")},
    "args raise": lambda: {"args": property(fails(SystemExit, "no args"))},
    "eq raises": lambda: {"__eq__": fails(SystemExit, "no eq"), "__hash__": None},
    "bool raises": lambda: {"__bool__": fails(SystemExit, "no bool")},
    "getattr raises": lambda: {"__getattribute__": fails(SystemExit, "no getattribute")},
    "setattr raises": lambda: {"__setattr__": fails(SystemExit, "no setattr")},
    "slots": lambda: {"__slots__": ("slot",)},
    "await exits": lambda: {"__await__": fails(SystemExit, "no await")},
    "holds a lot": lambda: {"__init__": hold_a_lot},
    "holds what does not pickle": lambda: {"__init__": hold_a_lock},
    "status is odd": lambda: {"status": "odd"},
    "retry is odd": lambda: {"retry_after_s": "soon"},
}


def leave(words: str) -> NoReturn:
    raise SystemExit(words)


def hold_a_lot(self: BaseException, *arguments: Any) -> None:
    self.body = b"x" * 5_000_000  # type: ignore[attr-defined]


def hold_a_lock(self: BaseException, *arguments: Any) -> None:
    import threading

    self.lock = threading.Lock()  # type: ignore[attr-defined]


def odd_exception(base: str, oddities: list[str], *, odd_class: bool = False) -> BaseException:
    """An instance of such a class."""
    kind, arguments = BASES[base]()
    namespace: Namespace = {}
    for oddity in oddities:
        namespace |= ODDITIES[oddity]()
    made: type[BaseException] = (OddMeta if odd_class else type)("Odd", (kind,), namespace)
    return made(*arguments)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Refuses every attribute, its traceback too."""

    sku: str


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots(Exception):
    sku: str
