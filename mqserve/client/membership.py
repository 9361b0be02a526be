"""Which instance a client belongs to, and what becomes of that when the instance is shut down or started again."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ..broker.errors import InstanceEnded, InstanceError
from ..connections import Connections, instance_has_ended
from ..controller import changes, lease
from ..controller.state.documents import Desired

T = TypeVar("T")


class Membership:
    """Of one client. A client that joined is a member of whichever instance runs under the namespace, and goes on with the next one;
    a client that runs its instance (`owns`) has only that one."""

    def __init__(self, connections: Connections, instance: str, *, owns: bool) -> None:
        self._connections = connections
        self.instance = instance
        self.owns = owns
        self.has_ended = False  # somebody shut the instance down

    def __repr__(self) -> str:
        return f"<Membership of {self.instance}{', which has ended' if self.has_ended else ''}>"

    async def saw(self, desired: Desired | None) -> bool:
        """Told of each document that is there now, or of none. Whether it is that of our instance."""
        if desired is None:
            self.has_ended = await instance_has_ended(self._connections, self.instance)
            return False
        is_ours = desired.instance == self.instance or not self.owns
        if is_ours:
            self.instance = desired.instance
        self.has_ended = not is_ours  # another's, which came while this process was suspended
        return is_ours

    async def read(self) -> Desired:
        """The document as it is now. Raises InstanceEnded, and InstanceError where it is lost."""
        _, desired = await self._noting_the_end(
            changes.read(self._connections.store, self._connections.keys, self.instance, any_instance=not self.owns)
        )
        await self.saw(desired)
        return desired

    async def commit(self, change: changes.Change) -> Desired:
        """The document with the change in it. Raises as `read` does, and what the change raises."""
        desired = await self._noting_the_end(
            changes.commit(self._connections.store, self._connections.keys, self.instance, change, any_instance=not self.owns)
        )
        await self.saw(desired)
        return desired

    async def check_goes_on(self, committed: Desired) -> None:
        """For whoever waits for a change to be made true. Raises InstanceError once its instance is about to go, or has gone."""
        found = await self._noting_the_end(changes.look(self._connections.store, self._connections.keys, committed.instance))
        if found is not None and found[1].closing:
            raise InstanceError(changes.IS_CLOSING)

    async def find_again(self) -> None:
        """Of a client that joined, once its instance has ended: the one that runs now. Raises InstanceError where there is none."""
        self.instance = (await lease.read_instance(self._connections.store, self._connections.keys)).id
        self.has_ended = False

    async def _noting_the_end(self, looking: Awaitable[T]) -> T:
        """At once, since `serve.connect()`, which the error names, must find it noted."""
        try:
            return await looking
        except InstanceEnded:
            self.has_ended = True
            raise
