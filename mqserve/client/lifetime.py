"""The life of a client: what it has opened in this process, `with` blocks on it, and its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Protocol, Self

from ..broker.backoff import keep_running
from ..broker.calls.sending import RequestSender
from ..broker.errors import InstanceError
from ..broker.process import forks
from ..broker.process.interrupts import to_the_end
from ..broker.values.signing import Signer
from ..connections import Connections
from ..controller.state.documents import Desired
from ..controller.state.following import follow_state
from ..replicas.context import check_not_importing
from .deployments import Deployments
from .handle import Address
from .membership import Membership
from .runtime import Runtime
from .sender import Sender

logger = logging.getLogger(__name__)
_opening = forks.Lock()  # held while a forked child opens connections of its own


class Ending(Protocol):
    """Closes a client, or shuts its instance down."""

    def end(self, why: str, *, shuts_down: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """The part of a client that belongs to one process: a thread and connections, which a forked child does not have."""

    runtime: Runtime
    connections: Connections
    membership: Membership
    requests: RequestSender
    sender: Sender
    deployments: Deployments
    ending: Ending
    depth: int


class State(Enum):
    """The state of a client. A client that has ended stays so; the value is the message for its later users."""

    OPEN = ""
    CLOSED = "the client has been closed: call serve.connect(), and get handles and futures of the client that it returns"
    SHUT_DOWN = "Client has already been shut down."


CLOSED_MEANWHILE = "the client was closed meanwhile; a request that was sent goes on, and another client's future(id) reads its result"
SHUT_DOWN_MEANWHILE = "the client was shut down meanwhile: start or connect again"


class Lifetime:
    """Opens in a forked child what the parent's client has opened, and ends it once. `Client` adds the methods of an instance."""

    def __init__(
        self, runtime: Runtime, connections: Connections, membership: Membership, ending: Ending, again: Callable[[], Lifetime]
    ) -> None:
        requests = RequestSender(connections.queue, connections.store, connections.keys, connections.process_id)
        deployments = Deployments(connections, membership, self._follow)
        sender = Sender(runtime, connections, requests, membership, deployments, lambda: self.sender)
        self._own = Opened(runtime, connections, membership, requests, sender, deployments, ending, forks.depth)
        self._again = again
        self._depth = forks.depth
        self.settings = connections.settings
        self.on_end: Callable[[], None] = lambda: None  # called when it is about to be closed or shut down
        self._state = State.OPEN
        self._is_shared = False  # whether a later call of start() or connect() returned it again
        self._blocks = 0  # number of `with` blocks on it that are still open
        self._ends_with_them = False
        self._lock = forks.Lock()  # guards the four fields below

    def __repr__(self) -> str:
        state = "" if self.is_open else f", {self._state.name.lower().replace('_', ' ')}"
        return f"<{type(self).__name__} of {self.settings.namespace!r}{state}>"

    def __enter__(self) -> Self:
        self._check_open()
        with self._lock:
            self._blocks += 1
            self._ends_with_them = self._ends_with_them or not self._is_shared
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks or not self._ends_with_them:
                return
        if self.owns:
            self.shutdown()
        else:
            self.close()

    @property
    def address(self) -> Address:
        return Address(self.settings.namespace, self._own.membership.instance)

    @property
    def owns(self) -> bool:
        """Whether this process runs the instance, which then ends with it."""
        return self._own.membership.owns and not self.is_inherited

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_open(self) -> bool:
        return self._state is State.OPEN

    @property
    def has_ended(self) -> bool:
        """Whether the instance was shut down and, for a client that joined, no other one runs in its place."""
        return self._own.membership.has_ended and self._own.depth == forks.depth

    @property
    def sender(self) -> Sender:
        """The sender that handles use. Raises InstanceError once the client is closed or shut down."""
        return self._opened.sender

    @property
    def _opened(self) -> Opened:
        """The opened part in this process. Raises InstanceError once the client is closed or shut down, and in a forked child of the
        embedded form."""
        self._check_open()
        if self._own.depth != forks.depth:
            with _opening:
                if self._own.depth != forks.depth:
                    of_parent, self._own = self._own.sender, self._again()._own
                    self._own.sender.only_plain = of_parent.only_plain
        return self._own

    @property
    def _connections(self) -> Connections:
        return self._opened.connections

    @property
    def _deployments(self) -> Deployments:
        check_not_importing("a function that changes the instance")
        return self._opened.deployments

    @property
    def _membership(self) -> Membership:
        return self._opened.membership

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked after the client was made."""
        return self._depth != forks.depth

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the client belongs to an embedded instance in another process."""
        return self.is_inherited and self.settings.embedded

    def give_again(self) -> Self:
        """Returns the client to a later call of start() or connect(). From now on its `with` blocks do not close it, since other parts of
        the program use it. The block in which an instance was started still ends the instance."""
        with self._lock:
            self._is_shared = True
            self._ends_with_them = self._ends_with_them and self.owns
        return self

    async def run(self) -> None:
        """Reads results and follows the desired document until cancelled. Called by the session that made the client."""
        own = self._own
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(own.requests.run())
            await keep_running("the client's look at its instance", lambda: self._follow_forever(own))

    async def _follow_forever(self, own: Opened) -> None:
        signer = own.connections.settings.signer
        async for desired, observed in follow_state(own.connections.store, own.connections.keys):
            own.sender.key_problem = "" if observed is None else _key_problem(signer, observed.sealed_by)
            own.sender.jobs.refusal = "" if observed is None else observed.store_is_full
            own.sender.jobs.callbacks = None if observed is None else observed.callbacks
            if await own.membership.saw(desired) and desired is not None:
                self._follow(desired)
            elif own.membership.has_ended:
                self._follow(Desired())

    async def stop_sending(self, why: str) -> None:
        """Makes later requests fail, and returns once all accepted ones are published. Called by the session that made the client."""
        self._own.sender.end(why)
        await self._own.requests.settle()

    def _follow(self, desired: Desired) -> None:
        self._own.sender.desired = desired
        self._own.requests.follow(desired.shards)

    def shutdown(self) -> None:
        """Ends the instance: proxies and replicas drain, queues and documents are deleted. Idempotent; later calls of other methods raise
        InstanceError.

        A client that joined the instance gets an InstanceError if it still drains after all the time that its replicas may take. Raises
        InstanceError if the client was closed. In a process forked since the client was opened, the instance goes on: only the
        connections of the forked child are closed.
        """
        if self._state is State.CLOSED:
            raise InstanceError("the client has been closed, and its instance runs on: the shutdown() of another client ends it")
        if self.is_inherited and self.is_open:
            logger.warning("shutdown() in a forked child closes what this process has opened; the instance is its parent's and goes on")
        with to_the_end():
            self._end(State.SHUT_DOWN, SHUT_DOWN_MEANWHILE, shuts_down=not self.is_inherited)

    def close(self) -> None:
        """Leaves the instance, which runs on. Idempotent. Later calls of other methods raise InstanceError, and so do pending waits for
        results.

        Raises InstanceError, and changes nothing, for a client whose instance would end with it.
        """
        if self.owns and self.is_open:
            raise InstanceError(
                "this process runs the instance, which would end with its client: call shutdown() if that is meant, or start the instance "
                "with detached=True or `mqserve start`"
            )
        self._end(State.CLOSED, CLOSED_MEANWHILE, shuts_down=False)

    def find_again(self) -> None:
        """Makes a client that joined, and whose instance has ended, go on with the next one. Raises InstanceError if there is none yet."""
        self._call(self._membership.find_again())

    def _end(self, state: State, why: str, *, shuts_down: bool) -> None:
        """Ends the client once. In a forked child there may be nothing to end."""
        with self._lock:
            if not self.is_open:
                return
            self._state = state
        self.on_end()
        if self._own.depth == forks.depth:
            self._own.ending.end(why, shuts_down=shuts_down)

    def _call(self, work: Any) -> Any:
        try:
            runtime = self._opened.runtime
        except BaseException:
            work.close()  # nobody will await it
            raise
        return runtime.call(work)

    def _check_open(self) -> None:
        if not self.is_open:
            raise InstanceError(self._state.value)


def _key_problem(signer: Signer, sealed_by: Collection[str]) -> str:
    """Returns why replicas that demand seals by these keys refuse what this process sends; empty if they do not. While keys are swapped,
    each process holds both."""
    if not sealed_by or any(key_id in sealed_by for key_id in signer.key_ids):
        return ""
    has = "another key" if signer else "no key"
    return (
        f"the replicas of this instance take only sealed requests of handles, and this process has {has}: set MQSERVE_SECRET_KEY to that "
        "of the instance"
    )
