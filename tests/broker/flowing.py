"""A run that streams, for tests of readers: it appends frames as a replica does, and hears the credit that it gets."""

import asyncio
from typing import Any, Self

from mqserve.broker.results import ErrorInfo, Result, entry_of
from mqserve.broker.store import Append, Place, Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.streams import Credit, Frame, Head, Owner, frames_of, read_credit
from tests.broker.streaming import appended


class Run:
    """One answer. Use as a context manager, if it is to hear credit."""

    def __init__(
        self, store: Store, keys: StoreKeys, id: str, inbox: str, head: Head, endpoint: str = "e", *, replays: bool = False
    ) -> None:
        self._store, self._keys, self.id = store, keys, id
        self.inboxes = (inbox,)
        self.head: Head | None = head
        self.owner = Owner.new(head.replica, 1, "b", endpoint, resumable=head.resumable, replays=replays)
        self.last = 0
        self.credits: list[Credit] = []

    async def __aenter__(self) -> Self:
        feed = self._keys.feed(self.owner.replica)
        self._reading = asyncio.create_task(self._store.read_inbox(feed, self._on_credits, lambda: None))
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()

    async def show(self, *chunks: bytes, silently: bool = False, **fields: Any) -> None:
        """Appends these chunks; `silently`, so that no inbox is told of them."""
        frames: list[bytes] = []
        for chunk in chunks:
            head, self.head = self.head, None
            frames += [frame.to_bytes() for frame in frames_of(chunk, head=head)]
        await self._append(frames, () if silently else self.inboxes, **fields)

    async def show_head(self) -> None:
        head, self.head = self.head, None
        await self._append([Frame(b"", head=head).to_bytes()], self.inboxes)

    async def end(self, error: ErrorInfo | None = None, *, silently: bool = False) -> None:
        ends = Result(status=500 if error else 200, frames=self.last, error=error).to_bytes()
        await self._append([], () if silently else self.inboxes, ends=ends, end_note=entry_of(self.id, ends))

    @property
    def keys(self) -> tuple[str, str]:
        return self._keys.stream(self.id), self._keys.owner(self.id)

    async def stands(self) -> bool:
        """Whether the store has anything of it but its result."""
        stream, owner = self.keys
        return bool(await self._store.read_stream(stream, Place(0, 0))) or await self._store.get(owner) is not None

    async def _append(self, frames: list[bytes], inboxes: tuple[str, ...], **fields: Any) -> None:
        stream, owner = self.keys
        append = Append(
            id=self.id, stream=stream, owner=owner, future=self._keys.future(self.id), claim=self.owner.to_bytes(), attempt=1,
            first=self.last + 1, frames=tuple(frames), inboxes=inboxes, **fields,
        )  # fmt: skip
        self.last += len(frames)
        assert await appended(self._store, append) == self.last

    def _on_credits(self, entries: list[bytes]) -> None:
        self.credits += [credit for entry in entries if (credit := read_credit(entry)) is not None]
