"""Ctrl-C: the first one ends a process in order, the second one at once and with a sentence."""

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
    """Counts the interrupts of one process. With `raises` the first one raises KeyboardInterrupt, else it only sets `came`. `first` and
    `at_once` are printed at the first and the second one."""

    def __init__(self, first: str = "", at_once: str = AT_ONCE, *, raises: bool = True) -> None:
        self.came = False
        self.raises = raises
        self.first = first
        self.at_once = at_once

    def __repr__(self) -> str:
        return f"<Interrupts, {'one came' if self.came else 'none came'}>"

    def take(self, number: int, frame: object = None) -> None:
        """Handles one signal; fits `signal.signal`."""
        if self.came:
            say(self.at_once)
            os._exit(128 + number)
        self.came = True
        if self.first:
            say(self.first)
        if self.raises:
            raise KeyboardInterrupt


def say(words: str) -> None:
    """Writes to standard error; safe in a signal handler. A closed standard error is no failure, so that Ctrl-C works all the same."""
    with suppress(OSError):
        os.write(2, f"{words}\n".encode())


@contextmanager
def taking(interrupts: Interrupts, *numbers: int) -> Iterator[Interrupts]:
    """Handles these signals (SIGINT, unless others are named) inside the block, also in a background job of a shell, which ignores
    SIGINT. Outside the main thread it does nothing."""
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
    """Lets the block finish over the first Ctrl-C, which is raised afterwards; a second one ends this process at once. For long work that
    should be done whole. Does nothing outside the main thread or if the program has a SIGINT handler of its own."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupts = Interrupts(DRAINING, raises=False)
    with taking(interrupts):
        yield
    if interrupts.came and threading.main_thread().is_alive():  # else the program is ending anyway
        raise KeyboardInterrupt
