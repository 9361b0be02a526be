"""Hands things over from one thread to the event loop of another, all of a turn at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class HandOver(Generic[T]):
    """Calls `on_touched` on `loop`, once for each thing that was touched since the last time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._touched: deque[T] = deque()
        self._woken = False
        self.on_touched: Callable[[T], None] = lambda touched: None

    def __repr__(self) -> str:
        return f"<HandOver of {len(self._touched)}>"

    def touch(self, what: T) -> None:
        self._touched.append(what)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._hand_over)
            except RuntimeError:  # the loop has ended
                pass

    def _hand_over(self) -> None:
        self._woken = False
        touched: dict[T, None] = {}
        while self._touched:
            touched[self._touched.popleft()] = None
        for what in touched:
            self.on_touched(what)
