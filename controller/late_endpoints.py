"""Endpoints that the leader has not heard of yet: creating one waits for proxies, and not for controllers."""

from __future__ import annotations

from ..broker.errors import BadEnvelope
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .state.documents import Desired
from .state.reading import read_desired


async def document_with(endpoint: str, followed: Desired, store: Store, keys: StoreKeys) -> Desired:
    """Returns the document that this controller follows or, if that has no such endpoint, the one in the store, which may have it. Raises
    StoreUnavailable."""
    if endpoint in followed.endpoints:
        return followed
    raw = await store.get(keys.desired)
    try:
        return followed if raw is None else read_desired(raw)
    except BadEnvelope:  # a broken document: the last good one counts, as everywhere
        return followed
