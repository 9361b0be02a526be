"""An AMQP connection that reconnects by itself, and channels on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import aio_pika
import aiormq
from aio_pika.connection import make_url
from aiormq.exceptions import ConnectionClosed
from yarl import URL

from ..backoff import delays
from ..errors import BrokerUnavailable, words_of
from ..process.printable import printable
from ..process.tasks import read_error
from ..settings import masked
from . import unreadable
from .hot_frames import HotTransport
from .refusals import broker_refusal

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_BUDGET_S = 5.0
OPERATION_BUDGET_S = 5.0
NO_ANSWER = f"RabbitMQ did not answer within {OPERATION_BUDGET_S:g} s"
MEND = "is it running, and is MQSERVE_BROKER_URL right?"
HEARTBEAT_S = 10
LONGEST_PAUSE_S = 2.0  # the longest delay between two tries: consumers must be back within ten seconds of the server's start
_END_BUDGET_S = 2.0


class RabbitConnection:
    """One AMQP connection: aio-pika's, and beneath it the protocol of ours for the hot frames, `hot`."""

    def __init__(self, url: str, name: str) -> None:
        transport = HotTransport()
        self.hot = transport.protocol
        self._amqp = aio_pika.Connection(make_url(url, heartbeat=HEARTBEAT_S), client_properties={"connection_name": name})
        self._amqp.kwargs["transport_factory"] = transport  # as an argument it would be dropped in silence

    def __repr__(self) -> str:
        return f"<RabbitConnection {self.hot!r}>"

    @property
    def has_alarm(self) -> bool:
        """Whether RabbitMQ said (`connection.blocked`) that it does not read from this connection."""
        return self.hot.frames.is_blocked

    @property
    def broker_version(self) -> str:
        """What RabbitMQ said when the connection was opened."""
        assert self._amqp.transport is not None
        return str(self._amqp.transport.connection.server_properties.get("version", ""))

    async def open(self) -> None:
        """Raises within CONNECT_BUDGET_S; then the connection is closed."""
        try:
            async with asyncio.timeout(CONNECT_BUDGET_S):
                await self._amqp.connect()
        except BaseException:
            await self.end()
            raise

    def on_loss(self, lost: Callable[[BaseException | None], None]) -> None:
        """Has `lost` called with the reason, as far as that is known."""
        self._amqp.close_callbacks.add(lambda _, reason=None: lost(reason))

    async def open_channel(self, *, confirms: bool) -> aiormq.channel.Channel:
        """Returns one of aiormq: aio-pika's connection keeps a callback (3.5 KiB) of each of its own channels until it is closed."""
        if self._amqp.transport is None:
            raise ConnectionClosed(0, "closed by us")
        async with asyncio.timeout(OPERATION_BUDGET_S):
            channel = await self._amqp.transport.connection.channel(publisher_confirms=confirms, frame_buffer_size=256)
        assert isinstance(channel, aiormq.channel.Channel)
        return channel

    async def end(self) -> None:
        """Closes the connection, and waits only a limited time: aiormq tries for half a minute to send its last bytes."""
        closing = asyncio.ensure_future(self._amqp.close(ConnectionClosed(0, "closed by us")))
        closing.add_done_callback(read_error)
        try:
            if not (await asyncio.wait([closing], timeout=_END_BUDGET_S))[0]:
                self.hot.abort()
                await asyncio.wait([closing], timeout=_END_BUDGET_S)
        finally:
            closing.cancel()
            self.hot.abort()


class Link:
    """One connection that reconnects by itself. Users await `up`; only `_keep` dials."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._up = asyncio.Event()
        self._last_error: BaseException | None = None
        self.connection: RabbitConnection | None = None
        self.broker_version = ""  # of the latest connection
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()
        unreadable.install()
        for library in map(logging.getLogger, ("aio_pika", "aiormq")):
            library.setLevel(max(library.level, logging.INFO))  # at DEBUG these libraries log payloads, headers and logins

    def __repr__(self) -> str:
        return f"<Link {self._name} to {masked(self._url)}, {'up' if self.is_up else 'down'}>"

    @property
    def server(self) -> str:
        """Where it connects to, for messages."""
        return f"RabbitMQ at {masked(self._url)}"

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def up(self, budget_s: float = OPERATION_BUDGET_S) -> RabbitConnection:
        """The open connection; dials on first use. Raises BrokerUnavailable after `budget_s`."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._name} connected")
        try:
            async with asyncio.timeout(budget_s):
                await self._up.wait()
        except TimeoutError:
            reason = f": {words_of(self._last_error)}" if self._last_error else ""
            raise BrokerUnavailable(
                broker_refusal(self._last_error, self._url) or f"no connection to {self.server} within {budget_s:g} s{reason}; {MEND}"
            ) from self._last_error
        assert self.connection is not None
        return self.connection

    def abandon(self, connection: RabbitConnection, why: str) -> None:
        """Gives up a connection that hangs: the link dials another one at once, and the old one ends by itself. `why` is for the log."""
        if connection is self.connection and self.is_up:
            self._up.clear()
            self._last_error = BrokerUnavailable(why)
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
            self.broker_version = self.connection.broker_version
            lost = self._lost = asyncio.Event()
            self._last_error = None
            self.connection.on_loss(partial(self._note_loss, lost))
            pauses = delays(cap_s=LONGEST_PAUSE_S)
            self._up.set()
            await lost.wait()
            self._up.clear()
            why = f": {printable(words_of(self._last_error))}" if self._last_error else ""
            logger.warning("lost the connection to RabbitMQ at %s (%s)%s; reconnecting", masked(self._url), self._name, why)
            ending = asyncio.create_task(self.connection.end(), name=f"end {self._name}")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.sleep(next(pauses))

    def _note_loss(self, lost: asyncio.Event, reason: BaseException | None) -> None:
        if not lost.is_set():
            self._last_error = reason
            lost.set()

    async def _dial(self) -> RabbitConnection:
        connection = RabbitConnection(self._url, self._name)
        await connection.open()
        return connection

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.connection is not None:
            await self.connection.end()
        await asyncio.gather(*self._ending)


async def answer_of(request: Awaitable[T]) -> T:
    """Awaits what aiormq asked the broker. If the caller is cancelled, the request goes on, and whatever becomes of it is dropped: aiormq
    would close the channel of a request that is cancelled, and RabbitMQ end the connection at the next ack."""
    asking = _left_to_itself(request)
    await asyncio.wait([asking])  # a shield reports what comes after, from Python 3.14 on
    return asking.result()


async def close_channel(channel: aiormq.abc.AbstractChannel, budget_s: float) -> None:
    """Closes a channel of aiormq. Returns after `budget_s` at the latest, or when it is cancelled, while the closing goes on until its
    connection ends: aiormq closes a channel a second time if its closing is cancelled, and RabbitMQ ends the connection for that."""
    await asyncio.wait([_left_to_itself(channel.close())], timeout=budget_s)


def _left_to_itself(request: Awaitable[T]) -> asyncio.Future[T]:
    """Starts a request that may outlive whoever waits for it, so that asyncio does not report an error that comes then as an unread one."""
    asking = asyncio.ensure_future(request)
    asking.add_done_callback(read_error)
    return asking


def user_of(url: str) -> str:
    """The AMQP user of a connection; empty if a certificate names the user and not the URL."""
    parsed = URL(url)
    return "" if parsed.query.get("auth", "plain").lower() != "plain" else parsed.user or "guest"


def really_cancelled() -> bool:
    """Whether our own code cancelled this task: aiormq reports a stuck connection by a bare CancelledError, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
