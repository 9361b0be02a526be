"""`handle.map`: one request for each item, with a bounded number of them under way."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Self

from ..broker.errors import BadType, BadValue
from ..broker.values.whole_numbers import whole_number
from .futures import Future
from .gathering import Arrivals, Arrived

Send = Callable[[Any], Future]
Tell = Callable[[], None]  # called with each request that is done


class Window:
    """The requests of one `map` that are under way, and those that are done and whose turn has not come. At the end of its block the rest
    is cancelled."""

    def __init__(self, send: Send, tell: Tell, *, ordered: bool, in_flight: int) -> None:
        self.arrivals = Arrivals()
        self._send = send
        self._tell = tell
        self._ordered = ordered
        self._in_flight = in_flight
        self._sent: dict[Future, Arrived | None] = {}
        self._last: Future | None = None  # that is done

    def __repr__(self) -> str:
        return f"<Window of {self._in_flight}, {len(self._sent)} in it>"

    def __len__(self) -> int:
        return len(self._sent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.arrivals.__exit__()
        for ref, arrived in self._sent.items():
            if arrived is None:
                ref.cancel()

    @property
    def is_full(self) -> bool:
        return len(self._sent) >= self._in_flight

    def send(self, item: Any) -> None:
        ref = self._send(item)
        self._sent[ref] = None
        self.arrivals.add(ref)

    def note(self, arrived: Arrived) -> None:
        self._sent[arrived.ref] = arrived
        self._last = arrived.ref
        self._tell()

    def pop(self) -> Arrived | None:
        """Removes and returns the one whose turn it is; None if it has to be waited for."""
        ref = next(iter(self._sent)) if self._ordered else self._last
        if ref is None or (arrived := self._sent.get(ref)) is None:
            return None
        del self._sent[ref]
        return arrived


def map_items(
    send: Send, items: Iterable[Any], what: str, *, ordered: bool, in_flight: int, progress: bool | None
) -> Generator[Any, None, None]:
    """See `Handle.map`."""
    places = _checked(items, in_flight)

    def next_of(window: Window) -> Any:
        while (arrived := window.pop()) is None:
            window.note(window.arrivals.take())
        return arrived.value()

    def values() -> Generator[Any, None, None]:
        with _bar(what, items, progress) as tell, Window(send, tell, ordered=ordered, in_flight=places) as window:
            for item in items:
                if window.is_full:
                    yield next_of(window)
                window.send(item)
            while window:
                yield next_of(window)

    return values()


def map_items_soon(
    send: Send, items: Iterable[Any], what: str, *, ordered: bool, in_flight: int, progress: bool | None
) -> AsyncGenerator[Any, None]:
    """See `AsyncHandle.map`."""
    places = _checked(items, in_flight)

    async def next_of(window: Window) -> Any:
        while (arrived := window.pop()) is None:
            window.note(await window.arrivals.take_soon())
        return arrived.value()

    async def values() -> AsyncGenerator[Any, None]:
        with _bar(what, items, progress) as tell, Window(send, tell, ordered=ordered, in_flight=places) as window:
            for item in items:
                if window.is_full:
                    yield await next_of(window)
                window.send(item)
            while window:
                yield await next_of(window)

    return values()


def _checked(items: object, in_flight: object) -> int:
    if not isinstance(items, Iterable):
        raise BadType(f"map() takes the items to send, a list or anything else to iterate over, not {items!r}")
    places = whole_number(in_flight)
    if places is None or places < 1:
        raise BadValue(f"in_flight is how many requests are under way at a time, a whole number from 1 on, not {in_flight!r}")
    return places


@contextmanager
def _bar(what: str, items: Iterable[Any], progress: bool | None) -> Iterator[Tell]:
    """A progress bar on standard error; by default if that is a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=len(items) if isinstance(items, Sized) else None)
        yield lambda: shown.advance(task)
