"""The proxy as an ASGI app: match, publish, await the result, answer."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..broker.calls.sending import MAX_BODY_BYTES, RequestSender
from ..broker.envelope import MAX_HEAD_BYTES, RequestHead, is_minted, mint_id
from ..broker.errors import BadValue, Cancelled, MQServeError, NoReplica, StoreUnavailable, TooLarge
from ..broker.failures import name_of
from ..broker.overload import HeldBytes
from ..broker.values.codecs import is_plain
from ..controller.state.documents import Desired
from ..controller.state.traffic import choose
from .departures import Departures
from .metrics import CONTENT_TYPE, ProxyMetrics
from .readiness import DOWN_AFTER_MS
from .responses import Reply, from_error, from_result, json_reply, problem
from .routes import NotAllowed, RouteTable, Target
from .system_routes import SystemPath, SystemPaths, forbidden

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CALL_METHOD_HEADER = b"x-serve-call-method"
SHARD_KEY_HEADER = b"x-serve-shard-key"
TIMEOUT_HEADER = b"x-request-timeout-seconds"


class ProxyApp:
    """Reads `routes` anew for each request: whoever follows the desired document replaces it."""

    def __init__(
        self, sender: RequestSender, routes: RouteTable, readiness: Callable[[], tuple[bool, dict[str, Any]]],
        *, debug: bool = False, admin_token: str = "",
    ) -> None:  # fmt: skip
        self._sender = sender
        self.routes = routes
        self._readiness = readiness
        self._debug = debug
        self._metrics = ProxyMetrics()
        self.departures = Departures(sender.cancel)
        self._system = SystemPaths(
            {
                "/-/routes": SystemPath(self._routes_listing),
                "/-/healthz": SystemPath(self._healthz, open=True),
                "/-/readyz": SystemPath(self._readyz, open=True),
                "/-/metrics": SystemPath(self._metrics_page),
                "/-/futures/": SystemPath(self._cancel, ("DELETE",), open=True),  # knowing the id is the right to it
            },
            admin_token,
        )

    def __repr__(self) -> str:
        return f"<ProxyApp {self.routes!r}>"

    def forget_deleted(self, desired: Desired) -> None:
        """What was counted of routes, endpoints and backends that are not there any more."""
        self._metrics.keep(desired)
        self._sender.keep_paces(desired.backends)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if path.startswith("/-/"):
            # Written otherwise (`/%2D/…`) it passes by a server in front that lets nobody at `/-/`.
            reply = await self._system.answer(scope) if (scope["raw_path"] or b"").startswith(b"/-/") else _not_served(None, scope)
        else:
            target = self.routes.match(scope)
            if isinstance(target, Target):
                reply = await self._count(target, scope, receive)
            else:
                reply = _not_served(target, scope)
        status, headers, body = reply
        if status not in (204, 304) and not (scope["method"] == "HEAD" and any(name == b"content-length" for name, _ in headers)):
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _count(self, target: Target, scope: Scope, receive: Receive) -> Reply:
        """Serves, and measures it."""
        began = time.monotonic()
        reply = await self._serve(target, scope, receive)
        self._metrics.route(target.pattern).answered(reply[0], (time.monotonic() - began) * 1000)
        return reply

    async def _serve(self, target: Target, scope: Scope, receive: Receive) -> Reply:
        request_id = ""
        routes = self.routes  # one version for the whole request, whatever changes while its body comes in
        try:
            _check_head(scope)
            content_type, call, shard_key, timeout_s = _read_headers(scope["headers"])
            backend, shadows = choose(target.endpoint, shard_key)
            self._check_up(backend)
            body = await _read_body(scope, receive, self._sender.held)
            meta = _meta(scope, target, call)
            ticket = self._sender.send(
                backend,
                body,
                content_type,
                meta,
                origin="http",
                timeout_s=min(timeout_s, routes.timeouts_s[backend]),
                at_most_once=backend in routes.at_most_once,
            )
            request_id = ticket.id
            self._metrics.sent[target.endpoint.name] += 1
            for shadow in shadows:
                self._sender.send_shadow(shadow, body, content_type, meta, origin="http", timeout_s=routes.timeouts_s[shadow])
            del body  # it is the queue's now: what waits for an answer holds none
            waiting = (backend, target.endpoint.name)
            self._metrics.waiting[waiting] += 1
            self.departures.expect(request_id, receive)
            try:
                return from_result(await ticket.future, request_id, debug=self._debug, to_head=scope["method"] == "HEAD")
            finally:
                self.departures.forget(request_id)
                self._metrics.waiting[waiting] -= 1
        except MQServeError as error:
            return from_error(error, request_id or mint_id(), debug=self._debug)

    def _check_up(self, backend: str) -> None:
        """Whether waiting is of any use: a backend that only restarts is worth it, one without any replica for so long is not."""
        if trouble := self._sender.trouble:
            raise StoreUnavailable(f"no result could be stored or read: {trouble}", public=trouble)
        if not self.routes.down_since:
            return
        down_since = self.routes.down_since.get(backend)
        if down_since is not None and self._sender.now_ms() - down_since > DOWN_AFTER_MS:
            raise NoReplica(
                f"backend {backend!r} has had no replica ready for {DOWN_AFTER_MS // 1000} s and none is starting: see `mqserve status`"
            )

    async def _routes_listing(self, scope: Scope) -> Reply:
        return json_reply(self.routes.listing)

    async def _healthz(self, scope: Scope) -> Reply:
        return json_reply({"status": "ok"})

    async def _readyz(self, scope: Scope) -> Reply:
        ready, facts = self._readiness()
        return json_reply({"ready": ready, **facts}, 200 if ready else 503)

    async def _cancel(self, scope: Scope) -> Reply:
        future_id = scope["path"].removeprefix("/-/futures/")
        if not is_minted(future_id):
            return problem(404, "That is no request's id: it is what X-Request-ID or a handle's future says, 32 hex digits.", mint_id())
        if not (future_id in self._sender.pending or self._system.trusts(scope)):
            # An id that this proxy does not know leaves traces in the store: not for anybody to make up.
            return forbidden("The request of another process")
        try:
            return json_reply({"id": future_id, "cancelled": await self._sender.cancel_everywhere(future_id)})
        except MQServeError as error:
            return from_error(error, future_id)

    async def _metrics_page(self, scope: Scope) -> Reply:
        return 200, [(b"content-type", CONTENT_TYPE)], self._metrics.exposition()


def _not_served(refused: NotAllowed | None, scope: Scope) -> Reply:
    if refused is None:
        host = _host(scope)
        detail = f"Path {scope['path']} not found. Please ping http://{host}/-/routes for routing table."
        return problem(404, detail, mint_id())
    methods = list(refused.methods)
    detail = f"Methods {scope['method']} not allowed. Available HTTP methods are {methods}."
    return problem(405, detail, mint_id(), headers=((b"allow", ", ".join(methods).encode()),))


def _check_head(scope: Scope) -> None:
    """Before anything is published: an AMQP content header must fit one frame, and a larger one kills the whole connection."""
    size = (
        len(scope["raw_path"] or b"") + len(scope["query_string"]) + sum([len(name) + len(value) + 4 for name, value in scope["headers"]])
    )
    if size > MAX_HEAD_BYTES:
        raise TooLarge(
            f"the request line and headers take {size} bytes and the limit is {MAX_HEAD_BYTES}: send less, or send it in the body",
            status=431,
        )


async def _read_body(scope: Scope, receive: Receive, held: HeldBytes) -> bytes:
    """What is read of it counts as held until it is whole; then its sending does."""
    message = await _next_part(receive)
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body
    chunks, size = [body], 0
    try:
        held.take(len(body))
        size = len(body)
        while message.get("more_body"):
            message = await _next_part(receive)
            body = message.get("body", b"")
            held.take(len(body))
            size += len(body)
            chunks.append(body)
            if size > MAX_BODY_BYTES:
                raise TooLarge(f"the body has more than {MAX_BODY_BYTES} bytes, the limit: send less, or a reference to it")
        return b"".join(chunks)
    finally:
        held.give(size)


async def _next_part(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("the client went away before its request was complete")
    return message


def _read_headers(headers: list[tuple[bytes, bytes]]) -> tuple[str, str, str, float]:
    """(content type, method to call, shard key, seconds that the client allows). Raises BadValue for a bad number of them."""
    content_type, call, shard_key, timeout_s = b"application/octet-stream", b"", b"", math.inf
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == CALL_METHOD_HEADER:
            call = value
        elif name == SHARD_KEY_HEADER:
            shard_key = value
        elif name == TIMEOUT_HEADER:
            timeout_s = min(timeout_s, _read_timeout(value))
    return content_type.decode("ascii", "ignore")[:255], call.decode("latin-1"), shard_key.decode("latin-1"), timeout_s


def _read_timeout(value: bytes) -> float:
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise BadValue("X-Request-Timeout-Seconds must be a number of seconds above 0, such as 2.5: the backend's own limit is the highest")
    return timeout_s


def _meta(scope: Scope, target: Target, call: str) -> RequestHead:
    raw_path: bytes = scope["raw_path"] or b""
    state: dict[str, Any] | None = scope.get("state")
    travelling, lost = _travelling(state) if state else (None, None)
    return RequestHead(
        method=scope["method"],
        path=scope["path"],
        raw_path=raw_path if b"%" in raw_path else b"",
        query=scope["query_string"],
        headers=tuple(scope["headers"]),
        params=target.params,
        route=target.pattern,
        endpoint=target.endpoint.name,
        call=call,
        http_version=scope["http_version"],
        scheme=scope["scheme"],
        client=scope["client"],
        server=scope["server"],
        state=travelling,
        lost_state=lost,
    )


def _travelling(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What middlewares set on `request.state`: what is plain data, and of the rest the types, for whoever asks for it in a replica."""
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    plain = {name: value for name, value in named.items() if _is_plain(value)}
    return plain, {name: name_of(type(value)) for name, value in named.items() if name not in plain}


def _is_plain(value: object) -> bool:
    try:
        return is_plain(value)
    except RecursionError:
        return False


def _host(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"host":
            return str(value.decode("latin-1"))[:255]
    return "{}:{}".format(*scope["server"]) if scope["server"] else "..."
