"""Writes the files of deployed code back to a store that lost its data, from this node's cache."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from ..broker.backoff import delays
from ..broker.errors import UNPARSABLE, BadEnvelope, BadValue, StoreUnavailable
from ..broker.files.cache import Entry, cache_folder
from ..broker.files.manifest import Files
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.code import Code
from .state.documents import Desired

logger = logging.getLogger(__name__)


async def put_back_files(store: Store, keys: StoreKeys, desired: Desired) -> None:
    """Writes back the files that the document leads to and the store lacks. Tries until the store answers."""
    for backend in desired.backends.values():
        for pause_s in delays():
            try:
                await _put_back(store, keys, backend.code)
            except StoreUnavailable:
                await asyncio.sleep(pause_s)
                continue
            except (*UNPARSABLE, BadEnvelope, BadValue, OSError) as error:
                logger.warning("the files of backend %s cannot be given back to the store: %s", backend.name, error)
            break


async def _put_back(store: Store, keys: StoreKeys, code: str) -> None:
    raw = await store.get_large(keys.code(code))
    record = msgspec.msgpack.decode(raw, type=Code) if raw else None
    if record is None or not record.files:
        return
    files = await asyncio.to_thread(_cached, record.files)
    if files is None:
        return
    sources = files.sources()
    missing = await store.extend([keys.code(sha256) for sha256 in (*sources, files.sha256)], 1)
    for chunk, source in sources.items():
        if keys.code(chunk) in missing:
            content = await asyncio.to_thread(files.read, chunk, source)
            await store.set(keys.code(chunk), content, only_new=True)  # without a TTL: the leader sets one when no document names it
    if keys.code(files.sha256) in missing:
        await store.set(keys.code(files.sha256), files.raw, only_new=True)


def _cached(sha256: str) -> Files | None:
    entry = Entry(cache_folder(), sha256)
    manifest = entry.manifest()
    return Files(manifest, entry.roots(manifest)) if manifest is not None else None
