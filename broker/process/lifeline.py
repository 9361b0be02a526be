"""How a process of ours learns that it is to stop: by a signal, or because its parent was killed and the pipe to it closed."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import threading
from collections.abc import Coroutine, MutableMapping
from typing import Any

import uvloop

from . import forks
from .interrupts import DRAINING, Interrupts
from .loops import IoLoop

ORPHAN_BUDGET_S = 9.0  # the time a process has to end after its parent's death
PIPE_VARIABLE = "MQSERVE_LIFELINE_FD"


def run(main: Coroutine[Any, Any, int]) -> int:
    """Runs a process's main coroutine on uvloop and returns its exit code."""
    gc.freeze()  # what was imported stays for good, and looking for garbage in it would stop the process for 20 to 40 ms each time
    return uvloop.run(main, loop_factory=IoLoop)


class Stop(asyncio.Event):
    """An event that tells the process to end. `orphaned` means that the parent was killed, so the process must hurry."""

    orphaned = False
    lifeline: io.FileIO | None = None  # our end of the pipe

    def __init__(self) -> None:
        super().__init__()
        self._interrupts = Interrupts(DRAINING, raises=False)

    def interrupt(self) -> None:
        """Handles Ctrl-C: a second one ends this process at once. A second SIGTERM does not, since process managers may send two."""
        self._interrupts.take(signal.SIGINT)
        self.set()


def stop_event(env: MutableMapping[str, str] = os.environ) -> Stop:
    """Returns an event that SIGTERM, SIGINT or the parent's death sets. Call it on the running loop of the main thread."""
    stop = Stop()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.interrupt)
    forks.take_signals(signal.SIGTERM, signal.SIGINT)
    if fd := env.pop(PIPE_VARIABLE, ""):  # removed, so that a program that user code starts does not take the number for its own
        stop.lifeline = forks.guard(io.FileIO(int(fd), "rb"))
        os.set_inheritable(stop.lifeline.fileno(), False)
        loop.add_reader(stop.lifeline, _on_pipe, stop.lifeline, stop)
    return stop


def _on_pipe(pipe: io.FileIO, stop: Stop) -> None:
    """The parent never writes to the pipe, so readable means closed."""
    asyncio.get_running_loop().remove_reader(pipe)
    stop.orphaned = True
    last_resort = threading.Timer(ORPHAN_BUDGET_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()  # ends this process whatever keeps it: no parent is left to kill it
    stop.set()
