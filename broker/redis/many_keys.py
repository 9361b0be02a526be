"""Expiries of many keys in few round trips: the chunks of a folder of code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from .client import Client

_AT_ONCE = 500  # a pipeline's commands are answered together, and a budget is for one


class Call(Protocol):
    """The store's way to make a call within its budget."""

    async def __call__(self, call: Callable[[], Awaitable[list[Any]]]) -> list[Any]: ...


async def expire_keys(client: Client, call: Call, keys: Sequence[str], ttl_ms: int | None) -> None:
    """Sets the TTL of each, or takes it away. A key that does not exist stays away."""
    for some in _portions(keys):
        pipeline = client.pipeline(transaction=False)
        for key in some:
            if ttl_ms is None:
                pipeline.persist(key)
            else:
                pipeline.pexpire(key, ttl_ms)
        await call(pipeline.execute)


async def extend_keys(client: Client, call: Call, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
    """PEXPIRE GT, for which a key without a TTL has the longest one. Returns the keys that do not exist. EXISTS comes last, so that a key
    which expires in between is one of them."""
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
