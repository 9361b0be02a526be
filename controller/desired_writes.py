"""Writes the desired document: clients, starters and controllers make every change as its next version, by compare-and-set."""

from __future__ import annotations

import msgspec

from ..broker.errors import BadEnvelope, BadValue
from ..broker.store import Guard, Store
from ..broker.store_keys import StoreKeys
from .state.documents import Desired
from .state.reading import read_desired


async def write_next(store: Store, keys: StoreKeys, raw: bytes | None, wanted: Desired, *, guard: Guard | None = None) -> Desired | None:
    """Writes `wanted` as its next version and returns that. Returns None if `raw` is no longer in the store, or the guard does not hold.

    Raises BadValue for a document that could not be read back. A start writes the first version itself (`lease.py`), and a controller
    restores a lost one under a higher epoch (`known_documents.py`).
    """
    new = msgspec.structs.replace(wanted, version=wanted.version + 1)
    return new if await store.replace(keys.desired, raw, encode(new), guard=guard) else None


def encode(desired: Desired) -> bytes:
    """Returns the document as JSON. Raises BadValue if it could not be read back."""
    try:
        raw = desired.to_bytes()
        read_desired(raw)
    except (BadEnvelope, UnicodeEncodeError, RecursionError) as error:
        raise BadValue(f"the change cannot be kept as JSON: {error}") from error
    return raw
