"""WebSocket sessions as an ASGI app has them: each runs as one task in the worker's thread, with ASGI's `receive` and `send`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, MutableMapping
from enum import Enum
from typing import Any

from starlette.websockets import WebSocketDisconnect

from ..broker.calls.links import Link
from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.envelope import Pairs, RequestHead
from ..broker.errors import BadType, TooLarge
from ..broker.process.waiters import Waiters
from ..broker.results import ErrorInfo, Result
from ..broker.sessions import MAX_MESSAGE_BYTES, MAX_REASON_BYTES, Accept, Close, CloseCode, is_close_code
from ..controller.state.config import BackendConfig
from .asgi_apps import ASGIApp
from .context import running_jobs
from .execute import Execution
from .hand_over import HandOver
from .requests import http_scope
from .responding import Host
from .stages import Job

Message = MutableMapping[str, Any]

_LISTS_PROTOCOLS = b"sec-websocket-protocol"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class ClientDisconnected(OSError):
    """The app sends, and the client has gone. Starlette takes an OSError of `send` for that."""


class State(Enum):
    """How far a session has come, for its app."""

    HANDSHAKE = "handshake"
    DENYING = "denying"  # the app has begun an HTTP response
    DENIED = "denied"
    OPEN = "open"
    CLOSED = "closed"  # by the app


class Sockets:
    """The sessions of one worker. All of it runs in the worker's thread. `touched` hands the sessions in which the app has said something
    to the I/O loop; `told` hands those that have something for the app to the worker's loop. `new_link` makes the link of a session that
    its app accepts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, host: Host, config: BackendConfig) -> None:
        self._host = host
        self._running: set[Conversation] = set()
        self.limit = config.max_sessions
        self.touched: HandOver[Conversation] = HandOver(asyncio.get_running_loop())
        self.told: HandOver[Conversation] = HandOver(loop)
        self.told.on_touched = _wake
        self.new_link: Callable[[Conversation, Accept], Link] = _no_links

    def __repr__(self) -> str:
        return f"<Sockets, {len(self)} of at most {self.limit}>"

    def __len__(self) -> int:
        return len(self._running)

    async def converse(self, job: Job, app: ASGIApp) -> None:
        """Runs the app for one session. If the app accepts it, the job is settled by that, else its result is the denial."""
        running_jobs.set([job])
        if len(self) >= self.limit:
            return self._host.put(job, _full(self._host.execution.backend, self.limit))
        talk = Conversation(job, self)
        self._running.add(talk)
        try:
            if job.suspect:
                await self._host.mark_suspect(job)
            await app(websocket_scope(job.envelope.header.meta), talk.receive, talk.send)
            talk.ended(None)
        except asyncio.CancelledError as error:
            talk.ended(Close(CloseCode.RESTART))
            self._host.cancelled([job], error)
        except BaseException as error:
            self._failed(talk, error)
        finally:
            self._running.discard(talk)
            job.request = job.task = None  # the task refers to the job, by its context

    def _failed(self, talk: Conversation, error: BaseException) -> None:
        was_open = talk.link is not None
        if not (was_open and isinstance(error, ClientDisconnected | WebSocketDisconnect)):
            result = self._host.execution.failed(error, talk.job)
            if talk.state in (State.HANDSHAKE, State.DENYING):
                self._host.put(talk.job, result)
        talk.ended(Close(CloseCode.INTERNAL_ERROR))

    def deny(self, job: Job, result: Result) -> None:
        self._host.put(job, result)

    @property
    def execution(self) -> Execution:
        return self._host.execution


