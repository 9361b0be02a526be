"""Turns any exception into plain data of a bounded size, whatever its own methods do.

User code may raise anything: an exception whose `__str__` raises SystemExit, whose `__module__` is None, that forbids attributes, or that
holds a body of 5 MB. So each part is read by itself, every `BaseException` of a read is caught, and the base class's method is called
where the exception's class may have replaced it.
"""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import NamedTuple

MAX_NAME = 200  # all three limits are in characters
MAX_MESSAGE = 4_000
MAX_TRACEBACK = 16_000
_MAX_LINE = 500  # per line of a long traceback: one line may hold a whole body

LEAVING = (SystemExit, KeyboardInterrupt, GeneratorExit)
"""Exceptions by which user code would end its program. Here they count as failures, since the code runs on a loop of ours."""

_UNSPEAKABLE = "(its message cannot be shown)"


class Failure(NamedTuple):
    """One exception: the name of its type, its message, its traceback."""

    type: str
    message: str
    traceback: str

    @property
    def words(self) -> str:
        """The failure on one line; only the type if the message is empty."""
        return f"{self.type}: {self.message}" if self.message else self.type


def describe(error: BaseException) -> Failure:
    """Returns the exception as a Failure. Raises nothing."""
    return Failure(name_of(type(error)), message_of(error), traceback_of(error))


def name_of(kind: type) -> str:
    """The public name of a type; our own errors are named without their submodule. Raises nothing."""
    try:
        module = type.__dict__["__module__"].__get__(kind)  # read it past the metaclass, which may lie or raise
        qualname = writable(type.__dict__["__qualname__"].__get__(kind), MAX_NAME)
        if type(module) is not str or module == "builtins":
            return qualname
        package = module.partition(".")[0]
        return f"{package if package == 'mqserve' else writable(module, MAX_NAME)}.{qualname}"
    except BaseException:
        return "Exception"


def message_of(error: BaseException) -> str:
    """The exception's message. Raises nothing."""
    try:
        return writable(str.__str__(str(error)), MAX_MESSAGE)  # `str()` may return a subclass with methods of its own
    except BaseException:
        return _UNSPEAKABLE


def traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, or the frames alone if that fails. Raises nothing."""
    for tell in (_as_python_prints_it, _frames):
        try:
            return _shortened(tell(error))
        except BaseException:
            continue
    return ""


def add_note(error: BaseException, note: str) -> None:
    """Does what `error.add_note` does, also for a class that forbids setting attributes (a frozen dataclass). Raises nothing."""
    try:
        notes = BaseException.__getattribute__(error, "__dict__").get("__notes__", [])
        BaseException.__setattr__(error, "__notes__", [*notes, note])
    except BaseException:
        pass


def writable(text: str, limit: int) -> str:
    """Returns at most about `limit` characters, and escapes what UTF-8 cannot encode, such as a file name that is not UTF-8."""
    return str.encode(shorten(text, limit), "utf-8", "backslashreplace").decode()


def shorten(text: str, limit: int) -> str:
    """Cuts a long text in the middle, and says there how many characters are missing."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3
    return f"{text[:head]} … ({len(text) - limit} characters are left out) … {text[-tail:]}"


def _as_python_prints_it(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _frames(error: BaseException) -> str:
    found: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return "".join([*traceback.format_tb(found), f"{name_of(type(error))}: {message_of(error)}\n"])


def _shortened(text: str) -> str:
    if len(text) > MAX_TRACEBACK:
        text = "\n".join(shorten(line, _MAX_LINE) for line in text.split("\n"))
    return writable(text, MAX_TRACEBACK)
