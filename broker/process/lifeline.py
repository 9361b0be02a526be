"""How a process of ours learns that it is to stop: a signal, or its parent's end of a pipe closing (a parent that was killed)."""

from __future__ import annotations

import asyncio
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

ORPHAN_BUDGET_S = 9.0  # what a process has to end after its parent
PIPE_VARIABLE = "MQSERVE_LIFELINE_FD"


def run(main: Coroutine[Any, Any, int]) -> int:
    """Runs a process's main coroutine on uvloop; the exit code."""
    return uvloop.run(main, loop_factory=IoLoop)


class Stop(asyncio.Event):
    """Set once, to end. `orphaned`: the parent was killed, so there is no time to lose."""

    orphaned = False
    lifeline: io.FileIO | None = None  # our end of the pipe

    def __init__(self) -> None:
        super().__init__()
        self._interrupts = Interrupts(DRAINING, raises=False)

    def interrupt(self) -> None:
        """Ctrl-C: a second one ends this process at once. SIGTERM does not: a process manager may send two."""
        self._interrupts.take(signal.SIGINT)
        self.set()


def stop_event(env: MutableMapping[str, str] = os.environ) -> Stop:
    """Set by SIGTERM, SIGINT, or the end of the parent. Call it on the running loop of the main thread."""
    stop = Stop()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.interrupt)
    forks.take_signals(signal.SIGTERM, signal.SIGINT)
    if fd := env.pop(PIPE_VARIABLE, ""):  # ours alone: what user code starts must not take the number for its own
        stop.lifeline = forks.guard(io.FileIO(int(fd), "rb"))
        os.set_inheritable(stop.lifeline.fileno(), False)
        loop.add_reader(stop.lifeline, _on_pipe, stop.lifeline, stop)
    return stop


def _on_pipe(pipe: io.FileIO, stop: Stop) -> None:
    """The parent never writes: readable means closed."""
    asyncio.get_running_loop().remove_reader(pipe)
    stop.orphaned = True
    last_resort = threading.Timer(ORPHAN_BUDGET_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()  # nobody is left who would kill it, whatever keeps it from ending
    stop.set()
