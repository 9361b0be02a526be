"""Large results: their bodies stand in the store under keys of their own."""

from __future__ import annotations

import msgspec

from .errors import MQServeError
from .results import Result
from .store import Store
from .store_keys import StoreKeys


class BodyGone(MQServeError):
    """A result whose body is in the store no more."""


async def with_body(store: Store, keys: StoreKeys, future_id: str, result: Result) -> Result:
    """The result with its body, wherever that stands. Raises StoreUnavailable, and BodyGone."""
    if not result.ref:
        return result
    body = await store.get_large(keys.result_body(future_id))
    if body is None:
        raise BodyGone(
            "the body of the result is gone from the store: kept as long as the result, or until a proxy has read it for its client"
        )
    return msgspec.structs.replace(result, body=body, ref="")
