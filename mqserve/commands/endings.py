"""How a command ends: its exit code, one sentence for an error of ours, and Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, NoReturn

import click

from ..broker.errors import MQServeError
from ..broker.process.interrupts import INTERRUPTED, Interrupts, taking
from ..broker.process.lifeline import run as run_loop
from ..broker.process.printable import INDENT, printable_lines
from . import logs

FAILED = 1
_LEAVE_BUDGET_S = 0.2
interrupts = Interrupts()  # of this process; a command may set messages of its own


def one_sentence(command: Callable[..., Any]) -> Callable[..., Any]:
    """Makes our own errors end a command with their sentence instead of a traceback."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        sys.exit(exit_code(lambda: command(*args, **options)))

    return run


def exit_code(command: Callable[[], int | None]) -> int:
    try:
        with taking(interrupts):
            return command() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if (ours := _ours(error)) is None:
            raise
        click.echo(f"Error: {printable_lines(str(ours), INDENT)}", err=True)
        return FAILED


def _ours(error: BaseException) -> MQServeError | None:
    """Returns the one error of ours in `error`, also from inside exception groups, else None."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, MQServeError) else None


def leave_now(role: Coroutine[Any, Any, int]) -> NoReturn:
    """Ends the process when the role ends, in any way: a user's thread that still runs must not keep it alive."""
    code = FAILED
    try:
        code = exit_code(lambda: run_loop(role))
    except BaseException as error:
        logs.log_uncaught(type(error), error, error.__traceback__)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def end_if_closing_hangs(code: int) -> None:
    """Ends the process at once if closing connections would wait seconds for a server that hangs: nothing has to be undone here."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    if rest and (await asyncio.wait(rest, timeout=_LEAVE_BUDGET_S))[1]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
