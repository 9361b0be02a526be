"""Large results: their bodies stand in the store under keys of their own, or in files."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from .errors import BadEnvelope
from .result_files import BodyGone
from .results import Result
from .store import Store
from .store_keys import StoreKeys


async def with_body(store: Store, keys: StoreKeys, future_id: str, result: Result) -> Result:
    """The result with its body, wherever that stands. Raises StoreUnavailable, and BodyGone."""
    if not result.ref:
        return result
    if result.file is not None:
        return msgspec.structs.replace(result, body=await store.files.read(future_id, result.file), ref="", file=None)
    body = await store.get_large(keys.result_body(future_id))
    if body is None:
        raise BodyGone(
            "the body of the result is gone from the store: kept as long as the result, or until a proxy has read it for its client"
        )
    return msgspec.structs.replace(result, body=body, ref="")


async def forget_job(store: Store, keys: StoreKeys, future_id: str) -> bool:
    """Removes all that is kept of a job that has ended. Returns False for one that has not. Raises StoreUnavailable."""
    raw = await store.get(keys.future(future_id))
    is_forgotten = await store.jobs.forget(future_id)
    if is_forgotten and raw is not None:
        with suppress(BadEnvelope):
            if (file := Result.from_bytes(raw).file) is not None:
                await store.files.drop(future_id, file)
    return is_forgotten
