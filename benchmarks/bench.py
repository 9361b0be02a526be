"""What every scenario of one run shares: the options, RabbitMQ and Redis, and the subjects that several scenarios measure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import TypeVar

from .peers import HTTP_PEERS, running_http
from .subjects import FORMS, HANDLERS, PROGRAMS, Servers, Subject, SubjectFailed, open_servers, running_mqserve, running_starlette

T = TypeVar("T")


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

    def http_subjects(self, kind: str, stack: ExitStack) -> Iterator[Subject]:
        """Starts everything that serves HTTP, one after the other, with its handlers of that kind: `noop`, `bodies` or `streaming`."""
        ready = {"noop": HANDLERS, "bodies": ("json", "length"), "streaming": ("fast", "async_fast", "async_paced")}[kind]
        yield from self.started("starlette", running_starlette("starlette"), stack)
        if kind == "noop":
            yield from self.started("starlette-def", running_starlette("starlette-def"), stack)
        for form in FORMS:
            servers = self.servers if form == "distributed" else None
            yield from self.started(form, running_mqserve(form, servers, program=PROGRAMS / f"{kind}.py", ready=ready), stack)
        for peer in HTTP_PEERS:
            if peer.name in self.peers and (kind != "streaming" or peer.streams):
                yield from self.started(peer.name, running_http(peer, kind, [path for path in ready if peer.has(path)]), stack)

    def started(self, name: str, subject: AbstractContextManager[T], stack: ExitStack) -> Iterator[T]:
        """Starts a subject for as long as the stack is open, or says why it is left out."""
        say(f"starting {name}")
        try:
            yield stack.enter_context(subject)
        except SubjectFailed as failed:
            self.left_out[name] = str(failed)


def say(what: str) -> None:
    """Shows progress on the terminal's last line."""
    print(f"\r\x1b[K{what} …", end="", file=sys.stderr, flush=True)
