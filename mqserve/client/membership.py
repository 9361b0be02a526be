"""Which instance a client belongs to, and what happens when that instance is shut down or started again."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ..broker.errors import InstanceEnded, InstanceError
from ..connections import Connections, instance_has_ended
from ..controller import changes, lease
from ..controller.state.documents import Desired

T = TypeVar("T")


class Membership:
    """The membership of one client. A client that joined belongs to whichever instance runs under the namespace, and goes on with the
    next one; a client that runs its instance (`owns`) has only that one."""

    def __init__(self, connections: Connections, instance: str, *, owns: bool) -> None:
        self._connections = connections
        self.instance = instance
        self.owns = owns
        self.has_ended = False  # the instance was shut down

    def __repr__(self) -> str:
        return f"<Membership of {self.instance}{', which has ended' if self.has_ended else ''}>"

    async def saw(self, desired: Desired | None) -> bool:
        """Takes the current document, or None; returns whether it is our instance's."""
        if desired is None:
            self.has_ended = await instance_has_ended(self._connections, self.instance)
            return False
        is_ours = desired.instance == self.instance or not self.owns
        if is_ours:
            self.instance = desired.instance
        self.has_ended = not is_ours  # another instance's document: ours ended while this process was suspended
        return is_ours

    async def read(self) -> Desired:
        """Returns the current document. Raises InstanceEnded, and InstanceError if the document is lost."""
        _, desired = await self._noting_the_end(
            changes.read(self._connections.store, self._connections.keys, self.instance, any_instance=not self.owns)
        )
        await self.saw(desired)
        return desired

    async def commit(self, change: changes.Change) -> Desired:
        """Commits the change and returns the new document. Raises as `read` does, and any error of the change."""
        desired = await self._noting_the_end(
            changes.commit(self._connections.store, self._connections.keys, self.instance, change, any_instance=not self.owns)
        )
        await self.saw(desired)
        return desired

    async def check_goes_on(self, committed: Desired) -> None:
        """Called while waiting for a change to take effect. Raises InstanceError once the instance is shutting down, or gone."""
        found = await self._noting_the_end(changes.look(self._connections.store, self._connections.keys, committed.instance))
        if found is not None and found[1].closing:
            raise InstanceError(changes.IS_CLOSING)

    async def find_again(self) -> None:
        """Joins the instance that runs now, for a client whose instance has ended. Raises InstanceError if there is none."""
        self.instance = (await lease.read_instance(self._connections.store, self._connections.keys)).id
        self.has_ended = False

    async def _noting_the_end(self, looking: Awaitable[T]) -> T:
        """Notes an InstanceEnded at once, since the error tells the user to call `serve.connect()`, which must find it noted."""
        try:
            return await looking
        except InstanceEnded:
            self.has_ended = True
            raise
