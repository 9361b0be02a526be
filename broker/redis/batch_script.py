"""A script that takes all of a batch in one call: what such scripts have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from redis.exceptions import InvalidResponse, NoScriptError

from ..errors import StoreUnavailable
from .batch_sender import Batch, BatchSender
from .client import FAILURES, naming_the_key
from .kept_wire import KeptWire

OnTaken = Callable[[Sequence[Any] | Exception], None]
"""Gets an outcome for each entry of a batch, or an error."""


class ScriptCall(Batch):
    """One batch on its way. `by_text`: the script is said whole, since the server does not know it."""

    __slots__ = ("by_text", "on_taken")

    def __init__(self, on_taken: OnTaken) -> None:
        super().__init__(1)
        self.on_taken = on_taken
        self.by_text = False

    @property
    @abstractmethod
    def keys(self) -> Sequence[str]:
        """The key that an error names for each entry."""


C = TypeVar("C", bound=ScriptCall)


class BatchScript(ABC, Generic[C]):
    """Takes one batch at a time over `wire`. Each call ends within CALL_BUDGET_S. If the connection ends under way, the batch is sent once
    more over another one: the script knows what it has written. It returns a list with an outcome for each entry, and a list of the keys
    that were of another type.

    `on_wrote` is called after what was written, and `on_odd_key` for each such key. `on_failed` gets each error, when its call began, and
    whether that was to write something new; it returns the error as StoreUnavailable.
    """

    def __init__(
        self,
        name: str,
        wire: KeptWire,
        on_wrote: Callable[[], None],
        on_odd_key: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        self._name = name
        self._text = (Path(__file__).parent / f"{name}.lua").read_text()
        self._digest = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()
        self._sender = BatchSender(wire)
        self._on_wrote = on_wrote
        self._on_odd_key = on_odd_key
        self._on_failed = on_failed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} by {self._sender!r}>"

    def close(self) -> None:
        """Closes the wire: calls under way are never told."""
        self._sender.close()

    def hang_up(self) -> None:
        """Leaves this connection: the next batch goes over another one, perhaps to another server."""
        self._sender.hang_up()

    def command(self, call: C) -> tuple[str, str]:
        return ("EVAL", self._text) if call.by_text else ("EVALSHA", self._digest)

    def replied(self, call: C, replies: list[Any] | Exception) -> None:
        if isinstance(replies, Exception):
            return self._fail(call, replies)
        match replies[0]:
            case NoScriptError() if not call.by_text:  # the server was restarted
                call.by_text = True
                self._sender.send(call)
            case Exception() as error:
                self._fail(call, naming_the_key(error, ("EVALSHA", *call.keys)))
            case [[*outcomes], [*odd]] if len(outcomes) == len(call.keys) and self._are_sound(outcomes):
                for key in odd:
                    self._on_odd_key(key.decode(errors="replace") if isinstance(key, bytes) else str(key))
                self._taken(call, outcomes)
            case _:
                self._sender.hang_up()
                self._fail(call, InvalidResponse(f"no reply to {self._name}.lua"))

    def _are_sound(self, outcomes: list[Any]) -> bool:
        """Whether the script may have returned these outcomes."""
        return True

    @abstractmethod
    def _taken(self, call: C, outcomes: list[Any]) -> None:
        """Tells the call its outcomes."""

    def _fail(self, call: C, error: Exception) -> None:
        """An error that no server causes is passed on as it is."""
        call.on_taken(self._on_failed(error, call.began, True) if isinstance(error, FAILURES) else error)
