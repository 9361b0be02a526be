"""Reads of streamed answers: an entry holds what an inbox is told of the same frame. Entries of another shape, which are not ours, are left
out."""

from __future__ import annotations

import re
from typing import Any

from redis.exceptions import ResponseError

from ..results import CHUNK_KIND, read_entry
from ..store import Place
from .client import Client
from .kept_wire import KeptWire

FIELD = b"f"
_ID = re.compile(rb"(\d{1,18})-(\d{1,18})")


async def read_entries(wire: KeptWire, key: str, after: Place, count: int) -> list[tuple[Place, bytes]]:
    reply = await wire.ask("XRANGE", key, f"({after.attempt}-{after.seq}", "+", "COUNT", str(count))
    return [entry for one in reply if (entry := _entry_of(one)) is not None]


async def read_last(client: Client, key: str) -> int:
    """The number of the last frame that was ever appended; 0 if there is no such key."""
    try:
        info: Any = await client.xinfo_stream(key)
    except ResponseError as error:
        if "no such key" in str(error):
            return 0
        raise
    place = _place_of(info.get("last-generated-id"))
    return 0 if place is None else place.seq


def _entry_of(reply: Any) -> tuple[Place, bytes] | None:
    match reply:
        case [id_, [field, bytes() as raw]] if field == FIELD and (place := _place_of(id_)) is not None:
            note = read_entry(raw)
            return None if note is None or note.kind != CHUNK_KIND else (place, note.payload)
    return None


def _place_of(id_: Any) -> Place | None:
    found = _ID.fullmatch(id_) if isinstance(id_, bytes) else None
    return None if found is None else Place(int(found[1]), int(found[2]))
