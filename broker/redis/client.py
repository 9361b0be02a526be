"""The Redis client with our timeouts, with errors that name the key, and with cancellations that take effect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from .refusals import refusal_code

CONNECT_S = 2.0
FAILURES = (RedisError, OSError, TimeoutError, RuntimeError)  # the last is uvloop's, of a write to a connection that was just lost
T = TypeVar("T")


class Client(redis.Redis):
    """A client whose errors name the command and the key: Redis itself says only "one of the keys", or nothing."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            raise naming_the_key(error, args) from None


def naming_the_key(error: Exception, args: Sequence[Any]) -> Exception:
    """Returns the error with the command and the key in its message, if it is about a key."""
    keys = [argument for argument in args[1:] if isinstance(argument, str) and argument.startswith("mqserve:")]
    if isinstance(error, NoPermissionError):
        return NoPermissionError(f"{' '.join([str(args[0]), *keys[:1]])}: {error}", status_code=error.status_code)
    if keys and refusal_code(error) == "WRONGTYPE":
        return ResponseError(f"WRONGTYPE {keys[0]}")
    return error


class _Pool(redis.BlockingConnectionPool):
    """A pool that moves a connection that could not be opened to the bottom. redis-py reuses the connection that was released last: when
    the server accepts no more, an unopened one on top would hide the open ones beneath it."""

    async def release(self, connection: Any) -> None:
        await super().release(connection)
        kept = self._available_connections
        if kept and kept[-1] is connection and not connection.is_connected:
            kept.insert(0, kept.pop())


def pooled_client(url: str, *, connections: int, budget_s: float, tries: int) -> Client:
    """Returns a client for commands; each call ends within the budget."""
    times = {"timeout": budget_s, "socket_timeout": budget_s, "socket_connect_timeout": CONNECT_S}
    pool = _Pool.from_url(url, max_connections=connections, retry=Retry(NoBackoff(), tries - 1), **times)
    client: Client = Client.from_pool(pool)  # type: ignore[assignment]  # they say Redis, and make the class's own
    return client


def blocking_client(url: str) -> Client:
    """Returns a client for calls that block at the server; the caller ends them."""
    client: Client = Client.from_url(url, socket_timeout=None, socket_connect_timeout=CONNECT_S, retry=Retry(NoBackoff(), 0))  # type: ignore[assignment]
    return client


async def heeding_cancellation(call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call`, and makes a cancellation during it take effect: redis-py sends through `asyncio.wait_for`, which before Python 3.12
    swallows a cancellation that arrives together with the result.

    About one in a hundred was lost, and then a shutdown or the TaskGroup of a draining replica waited for ever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call()
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result
