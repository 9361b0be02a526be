"""The Redis client as we use it: budgets of our own, refusals that name the key, and cancellations that are heeded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError

from .refusals import refusal_code

CONNECT_S = 2.0
T = TypeVar("T")


class Client(redis.Redis):
    """Its refusals name the command and the key: Redis itself says only "one of the keys", or none."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except NoPermissionError as error:
            keys = _keys(args)
            raise NoPermissionError(f"{' '.join([str(args[0]), *keys[:1]])}: {error}", status_code=error.status_code) from None
        except ResponseError as error:
            if refusal_code(error) == "WRONGTYPE" and (keys := _keys(args)):
                raise ResponseError(f"WRONGTYPE {keys[0]}") from error
            raise


def _keys(args: tuple[Any, ...]) -> list[str]:
    """Of a command's arguments."""
    return [argument for argument in args[1:] if isinstance(argument, str) and argument.startswith("mqserve:")]


class _Pool(redis.BlockingConnectionPool):
    """The last connection given back is the next one used: where that is one that could not be opened, since the server takes no more, an
    open one beneath it would never be used again. So it goes to the bottom."""

    async def release(self, connection: Any) -> None:
        await super().release(connection)
        kept = self._available_connections
        if kept and kept[-1] is connection and not connection.is_connected:
            kept.insert(0, kept.pop())


def pooled_client(url: str, *, connections: int, budget_s: float, tries: int) -> Client:
    """For commands; each of its calls ends within the budget."""
    times = {"timeout": budget_s, "socket_timeout": budget_s, "socket_connect_timeout": CONNECT_S}
    pool = _Pool.from_url(url, max_connections=connections, retry=Retry(NoBackoff(), tries - 1), **times)
    client: Client = Client.from_pool(pool)  # type: ignore[assignment]  # they say Redis, and make the class's own
    return client


def blocking_client(url: str) -> Client:
    """For calls that wait at the server, whose end is their caller's to see to."""
    client: Client = Client.from_url(url, socket_timeout=None, socket_connect_timeout=CONNECT_S, retry=Retry(NoBackoff(), 0))  # type: ignore[assignment]
    return client


async def heeding_cancellation(call: Callable[[], Awaitable[T]]) -> T:
    """redis-py sends through `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes with its result.

    One lost in a hundred, and whoever cancelled waits for ever: a shutdown, or the TaskGroup of a replica that drains.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call()
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result
