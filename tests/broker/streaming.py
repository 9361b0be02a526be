"""What the tests of streams do all day: append frames and learn the outcome, and read what stands there."""

import asyncio
from typing import Any

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.results import read_entry
from mqserve.broker.store import Append, Place, Refusal, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import BUDGET_S

START = Place(0, 0)


def append_of(keys: StoreKeys, first: int, *frames: bytes, id: str = "f", **fields: Any) -> Append:
    """Of the run `run`, attempt 1, unless said otherwise."""
    known: dict[str, Any] = {"claim": b"run", "attempt": 1, **fields}
    return Append(id=id, stream=keys.stream(id), owner=keys.owner(id), future=keys.future(id), first=first, frames=frames, **known)


async def appended(store: Store, append: Append) -> int | Refusal:
    """The outcome. Told twice, it fails the test."""
    told: asyncio.Future[int | Refusal | Exception] = asyncio.get_running_loop().create_future()
    store.append_then(append, told.set_result)
    async with asyncio.timeout(BUDGET_S):
        outcome = await told
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def appended_at_last(store: Store, append: Append) -> int | Refusal:
    """Repeats it to a store that was away."""
    async with asyncio.timeout(BUDGET_S):
        while True:
            try:
                return await appended(store, append)
            except StoreUnavailable:
                continue


async def frames_of(store: Store, keys: StoreKeys, id: str = "f") -> list[tuple[int, int, bytes]]:
    """Attempt, number and bytes of all that stand there, read in portions."""
    found: list[tuple[int, int, bytes]] = []
    after = START
    while entries := await store.read_stream(keys.stream(id), after):
        found += [(place.attempt, place.seq, frame) for place, frame in entries]
        after = entries[-1][0]
    return found


def told(notes: list[bytes]) -> list[tuple[str, int, bytes] | bytes]:
    """Inbox entries: of frames their id, number and bytes; others as they are."""
    return [(entry.id, entry.seq, entry.payload) if (entry := read_entry(note)) and entry.kind == 1 else note for note in notes]
