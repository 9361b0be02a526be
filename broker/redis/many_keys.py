"""Sets the TTLs of many keys, such as the chunks of a folder of code, in few round trips."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from .client import Client

_AT_ONCE = 500  # commands of one pipeline, which share one call's budget


class Call(Protocol):
    """Makes a call to the store within its budget."""

    async def __call__(self, call: Callable[[], Awaitable[list[Any]]]) -> list[Any]: ...


async def expire_keys(client: Client, call: Call, keys: Sequence[str], ttl_ms: int | None) -> None:
    """Sets the TTL of each key, or removes it (None). Absent keys stay absent."""
    for some in _portions(keys):
        pipeline = client.pipeline(transaction=False)
        for key in some:
            if ttl_ms is None:
                pipeline.persist(key)
            else:
                pipeline.pexpire(key, ttl_ms)
        await call(pipeline.execute)


async def extend_keys(client: Client, call: Call, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
    """Extends shorter TTLs (PEXPIRE GT, which leaves keys without a TTL alone). Returns the absent keys. EXISTS comes after PEXPIRE: a key
    that expires in between counts as absent."""
    missing = set[str]()
    for some in _portions(keys):
        pipeline = client.pipeline(transaction=False)
        for key in some:
            pipeline.pexpire(key, ttl_ms, gt=True)
            pipeline.exists(key)
        answers = await call(pipeline.execute)
        missing |= {key for key, exists in zip(some, answers[1::2], strict=True) if not exists}
    return frozenset(missing)


def _portions(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[at : at + _AT_ONCE] for at in range(0, len(keys), _AT_ONCE)]
