"""The one way in which the desired document is changed, by clients, starters and controllers: the next version, by compare-and-set."""

from __future__ import annotations

import msgspec

from ..broker.errors import BadEnvelope, BadValue
from ..broker.store import Guard, Store
from ..broker.store_keys import StoreKeys
from .state.documents import Desired


async def write_next(store: Store, keys: StoreKeys, raw: bytes | None, wanted: Desired, *, guard: Guard | None = None) -> Desired | None:
    """`wanted` as the version that follows its own, if `raw` still stands in the store, and the guard's value at its key; None where not.

    Raises BadValue for what nobody could read again. A start writes the first version itself (`lease.py`), and a controller
    gives back a lost one under a higher epoch (`known_documents.py`).
    """
    new = msgspec.structs.replace(wanted, version=wanted.version + 1)
    return new if await store.replace(keys.desired, raw, encode(new), guard=guard) else None


def encode(desired: Desired) -> bytes:
    """The document. Raises BadValue rather than to write what nobody could read again."""
    try:
        raw = desired.to_bytes()
        Desired.from_bytes(raw)
    except (BadEnvelope, UnicodeEncodeError, RecursionError) as error:
        raise BadValue(f"the change cannot be kept as JSON: {error}") from error
    return raw
