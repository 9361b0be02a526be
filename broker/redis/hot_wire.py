"""A connection to Redis of our own, for what every request needs, the record script (`record_script.py`) and the inbox (`inbox.py`), for
streams (`append_script.py`), and for two commands that redis-py makes dear: the beat that each member writes every second, and the reads of
large values (`store.py`). All other commands go through redis-py.

It replaces redis-py's pool, streams, timeouts and tasks in these places, where they cost several times as much as the command itself.
Here a command is one write to the transport, its reply one call of a function, and all deadlines of a connection share one timer. redis-py
still opens the connection (address, TLS, login, database, library name): so a URL means the same for both, and errors have the same words.
Then its transport gets this protocol. hiredis parses the replies.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import hiredis
from redis._parsers import BaseParser
from redis.exceptions import ConnectionError, InvalidResponse, RedisError

from ..errors import words_of
from .client import Client, heeding_cancellation

CLOSED_BY_SERVER = "Connection closed by server."  # redis-py's words
CLOSED_BY_US = "closed by this process"
_NOT_ENOUGH = object()
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time left

OnReplies = Callable[[list[Any] | Exception], None]
"""Gets the replies to the commands of one `ask` (an error reply is an exception among them), or the error that ended the connection."""


class Lost(ConnectionError):
    """The connection ended before the reply. The command may have been executed."""


class _Asked:
    """Commands that were sent together, and their replies so far."""

    __slots__ = ("budget_s", "count", "in_parts", "on_replies", "replies")

    def __init__(self, count: int, on_replies: OnReplies, budget_s: float, in_parts: bool) -> None:
        self.count = count
        self.on_replies = on_replies
        self.budget_s = budget_s
        self.in_parts = in_parts
        self.replies: list[Any] = []


class HotWire(asyncio.Protocol):
    """One open connection. It ends once, for a reason (`error`), and is never opened again; `dial` opens another one.

    It does not heed `pause_writing`, since what it has to write is bounded: one batch of results or appends of a bounded size, two
    BLMPOPs of the inbox, and one short command (a beat, or the GET of a large value) for each task that waits for its reply.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer = writer  # kept, since it closes the transport when it is collected
        self._transport = writer.transport
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=BaseParser.parse_error, notEnoughData=_NOT_ENOUGH)
        self._asked: deque[_Asked] = deque()
        self._oldest_since = 0.0  # monotonic: since when the server has been free to answer the oldest `_asked`
        self._heard_at = 0.0  # monotonic: when the server last sent anything
        self._timer: asyncio.TimerHandle | None = None
        self.error: Exception | None = None  # why it ended
        self.ended: asyncio.Future[Exception] = self._loop.create_future()
        self._transport.set_protocol(self)

    def __repr__(self) -> str:
        return f"<HotWire {'open' if self.error is None else words_of(self.error)}, {len(self._asked)} asked>"

    @property
    def is_open(self) -> bool:
        return self.error is None and not self._transport.is_closing()

    def ask(self, commands: bytes, count: int, on_replies: OnReplies, budget_s: float, *, in_parts: bool = False) -> None:
        """Sends packed commands. `on_replies` is called once, later. If the server takes longer than `budget_s`, from when it has answered
        what was asked before, the connection ends with TimeoutError. With `in_parts`, for a reply that may be long on its way, it may take
        that long for each part."""
        if not self._asked:
            self._oldest_since = time.monotonic()
        self._asked.append(_Asked(count, on_replies, budget_s, in_parts))
        if self._timer is None:
            self._timer = self._loop.call_later(budget_s, self._check_deadline)
        try:
            self._transport.write(commands)
        except RuntimeError:  # uvloop's, for a connection that was just lost
            self._loop.call_soon(self.end, Lost(CLOSED_BY_SERVER))

    def end(self, error: Exception) -> None:
        """Closes the connection; what was asked fails with `error`. Does nothing if it has ended already."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        self._drop()
        asked, self._asked = self._asked, deque()
        for one in asked:
            one.on_replies(error)
        if not self.ended.done():  # who waited for it may have been cancelled
            self.ended.set_result(error)

    def _drop(self) -> None:
        """Closes the transport. The kernel drops what it has not sent yet: a BLMPOP that arrived after a partition would take entries that
        nobody reads."""
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def _check_deadline(self) -> None:
        self._timer = None
        if not self._asked:
            return
        oldest = self._asked[0]
        since = max(self._oldest_since, self._heard_at) if oldest.in_parts else self._oldest_since
        left_s = since + oldest.budget_s - time.monotonic()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_deadline)
        else:
            self.end(TimeoutError(f"no reply within {oldest.budget_s:.3g} s"))

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        try:
            self._reader.feed(data)
            while self.error is None and (reply := self._next_reply()) is not _NOT_ENOUGH:
                if not isinstance(reply, hiredis.PushNotification):  # of maintenance, say: nobody asked for it
                    self._take(reply)
        except Exception as error:
            self.end(error)

    def _next_reply(self) -> Any:
        try:
            return self._reader.gets()
        except RedisError:
            raise
        except Exception as error:  # a map with a list for a key, say
            raise InvalidResponse(f"a reply that cannot be read: {words_of(error)}") from error

    def _take(self, reply: Any) -> None:
        if not self._asked:
            raise InvalidResponse("a reply to nothing that was asked")
        oldest = self._asked[0]
        oldest.replies.append(reply)
        if len(oldest.replies) == oldest.count:
            self._asked.popleft()
            if self._asked:
                self._oldest_since = time.monotonic()
            oldest.on_replies(oldest.replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(Lost(CLOSED_BY_SERVER if exc is None else words_of(exc)))


def packed(*arguments: str | bytes | int | float) -> bytes:
    """One command as Redis reads it."""
    return hiredis.pack_command(arguments)  # type: ignore[no-any-return, arg-type]  # their stub says that a command is one argument


async def dial(client: Client, budget_s: float) -> HotWire:
    """Opens a connection as `client` would. Raises what redis-py raises, or TimeoutError after `budget_s`."""
    pool: Any = client.connection_pool
    connection = pool.make_connection()
    try:
        async with asyncio.timeout(budget_s):
            await heeding_cancellation(partial(_greet, connection))
        reader, writer = connection._reader, connection._writer
        if reader.at_eof() or writer.transport.is_closing():
            raise ConnectionError(CLOSED_BY_SERVER)
        connection._reader = connection._writer = None
        return HotWire(writer)
    except BaseException:
        await connection.disconnect(nowait=True)
        raise


async def _greet(connection: Any) -> None:
    """Logs in, and asks for a PING: a server that is loading its data lets everybody log in, and refuses the rest."""
    await connection.connect()
    await connection.send_command("PING")
    await connection.read_response()
