"""Posts to the receivers of webhooks: to a checked address, without redirects and proxies, and within a time.

A callback URL comes from whoever submits a job, so it must not reach what only this machine reaches. The host is resolved once, and the
connection goes to an address that was checked: a name that resolves to another one a moment later is not asked again. asyncio connects to
an address under the name of its host (SNI), and h11, which uvicorn brings along, writes and reads HTTP/1.1: a client library would resolve
by itself. Names are looked up in threads of their own, since a name server that does not answer would take those of the event loop, by
which RabbitMQ and Redis are found, too.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import NamedTuple

import h11
from yarl import URL

from ..broker.callbacks import Network
from ..broker.errors import MQServeError, words_of
from ..broker.process.daemon_threads import in_daemon_thread

ATTEMPT_S = 15.0  # from the look-up of the name to the answer
_CONNECT_S = 5.0
_BODY_S = 2.0
_MAX_ANSWER_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024
SLOW_S = 2.0
SHARE = 64  # posts on their way at once to one receiver that was slow
_SLOW_KEPT = 10_000

_UNICAST = ipaddress.ip_network("2000::/3")  # all that is assigned for global use, but for NAT64
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not global, although Python takes them for that: assignments of protocols (until 3.13), and where Azure answers its machines.
_ODD = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
_SECONDS = re.compile(r"[0-9]{1,9}")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NotReceived(MQServeError):
    """The receiver did not take a webhook."""


class Answer(NamedTuple):
    """What a receiver says; `retry_after_s` is 0 where it does not say when it wants to be asked again."""

    status: int
    retry_after_s: float = 0.0


async def resolve(host: str, port: int) -> Sequence[str]:
    """Returns the addresses of a host. Raises OSError, and UnicodeError for what cannot be a name."""
    found = await in_daemon_thread("look up a receiver", partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    return [str(address[0]) for *_, address in found]


class Receivers:
    """Receivers have global addresses, or one of `networks`.

    A receiver whose latest answer took longer than SLOW_S, or did not come, is given SHARE posts at once, and refused more: it must not
    take the room of all the others.
    """

    def __init__(self, networks: Sequence[Network] = (), resolve: Resolve = resolve, context: ssl.SSLContext | None = None) -> None:
        self._networks = networks
        self._resolve = resolve
        self._context = context
        self._under_way: dict[str, int] = {}  # by host and port
        self._slow: set[str] = set()

    def __repr__(self) -> str:
        return f"<Receivers, of {len(self._networks)} networks beside global addresses>"

    async def post(self, url: URL, headers: Mapping[str, str], body: bytes) -> Answer:
        """Returns the answer. Raises NotReceived where there is none in time."""
        writer: asyncio.StreamWriter | None = None
        try:
            with self._share_of(_authority(url)):
                async with asyncio.timeout(ATTEMPT_S):
                    reader, writer = await self._connect(url)
                    reply = await _ask(reader, writer, url, headers, body)
                    answer = await reply.answer()
            await reply.pass_over_body()
        except TimeoutError:
            raise NotReceived(f"there was no answer within {ATTEMPT_S:g} s") from None
        except (OSError, ValueError, h11.ProtocolError) as error:
            raise NotReceived(words_of(error)) from error
        finally:
            if writer is not None:
                writer.transport.abort()  # nothing of the connection is kept, and a slow receiver must not hold up its end
        return answer

    @contextmanager
    def _share_of(self, receiver: str) -> Iterator[None]:
        """Holds one of the posts that a receiver may have at once. Raises NotReceived."""
        under_way = self._under_way.get(receiver, 0)
        if receiver in self._slow and under_way >= SHARE:
            raise NotReceived(f"it is slow to answer, and {SHARE} others are on their way to it")
        self._under_way[receiver] = under_way + 1
        began = time.monotonic()
        try:
            yield
        finally:
            if time.monotonic() - began < SLOW_S:
                self._slow.discard(receiver)
            elif len(self._slow) < _SLOW_KEPT:
                self._slow.add(receiver)
            self._under_way[receiver] -= 1
            if not self._under_way[receiver]:
                del self._under_way[receiver]

    async def _connect(self, url: URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = (url.raw_host or "").rstrip("."), url.port or 443
        context = self._tls() if url.scheme == "https" else None
        failure: Exception = NotReceived(f"{host} has no address")
        for address in await self._checked(host, port):
            try:
                async with asyncio.timeout(_CONNECT_S):
                    return await asyncio.open_connection(address, port, ssl=context, server_hostname=host if context else None)
            except TimeoutError:
                failure = NotReceived(f"{host} took no connection within {_CONNECT_S:g} s")
            except OSError as error:
                failure = error
        raise failure

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context

    async def _checked(self, host: str, port: int) -> list[str]:
        """Returns the addresses that may be asked."""
        found = await self._resolve(host, port)
        checked = [address for address in dict.fromkeys(found) if self._may_ask(address)]
        if found and not checked:
            raise NotReceived(f"{host} has no global address, and is in none of MQSERVE_CALLBACK_NETWORKS")
        return checked

    def _may_ask(self, text: str) -> bool:
        address = ipaddress.ip_address(text)
        return is_global(address) or any(address in network for network in self._networks)


def is_global(address: Address) -> bool:
    """Whether anybody's packets reach the address. One that holds an IPv4 address (mapped, NAT64, 6to4) is as global as that."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved or any(address in odd for odd in _ODD))
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and address in _NAT64:
        inner = ipaddress.IPv4Address(address.packed[-4:])
    if inner is not None:
        return is_global(inner)
    return address in _UNICAST and address.is_global and address.teredo is None


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: URL, headers: Mapping[str, str], body: bytes) -> _Reply:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_ANSWER_BYTES)
    fields = {"Host": _authority(url), "Connection": "close", "Content-Length": str(len(body)), **headers}
    request = h11.Request(method="POST", target=url.raw_path_qs, headers=list(fields.items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    return _Reply(reader, connection)


class _Reply:
    """What a receiver says. No more than a part of it is read."""

    def __init__(self, reader: asyncio.StreamReader, connection: h11.Connection) -> None:
        self._reader = reader
        self._connection = connection
        self._left = _MAX_ANSWER_BYTES

    def __repr__(self) -> str:
        return f"<_Reply, {self._left} bytes more at most>"

    async def answer(self) -> Answer:
        """Raises NotReceived, and the errors of the connection."""
        while (event := await self._next()) is not None:
            if isinstance(event, h11.Response):
                said = next((value for name, value in event.headers if name == b"retry-after"), b"")
                return Answer(event.status_code, _seconds_until(said.decode("latin-1").strip()))
            if not isinstance(event, h11.InformationalResponse):
                break
        raise NotReceived("it sent no answer of HTTP")

    async def pass_over_body(self) -> None:
        """Reads on for a moment: a receiver that is cut off while it answers would take that for a failure."""
        with suppress(OSError, TimeoutError, h11.ProtocolError):
            async with asyncio.timeout(_BODY_S):
                while isinstance(await self._next(), h11.Data):
                    pass

    async def _next(self) -> object:
        """Returns the next event of h11; None where enough is read."""
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            if self._left <= 0:
                return None
            read = await self._reader.read(min(self._left, _READ_BYTES))
            self._left -= len(read)
            self._connection.receive_data(read)
        return event


def _seconds_until(text: str) -> float:
    """Reads a `Retry-After`, which is a number of seconds or an HTTP date; one that is neither counts as none."""
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _authority(url: URL) -> str:
    host = f"[{url.raw_host}]" if ":" in (url.raw_host or "") else url.raw_host
    return f"{host}" if url.is_default_port() else f"{host}:{url.port}"
