"""What every scenario of one run shares: the options, RabbitMQ and Redis, and the subjects that several scenarios measure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

from .subjects import BARE, FORMS, Servers, Subject, SubjectFailed, open_servers, running_mqserve, running_starlette


class Bench:
    """One run. What it starts ends with the stack that it was given: the whole run's for the servers, the scenario's for subjects."""

    def __init__(self, stack: ExitStack, *, seconds: float, peers: Sequence[str] = ()) -> None:
        self.seconds = seconds  # of one sample
        self.peers = peers
        self.left_out: dict[str, str] = {}  # subjects that could not be measured, and why
        self._stack = stack

    @cached_property
    def servers(self) -> Servers:
        """RabbitMQ and Redis; started when first asked for."""
        return open_servers(self._stack)

    def open(self, names: Iterable[str], stack: ExitStack) -> Iterator[Subject]:
        """Starts these subjects one after the other; one that does not start is left out."""
        for name in names:
            say(f"starting {name}")
            try:
                if name in BARE:
                    yield stack.enter_context(running_starlette(name))
                elif name in FORMS:
                    yield stack.enter_context(running_mqserve(name, self.servers if name == "distributed" else None))
            except SubjectFailed as failed:
                self.left_out[name] = str(failed)


def say(what: str) -> None:
    """Shows progress on the terminal's last line."""
    print(f"\r\x1b[K{what} …", end="", file=sys.stderr, flush=True)
