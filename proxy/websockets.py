"""WebSocket sessions in the proxy: the handshake goes to a replica as a request, and what follows goes both ways over a link."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..broker.calls.incoming import IncomingStream
from ..broker.calls.links import Link
from ..broker.calls.sending import RequestSender
from ..broker.errors import MQServeError
from ..broker.process.waiters import Waiters
from ..broker.results import InboxEntry, Result
from ..broker.sessions import Accept, Close, CloseCode, read_word, request_of
from .calls import AsgiCall, HttpCall
from .refusals import not_served
from .responses import Reply, problem, safe_headers, with_length
from .routes import Piped, Target

if TYPE_CHECKING:
    from .app import ProxyApp

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_OF_THE_HANDSHAKE = b"sec-websocket-"
_LAST_WORDS_S = 10.0  # after a client has left, the app has so long to take what it had said
_DRAINS = "this proxy ends: connect again"
_UNREADABLE = "the proxy failed to read from the client: its log says why"


class Ends(MQServeError):
    """This proxy ends."""

    status = 503


class WebSocketCall(AsgiCall):
    """A handshake. Its future ends in a result, or an error, which denies it; or `link` is set by then."""

    __slots__ = ("accept", "client_left", "link", "waiters")

    accept: Accept

    def __init__(self, scope: Scope, id: str) -> None:
        super().__init__({**scope, "method": "GET"}, id)
        self.link: Link | None = None
        self.client_left = False
        self.waiters = Waiters()

    def accepted(self, link: Link, accept: Accept) -> None:
        if self.future.done():  # its client has left
            return link.lose(CloseCode.ABNORMAL)
        self.link, self.accept = link, accept
        self.future.set_result(Result())


class WebSockets:
    """The sessions of one proxy."""

    def __init__(self, sender: RequestSender, app: ProxyApp) -> None:
        self._sender = sender
        self._app = app
        self._links = sender.new_links()
        self._waiting: set[WebSocketCall] = set()
        self._drains = False
        sender.pending.on_session = self._on_entry

    def __repr__(self) -> str:
        return f"<WebSockets, {len(self)} open>"

    def __len__(self) -> int:
        return len(self._links)

    def drain(self) -> None:
        """Closes all sessions at once, and refuses the handshakes that wait: clients connect again, to another proxy."""
        self._drains = True
        for call in self._waiting:
            if not call.future.done():
                call.failed(Ends(_DRAINS))
                self._sender.cancel(call.id)
        self._links.lose_all(CloseCode.GOING_AWAY, _DRAINS)

    def replica_died(self, feed: str) -> None:
        if self._links and feed.startswith(self._links.peers):
            self._links.peer_died(feed, "the replica of this session has died: connect again")

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one session, from the handshake to the end of the connection. Raises what a middleware raises, in which case the client and
        the app are told that the session has ended."""
        await receive()  # websocket.connect
        call = WebSocketCall(scope, self._app.mint_id())
        reading = asyncio.create_task(self._read(call, receive))
        try:
            denial = await self._shake_hands(call)
            if denial is not None:
                await _deny(send, denial)
            elif call.link is not None:
                await self._converse(call, call.link, send)
        except OSError:  # the client has left
            if call.link is not None:
                await _drained(call, call.link)
        finally:
            reading.cancel()
            if call.link is not None:
                call.link.lose(CloseCode.ABNORMAL)
            await asyncio.wait([reading])
        if not reading.cancelled():
            reading.result()

    async def _shake_hands(self, call: WebSocketCall) -> Reply | None:
        """Sends the handshake to a replica. Returns what denies it; None if `call.link` is set."""
        routes = self._app.routes
        target = routes.match(call.path, call.method)
        if isinstance(target, Piped):
            return _no_websockets(call)
        if not isinstance(target, Target):
            return not_served(target, call)
        if self._drains:
            return problem(503, _DRAINS, call.id, retry_after_s=1)
        call.target = target
        denial: Reply | None = None
        try:
            backend, _, content_type, method, timeout_s, priority = self._app.admit(call)
            if backend not in routes.apps:
                denial = _no_websockets(call)
            else:
                self._app.send(call, (backend, (), content_type, method, timeout_s, priority), b"", routes)  # a session has no shadows
                end = await self._answer_to(call)
                denial = None if call.link is not None else self._denial(call, end)
        except MQServeError as error:
            denial = self._app.reply_to(call, error)
        self._app.count(call, denial or (101, [], b""))
        return denial

    async def _answer_to(self, call: WebSocketCall) -> Result | IncomingStream:
        self._waiting.add(call)
        try:
            return await call.future
        finally:
            self._waiting.discard(call)
            self._app.has_ended(call)

    def _denial(self, call: WebSocketCall, end: Result | IncomingStream) -> Reply:
        if isinstance(end, IncomingStream):
            self._sender.leave(end)
        elif end.status >= 300:
            return self._app.reply_to(call, end)
        return _no_websockets(call)  # the backend is no app any more

    # Both ways, once the app has accepted.

    async def _converse(self, call: WebSocketCall, link: Link, send: Send) -> None:
        """Passes on what the app says, until the end."""
        if self._drains:
            link.lose(CloseCode.GOING_AWAY, _DRAINS)
        await send({"type": "websocket.accept", "subprotocol": call.accept.subprotocol or None, "headers": _headers(call)})
        while not isinstance(said := await _next(call, link), Close):
            await send({"type": "websocket.send", **({"text": said} if isinstance(said, str) else {"bytes": said})})
        if not call.client_left:
            await send({"type": "websocket.close", "code": said.code, "reason": said.reason})

    async def _read(self, call: WebSocketCall, receive: Receive) -> None:
        """Passes on what the client says. While the app is slow, nothing is read from the client. Without its reader a session would stand
        still for ever: if a middleware raises, it ends."""
        try:
            await self._pass_on(call, receive)
        except Exception:
            if call.link is not None:
                call.link.lose(CloseCode.INTERNAL_ERROR)
            elif not call.future.done():
                call.failed(MQServeError(_UNREADABLE))
                self._sender.cancel(call.id)
            raise

    async def _pass_on(self, call: WebSocketCall, receive: Receive) -> None:
        said = await receive()
        if said["type"] == "websocket.disconnect" and not call.future.done():
            call.client_left = True
            return self._sender.cancel(call.id)
        await asyncio.wait([call.future])
        link = call.link
        if link is None:  # denied
            return
        while said["type"] == "websocket.receive" and link.end is None:
            text = said.get("text")
            link.offer(text if text is not None else said["bytes"])
            link.flush()
            while not link.has_room and link.end is None:
                await call.waiters.wait()
            said = await receive()
        if link.end is None:
            call.client_left = True
            link.offer_close(Close(said.get("code") or CloseCode.ABNORMAL, said.get("reason") or ""))
            link.flush()

    # What comes in.

    def _on_entry(self, entry: InboxEntry) -> None:
        word = read_word(entry)
        if isinstance(word, Accept) and word.feed.startswith(self._links.peers):
            call = self._sender.pending.get(request_of(entry.id))
            if isinstance(call, WebSocketCall):
                return self._begin(call, entry.id, word)
        if word is not None:
            self._links.hear_word(entry, word)

    def _begin(self, call: WebSocketCall, session_id: str, accept: Accept) -> None:
        self._sender.pending.drop(call.id, answered=True)
        link = Link(session_id, accept.feed, self._links, call.waiters.wake)
        self._links.add(link)
        link.credit()  # which says that the session has begun
        call.accepted(link, accept)


async def _next(call: WebSocketCall, link: Link) -> str | bytes | Close:
    """Waits for what comes next from the app. What was returned before counts as taken now."""
    if link.owes_credit:
        link.credit_soon()
    while (said := link.take()) is None:
        await call.waiters.wait()
    return said


async def _drained(call: WebSocketCall, link: Link) -> None:
    """Returns when all that the client has said is on its way to the app, or when that has not taken it in time. What the app still says is
    dropped."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            while not isinstance(await _next(call, link), Close):
                pass


def _headers(call: WebSocketCall) -> list[tuple[bytes, bytes]]:
    """Returns the headers of the answer to a handshake that was accepted. Those of the handshake itself are not the app's."""
    headers = safe_headers(call.accept.headers, call.backend)
    ours = [(b"x-request-id", call.id.encode())]
    return [*((name, value) for name, value in headers if not name.lower().startswith(_OF_THE_HANDSHAKE)), *ours]


def _no_websockets(call: HttpCall) -> Reply:
    detail = f"The backend of {call.path} takes no WebSockets: those are for backends that are ASGI apps. Send a plain request."
    return problem(404, detail, call.id)


async def _deny(send: Send, reply: Reply) -> None:
    status, headers, body = with_length(reply, to_head=False)
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
