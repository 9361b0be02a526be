"""What an exception says, in plain data of a bounded size: whatever it is, and whatever its own methods do.

User code may raise anything: an exception whose `__str__` raises SystemExit, whose `__module__` is None, that forbids every
attribute, or that holds a body of 5 MB. So each part is asked for by itself, `BaseException` is what may come of asking, and
where the class may have replaced a method, the one of its base is called.
"""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import NamedTuple

MAX_NAME = 200  # characters, as are the others
MAX_MESSAGE = 4_000
MAX_TRACEBACK = 16_000
_MAX_LINE = 500  # of a traceback that is too long: one of its lines may hold a whole body

LEAVING = (SystemExit, KeyboardInterrupt, GeneratorExit)
"""What user code raises to end its program: here, where it runs on a loop of ours, one more way to fail."""

_UNSPEAKABLE = "(its message cannot be shown)"


class Failure(NamedTuple):
    """One exception: the name of its type, its message, its traceback."""

    type: str
    message: str
    traceback: str

    @property
    def words(self) -> str:
        """For one line: an exception may have nothing to say but its name."""
        return f"{self.type}: {self.message}" if self.message else self.type


def describe(error: BaseException) -> Failure:
    """Raises nothing."""
    return Failure(name_of(type(error)), message_of(error), traceback_of(error))


def name_of(kind: type) -> str:
    """The public name of a type; our own errors go without the module they happen to live in. Raises nothing."""
    try:
        module = type.__dict__["__module__"].__get__(kind)  # a metaclass may answer otherwise, or not at all
        qualname = writable(type.__dict__["__qualname__"].__get__(kind), MAX_NAME)
        if type(module) is not str or module == "builtins":
            return qualname
        package = module.partition(".")[0]
        return f"{package if package == 'mqserve' else writable(module, MAX_NAME)}.{qualname}"
    except BaseException:
        return "Exception"


def message_of(error: BaseException) -> str:
    """Raises nothing."""
    try:
        return writable(str.__str__(str(error)), MAX_MESSAGE)  # `str()` may return a subclass, with methods of its own
    except BaseException:
        return _UNSPEAKABLE


def traceback_of(error: BaseException) -> str:
    """As Python prints it; where that fails, the frames alone. Raises nothing."""
    for tell in (_as_python_prints_it, _frames):
        try:
            return _shortened(tell(error))
        except BaseException:
            continue
    return ""


def add_note(error: BaseException, note: str) -> None:
    """As `error.add_note`, also where the class forbids to set attributes (a frozen dataclass). Raises nothing."""
    try:
        notes = BaseException.__getattribute__(error, "__dict__").get("__notes__", [])
        BaseException.__setattr__(error, "__notes__", [*notes, note])
    except BaseException:
        pass


def writable(text: str, limit: int) -> str:
    """At most about `limit` characters, with escapes for what UTF-8 cannot write, such as the name of a file that was not UTF-8."""
    return str.encode(shorten(text, limit), "utf-8", "backslashreplace").decode()


def shorten(text: str, limit: int) -> str:
    """What is too long keeps its beginning and its end, and says how much is missing between them."""
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
