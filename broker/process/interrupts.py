"""Ctrl-C: the first one ends in order, the second one at once and with a sentence."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import forks

DRAINING = "\nDraining … (once more to end at once)"
AT_ONCE = "\nEnding at once: what was under way is dropped, and what still runs here ends within seconds."
INTERRUPTED = 130  # the exit code: 128 and the number of SIGINT


class Interrupts:
    """Of one process. `raises`: whether the first one is to interrupt what goes on, or only to show in `came`. `first` and `at_once` are
    said of the first one and of the second."""

    def __init__(self, first: str = "", at_once: str = AT_ONCE, *, raises: bool = True) -> None:
        self.came = False
        self.raises = raises
        self.first = first
        self.at_once = at_once

    def __repr__(self) -> str:
        return f"<Interrupts, {'one came' if self.came else 'none came'}>"

    def take(self, number: int, frame: object = None) -> None:
        """As a signal handler."""
        if self.came:
            say(self.at_once)
            os._exit(128 + number)
        self.came = True
        if self.first:
            say(self.first)
        if self.raises:
            raise KeyboardInterrupt


def say(words: str) -> None:
    """To standard error, from a signal handler too. Where nobody reads that any more, Ctrl-C works all the same."""
    with suppress(OSError):
        os.write(2, f"{words}\n".encode())


@contextmanager
def taking(interrupts: Interrupts, *numbers: int) -> Iterator[Interrupts]:
    """Takes these signals (SIGINT, unless others are named) meanwhile; also in a shell's background job, which was told to ignore them.
    Only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.take) for number in numbers or (signal.SIGINT,)}
    forks.take_signals(*before)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def to_the_end() -> Iterator[None]:
    """Goes on over the first Ctrl-C, which is raised afterwards; a second one ends this process at once. For work of any program that
    takes long and should be done whole. A handler of the program's own stays, and other threads than the main one change nothing."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupts = Interrupts(DRAINING, raises=False)
    with taking(interrupts):
        yield
    if interrupts.came and threading.main_thread().is_alive():  # else the program is at its end, and ends
        raise KeyboardInterrupt
