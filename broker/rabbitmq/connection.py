"""An AMQP connection that reconnects by itself, and channels on it."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import aio_pika
import aiormq
from aio_pika.abc import AbstractConnection
from aio_pika.connection import make_url
from yarl import URL

from ..backoff import delays
from ..errors import BrokerUnavailable, words_of
from ..settings import masked
from . import unreadable
from .refusals import broker_refusal

logger = logging.getLogger(__name__)

CONNECT_BUDGET_S = 5.0
OPERATION_BUDGET_S = 5.0
HEARTBEAT_S = 10
LONGEST_PAUSE_S = 2.0  # the longest delay between two tries: consumers must be back within ten seconds of the server's start
_END_BUDGET_S = 2.0


class Link:
    """One connection that reconnects by itself. Users await `up`; only `_keep` dials."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._up = asyncio.Event()
        self._last_error: BaseException | None = None
        self.connection: AbstractConnection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()
        unreadable.install()
        for library in map(logging.getLogger, ("aio_pika", "aiormq")):
            library.setLevel(max(library.level, logging.INFO))  # at DEBUG these libraries log payloads, headers and logins

    def __repr__(self) -> str:
        return f"<link {self._name} to {masked(self._url)}, {'up' if self.is_up else 'down'}>"

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def up(self, budget_s: float = OPERATION_BUDGET_S) -> AbstractConnection:
        """The open connection; dials on first use. Raises BrokerUnavailable after `budget_s`."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._name} connected")
        try:
            async with asyncio.timeout(budget_s):
                await self._up.wait()
        except TimeoutError:
            reason = f": {words_of(self._last_error)}" if self._last_error else ""
            raise BrokerUnavailable(
                broker_refusal(self._last_error, self._url)
                or f"no connection to RabbitMQ at {masked(self._url)} within {budget_s:g} s{reason}; is it running, "
                "and is MQSERVE_BROKER_URL right?"
            ) from self._last_error
        assert self.connection is not None
        return self.connection

    def abandon(self, connection: AbstractConnection) -> None:
        """Gives up a connection that hangs: the link dials another one at once, and the old one ends by itself."""
        if connection is self.connection and self.is_up:
            self._up.clear()
            self._lost.set()

    async def _keep(self) -> None:
        pauses = delays(cap_s=LONGEST_PAUSE_S)
        while True:
            try:
                self.connection = await self._dial()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and really_cancelled():
                    raise
                self._last_error = error
                await asyncio.sleep(next(pauses))
                continue
            lost = self._lost = asyncio.Event()
            self.connection.close_callbacks.add(lambda *_, lost=lost: lost.set())
            pauses = delays(cap_s=LONGEST_PAUSE_S)
            self._last_error = None
            self._up.set()
            await lost.wait()
            self._up.clear()
            logger.warning("lost the connection to RabbitMQ at %s (%s); reconnecting", masked(self._url), self._name)
            ending = asyncio.create_task(_end(self.connection), name=f"end {self._name}")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.sleep(next(pauses))

    async def _dial(self) -> AbstractConnection:
        """Returns an open connection. A connection that fails is closed here: otherwise its `__del__` would close it, in whatever thread
        collects it."""
        url = make_url(self._url, heartbeat=HEARTBEAT_S)
        connection = aio_pika.Connection(url, heartbeat=HEARTBEAT_S, client_properties={"connection_name": self._name})
        try:
            async with asyncio.timeout(CONNECT_BUDGET_S):
                await connection.connect()
        except BaseException:
            await _end(connection)
            raise
        return connection

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.connection is not None:
            await _end(self.connection)
        await asyncio.gather(*self._ending)


async def _end(connection: AbstractConnection) -> None:
    """Closes the connection, and waits only a limited time. aio-pika's `close` ignores its timeout and cancellation while the broker does
    not read its bytes."""
    raw: Any = connection.transport.connection if connection.transport is not None else None
    closing = asyncio.ensure_future(connection.close())
    closing.add_done_callback(_never_mind)
    try:
        if not (await asyncio.wait([closing], timeout=_END_BUDGET_S))[0] and raw is not None:
            _cut(raw)
            await asyncio.wait([closing], timeout=_END_BUDGET_S)
    finally:
        closing.cancel()


def _cut(connection: Any) -> None:
    """Makes aiormq abort. It would try for half a minute to send its last bytes, unless it finds that the peer hangs; so we pretend that.
    The names are private: aiormq is pinned, and a test of how long closing takes fails when one of them moves."""
    connection._Connection__last_frame_time = -math.inf
    connection._writer_task.cancel()


def has_alarm(connection: AbstractConnection) -> bool:
    """Whether RabbitMQ said (`connection.blocked`) that it does not read from this connection. aiormq has no public name for that; see
    `_cut` about its private names."""
    raw: Any = connection.transport.connection if connection.transport is not None else None
    unblocked = getattr(raw, "_Connection__connection_unblocked", None)
    return unblocked is not None and not unblocked.is_set()


def _never_mind(closing: asyncio.Future[None]) -> None:
    if not closing.cancelled():
        closing.exception()


def user_of(url: str) -> str:
    """The AMQP user of a connection; empty if a certificate names the user and not the URL."""
    parsed = URL(url)
    return "" if parsed.query.get("auth", "plain").lower() != "plain" else parsed.user or "guest"


def really_cancelled() -> bool:
    """Whether our own code cancelled this task: aiormq reports a stuck connection by a bare CancelledError, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def open_channel(connection: AbstractConnection, *, confirms: bool) -> aiormq.channel.Channel:
    async with asyncio.timeout(OPERATION_BUDGET_S):
        channel = await connection.transport.connection.channel(publisher_confirms=confirms, frame_buffer_size=256)  # type: ignore[union-attr]
    assert isinstance(channel, aiormq.channel.Channel)
    return channel