class Conversation:
    """One session for its app. `link` is set once the app has accepted it."""

    def __init__(self, job: Job, sockets: Sockets) -> None:
        self.job = job
        self.link: Link | None = None
        self.state = State.HANDSHAKE
        self.is_begun = False  # whether the I/O loop knows of the link
        self._sockets = sockets
        self._is_connected = False
        self._waiters = Waiters()
        self.wake = self._waiters.wake
        self._closed = Close()
        self._status = 0
        self._headers: Pairs = ()
        self._body = bytearray()

    def __repr__(self) -> str:
        return f"<Conversation {self.state.value}, {self.link!r}>"

    # ASGI.

    async def receive(self) -> Message:
        if not self._is_connected:
            self._is_connected = True
            return {"type": "websocket.connect"}
        while (heard := self._take()) is None:
            await self._waiters.wait()
        if self.link is not None and self.link.owes_credit:
            self._sockets.touched.touch(self)
        if isinstance(heard, Close):
            return {"type": "websocket.disconnect", "code": heard.code, "reason": heard.reason}
        return {"type": "websocket.receive", "text": heard} if isinstance(heard, str) else {"type": "websocket.receive", "bytes": heard}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        match self.state, kind:
            case State.HANDSHAKE, "websocket.accept":
                self._accept(message)
            case State.HANDSHAKE, "websocket.close":
                self._deny(Result(status=403, backend=self._backend, content_type=""))
            case State.HANDSHAKE, "websocket.http.response.start":
                self._begin_denial(message)
            case State.DENYING, "websocket.http.response.body":
                self._go_on_denying(message)
            case State.OPEN, "websocket.send":
                await self._say(message)
            case State.OPEN, "websocket.close":
                self._check_is_there()
                self._close(_read_close(message))
            case _:
                raise RuntimeError(f"Unexpected ASGI message {kind!r} in a WebSocket session that is {self.state.value}.")

    # What the app says.

    @property
    def _backend(self) -> str:
        return self._sockets.execution.backend

    def _accept(self, message: Message) -> None:
        headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
        subprotocol = message.get("subprotocol") or ""
        if subprotocol and not _TOKEN.fullmatch(subprotocol):
            raise ValueError(f"{subprotocol!r} is no subprotocol that HTTP can carry: choose one of those that the client offers")
        self.link = self._sockets.new_link(self, Accept("", subprotocol, headers))
        self.state = State.OPEN
        self._sockets.touched.touch(self)

    def _begin_denial(self, message: Message) -> None:
        self._status, self._headers = int(message["status"]), tuple((bytes(one), bytes(two)) for one, two in message.get("headers", ()))
        if not 300 <= self._status < 600:
            raise ValueError(f"{self._status} is no status to deny a WebSocket with: 300 to 599")
        self.state = State.DENYING

    def _go_on_denying(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if len(self._body) > MAX_BODY_BYTES:
            raise TooLarge(f"the answer that denies a WebSocket has more than {MAX_BODY_BYTES} bytes, the limit: send less", status=500)
        if not message.get("more_body"):
            self._deny(Result(status=self._status, backend=self._backend, content_type="", headers=self._headers, body=bytes(self._body)))

    def _deny(self, result: Result) -> None:
        self.state = State.DENIED
        self._sockets.deny(self.job, result)
        self.wake()

    async def _say(self, message: Message) -> None:
        link = self._check_is_there()
        data, text = message.get("bytes"), message.get("text")
        if data is None and text is None:
            return
        said: str | bytes = str(text) if data is None else bytes(data)
        if len(said) > MAX_MESSAGE_BYTES // 4 and _size(said) > MAX_MESSAGE_BYTES:
            why = f"a WebSocket message has at most {MAX_MESSAGE_BYTES} bytes"
            self._close(Close(CloseCode.TOO_BIG, why))
            raise TooLarge(f"{why}: send it in several", status=500)
        link.offer(said)
        self._sockets.touched.touch(self)
        while not link.has_room and link.end is None:
            await self._waiters.wait()
        self._check_is_there()

    def _check_is_there(self) -> Link:
        assert self.link is not None, "the app has accepted"
        if self.link.end is not None:
            raise ClientDisconnected("the client of this WebSocket session has gone")
        return self.link

    def _close(self, close: Close) -> None:
        assert self.link is not None, "the app has accepted"
        self.state, self._closed = State.CLOSED, close
        self.link.offer_close(close)
        self._sockets.touched.touch(self)
        self.wake()

    def ended(self, close: Close | None) -> None:
        """The app has ended: by an error, if there is a `close`."""
        if self.state is State.OPEN:
            self._close(close or Close())
        elif close is None and self.state in (State.HANDSHAKE, State.DENYING):
            error = BadType("the app neither accepted nor denied a WebSocket: send websocket.accept or websocket.close")
            self._sockets.deny(self.job, self._sockets.execution.failed(error, self.job))

    # What it hears.

    def _take(self) -> str | bytes | Close | None:
        if self.state is State.CLOSED:
            return self._closed
        if self.state is State.DENIED:
            return Close(CloseCode.ABNORMAL)
        return None if self.link is None else self.link.take()


def websocket_scope(meta: RequestHead) -> dict[str, Any]:
    """Returns the ASGI scope of a session, as the proxy had it."""
    scope = http_scope(meta)
    del scope["method"]
    offered = [value.decode("latin-1") for name, value in meta.headers if name == _LISTS_PROTOCOLS]
    scope |= {
        "type": "websocket",
        "subprotocols": [one.strip() for line in offered for one in line.split(",") if one.strip()],
        "extensions": {"websocket.http.response": {}},
    }
    return scope


def _size(said: str | bytes) -> int:
    return len(said.encode() if isinstance(said, str) else said)


def _read_close(message: Message) -> Close:
    code, reason = message.get("code", CloseCode.NORMAL), message.get("reason") or ""
    if not is_close_code(code):
        raise ValueError(f"{code!r} is no code to close a WebSocket with: 1000, or one of your own from 3000 to 4999")
    return Close(code, _fitting(reason))


def _fitting(reason: str) -> str:
    """Cuts a reason that does not fit, between two characters: it is for people, and often the words of an error. Raising would lose the
    code, by which the client acts."""
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")


def _full(backend: str, limit: int) -> Result:
    message = f"this replica of {backend!r} has {limit} WebSocket sessions, all that it may have (max_sessions): try again"
    return Result(
        status=503, backend=backend, headers=((b"retry-after", b"1"),), error=ErrorInfo(type="mqserve.Overloaded", message=message)
    )


def _wake(talk: Conversation) -> None:
    talk.wake()


def _no_links(talk: Conversation, accept: Accept) -> Link:
    raise RuntimeError("no requests are taken yet")
