"""The proxy as an app: match, publish, wait for the result, answer. Requests come through ASGI, or plain (`calls.py`), without a task."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from ..broker.calls.idempotency import IdempotencyKeys
from ..broker.calls.incoming import IncomingStream
from ..broker.calls.job_sending import JobSender
from ..broker.calls.sending import INLINE_BODY_BYTES, RequestSender
from ..broker.envelope import MAX_HEAD_BYTES, mint_id
from ..broker.errors import MQServeError, NoReplica, StoreUnavailable, TooLarge
from ..broker.jobs import JobFacts
from ..broker.process.printable import printable
from ..broker.results import Result
from ..broker.streams import Form
from ..controller.state.documents import Desired, Endpoint
from ..controller.state.traffic import choose, stages_of
from .calls import AsgiCall, HttpCall, PlainCall, PlainJob
from .common_ids import CommonIds
from .departures import Departures
from .events import EventId, EventStreams, read_event_id
from .futures import Answer, Futures
from .idempotency import KEY_HEADER, keyed, read_key
from .job_events import JobFeed
from .job_views import Links
from .jobs import JobCall, Jobs, promise
from .metrics import CONTENT_TYPE, ProxyMetrics
from .polls import Polls
from .preferences import NOT_BEFORE_HEADER, WAIT_PRIORITIES, Headers, Preference, check_no_job, read_preference
from .readiness import DOWN_AFTER_MS
from .refusals import not_served
from .request_bodies import read_body
from .request_heads import head_of, read_headers, shard_key_of
from .responses import NO_BODY, Reply, from_error, from_result, json_reply, problem, with_length
from .routes import Piped, RouteTable, Target
from .stored_bodies import AnyReply, Download
from .streaming import CUT, CutShort, Flow, FlowEnd, RawBody, head_reply, send_flow
from .system_routes import SystemPath, SystemPaths
from .websockets import WebSockets

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Wish = tuple[str, Sequence[str], str, str, float, str]
"""Backend, shadows, content type, method to call, seconds that the client allows, priority."""

logger = logging.getLogger(__name__)

_ASKING = frozenset((b"last-event-id", b"prefer", KEY_HEADER, NOT_BEFORE_HEADER))  # headers of requests that are served otherwise


class ProxyApp:
    """Reads `routes` anew for each request: whoever follows the desired document replaces it."""

    def __init__(
        self, sender: RequestSender, jobs: JobSender, idempotency: IdempotencyKeys, routes: RouteTable,
        readiness: Callable[[], tuple[bool, dict[str, Any]]], *, is_cancelled: Callable[[str], bool],
        metrics: ProxyMetrics | None = None, common_ids: CommonIds | None = None, debug: bool = False, admin_token: str = "",
    ) -> None:  # fmt: skip
        self._sender = sender
        self.routes = routes
        self._readiness = readiness
        self.mint_id = common_ids.mint if common_ids is not None else mint_id
        self._debug = debug
        self._metrics = metrics or ProxyMetrics()
        self.departures = Departures(self._leave)
        self.events = EventStreams(sender.pending.streams, debug=debug)
        self.sockets = WebSockets(sender, self)
        self.polls = Polls(self.departures)
        self._flowing: dict[str, IncomingStream] = {}  # those that go out by ASGI, by the id of their request
        self._downloads: dict[str, Download] = {}
        self._system = SystemPaths(
            {
                "/-/routes": SystemPath(self._routes_listing),
                "/-/healthz": SystemPath(self._healthz, open=True),
                "/-/readyz": SystemPath(self._readyz, open=True),
                "/-/metrics": SystemPath(self._metrics_page),
            },
            admin_token,
        )
        self.futures = Futures(
            sender, jobs, self.polls, self.events, is_cancelled=is_cancelled, trusts=self._system.trusts, common_ids=common_ids, debug=debug
        )
        self.jobs = Jobs(sender, jobs, idempotency, self.futures, self.polls, debug=debug)

    def __repr__(self) -> str:
        return f"<ProxyApp {self.routes!r}>"

    def forget_deleted(self, desired: Desired) -> None:
        """What was counted of routes, endpoints and backends that are not there any more."""
        self._metrics.keep(desired)
        self._sender.follow(desired.shards)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.sockets.serve(scope, receive, send) if scope["type"] == "websocket" else None
        call = AsgiCall(scope, self.mint_id())
        reply = await (
            self._answer_own(call, scope, receive) if call.path.startswith(self.futures.own) else self._serve(call, scope, receive)
        )
        if isinstance(reply, Flow):
            return await self._send_flow(call.id, reply, scope, receive, send)
        if isinstance(reply, JobFeed):
            return await reply.send(send)
        status, headers, body = reply
        if not isinstance(body, bytes):
            return await self._send_download(call.id, Download(status, headers, body), receive, send)
        status, headers, body = with_length((status, headers, body), to_head=call.method == "HEAD")
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer_own(self, call: AsgiCall, scope: Scope, receive: Receive) -> Answer:
        """Answers the paths that are no endpoint's. One that is written otherwise (`/%2D/…`) is none of them: it passes by a server in
        front that lets nobody at `/-/`."""
        if root := self.futures.root_of(call.raw_path):
            refusal = self._system.refusal(scope) if root.startswith("/-/") else None
            return refusal or await self.futures.answer(scope, receive, root)
        return await self._system.answer(scope) if call.raw_path.startswith(b"/-/") else not_served(None, call)

    async def _send_flow(self, request_id: str, flow: Flow, scope: Scope, receive: Receive, send: Send) -> None:
        self._flowing[request_id] = flow.stream
        self.departures.expect(request_id, receive)
        ended = FlowEnd.FAILED
        try:
            ended = await send_flow(flow, send)
        except CutShort as cut:
            ended = cut.end
            logger.info("the answer to request %s is cut: %s", flow.stream.id, printable(str(cut)))
            if CUT in scope:
                scope[CUT]()
            raise
        finally:
            self.departures.forget(request_id)
            has_left = self._flowing.pop(request_id, None) is None
            self.end_flow(flow, FlowEnd.CANCELLED if has_left and ended is FlowEnd.FAILED else ended)

    async def _send_download(self, request_id: str, download: Download, receive: Receive, send: Send) -> None:
        self._downloads[request_id] = download
        self.departures.expect(request_id, receive)
        try:
            await download.send(send)
        finally:
            self.departures.forget(request_id)
            del self._downloads[request_id]

    def _leave(self, request_id: str) -> None:
        """The client has gone before the end of its answer."""
        if (download := self._downloads.get(request_id)) is not None:
            download.has_left = True
        elif (stream := self._flowing.pop(request_id, None)) is not None:
            self._sender.leave(stream)
        elif not self.polls.leave(request_id):
            self._sender.cancel(request_id)

    async def _serve(self, call: AsgiCall, scope: Scope, receive: Receive) -> AnyReply | Flow:
        routes = self.routes  # one version for the whole request, whatever changes while its body comes in
        target = routes.match(call.path, call.method)
        if isinstance(target, Piped):
            target = target.target
        elif not isinstance(target, Target):
            return not_served(target, call)
        call.target = target
        reply: AnyReply | Flow | None
        try:
            asking = [header for header in call.headers if header[0] in _ASKING]
            is_odd = asking or target.endpoint.stages
            if is_odd and (reply := await self._serve_otherwise(call, asking, scope, receive)) is not None:
                self.count(call, reply)
                return reply
            wish = self.admit(call)
            body = await read_body(receive, self._sender.held)
            self.send(call, wish, body, routes)
            del body  # it is the queue's now: what waits for an answer holds none
            self.departures.expect(call.id, receive)
            try:
                end = await call.future
                reply = self._flow(call, end) if isinstance(end, IncomingStream) else self.reply_to(call, end)
            except asyncio.CancelledError:
                call.leave()
                raise
            finally:
                self.departures.forget(call.id)
                self.has_ended(call)
        except MQServeError as error:
            reply = self.reply_to(call, error)
        self.count(call, reply)
        return reply

    async def _serve_otherwise(self, call: AsgiCall, asking: Headers, scope: Scope, receive: Receive) -> AnyReply | Flow | None:
        """Serves a request that goes on with a stream, or is a job; None for any other. Raises MQServeError."""
        is_piped = bool(call.target.endpoint.stages)
        if call.method == "HEAD" and not is_piped:
            return None
        for name, value in asking:
            if name == b"last-event-id" and (place := read_event_id(value)) is not None:
                return await self._resume(call, place, receive)
        preference, key = read_preference(asking), read_key(asking)
        if is_piped or preference is not None or key:
            return await self._serve_job(call, preference, key, scope, receive)
        check_no_job(asking)
        return None

    async def _resume(self, call: AsgiCall, place: EventId, receive: Receive) -> Reply | Flow:
        await read_body(receive, self._sender.held)  # it is the request again that began the stream, and nothing runs for it
        return await self.events.resume(place, call.target)

    async def _serve_job(self, call: AsgiCall, preference: Preference | None, key: bytes, scope: Scope, receive: Receive) -> AnyReply:
        job = self._job_of(call, preference, self.futures.links(scope))
        job.body = await read_body(receive, self._sender.held)
        self._metrics.sent[call.target.endpoint.name] += 1
        return await (self.jobs.serve_keyed(job, await keyed(call, key, job), receive) if key else self.jobs.serve(job, receive))

    def _job_of(self, call: HttpCall, preference: Preference | None, links: Links) -> JobCall:
        """Returns the job that a request is, but for its body. Raises MQServeError if it cannot be sent."""
        routes, endpoint = self.routes, call.target.endpoint
        first = routes.entry(endpoint)
        is_asked = preference is not None or bool(endpoint.stages)
        backend, _, content_type, method, timeout_s, priority = self.admit(call, first, is_job=is_asked)
        is_once = backend in routes.at_most_once
        stages = stages_of(endpoint, shard_key_of(call.headers)) if endpoint.stages else None
        terms = self.jobs.terms(call.headers, timeout_s, priority, once=is_once, is_awaited=preference is None, stages=stages)
        longest_s = routes.longest_s(endpoint) if endpoint.stages else routes.timeouts_s[backend]
        wait_s = preference.wait_s or 0 if preference is not None else min(timeout_s, longest_s)
        return JobCall(call.id, backend, b"", content_type, head_of(call, method), terms, preference, wait_s, links)

    # Plain requests: the same without a task, and with no await.

    def begin_plain(self, call: PlainCall, body: bytes) -> bool:
        """Serves a plain request. `call.connection` gets its answer, now or later. Returns False for one of a pipeline, a job that its
        client waits for: it has to come by ASGI."""
        try:
            routes = self.routes
            target = routes.match(call.path, call.method)
            if not isinstance(target, Target):
                if isinstance(target, Piped):
                    return False
                call.connection.answer(call, not_served(target, call))
                return True
            call.target = target
            try:
                self.send(call, self.admit(call), body, routes)
            except MQServeError as error:
                self._answer_plain(call, self.reply_to(call, error))
        except Exception:
            self._break_plain(call)
        return True

    def begin_plain_job(self, call: PlainJob, body: bytes) -> bool:
        """Sends a plain request as a job whose client waits for the promise alone. Returns False for any other, which comes by ASGI."""
        try:
            target, preference = self.routes.match(call.path, call.method), read_preference(call.headers)
            waits = preference is None or preference.wait_s is not None
            if waits or not isinstance(target, Target) or call.method == "HEAD" or len(body) > INLINE_BODY_BYTES:
                return False
            call.target = target
            try:
                call.job = self._job_of(call, preference, self.futures.links_behind(call.prefix))
                call.job.body = body
                self._metrics.sent[target.endpoint.name] += 1
                self.jobs.begin(call.job, call.submitted)
            except MQServeError as error:
                self._answer_plain(call, self.reply_to(call, error))
        except Exception:
            self._break_plain(call)
        return True

    def end_plain_job(self, call: PlainJob, outcome: JobFacts | MQServeError) -> None:
        """Answers a request that was sent as a job."""
        try:
            self._answer_plain(call, self.reply_to(call, outcome) if isinstance(outcome, MQServeError) else promise(call.job, outcome))
        except Exception:
            self._break_plain(call)

    def end_plain(self, call: PlainCall, end: Result | MQServeError) -> None:
        """Answers a request that was sent."""
        try:
            self._metrics.waiting[call.backend, call.target.endpoint.name] -= 1
            self._answer_plain(call, self.reply_to(call, end))
        except Exception:
            self._break_plain(call)

    def stream_plain(self, call: PlainCall, stream: IncomingStream) -> None:
        """Begins the answer to a request that was sent."""
        try:
            self.has_ended(call)
            reply = self._flow(call, stream)
            self.count(call, reply)
            if isinstance(reply, Flow):
                call.connection.stream(call, reply)
            else:
                call.connection.answer(call, reply)
        except Exception:
            self._sender.leave(stream)
            self._break_plain(call)

    def abandon_plain(self, call: PlainCall) -> None:
        """Answers a request whose result this process will not read, because it ends."""
        call.keep_alive = False
        self._answer_plain(call, problem(503, "this proxy ended before the request was answered: send it again", call.id, retry_after_s=1))

    def leave_plain(self, call: PlainCall) -> None:
        """The client has gone before its answer began."""
        self._sender.cancel(call.id)

    def leave_stream(self, stream: IncomingStream) -> None:
        """The client has gone before the end of its answer."""
        self._sender.leave(stream)

    def end_flow(self, flow: Flow, ended: FlowEnd) -> None:
        """Nothing more of the answer is sent."""
        flow.body.close()
        self._sender.leave(flow.stream)
        if flow.route is not None:
            self._metrics.route(flow.route).streams[ended] += 1

    def _answer_plain(self, call: PlainCall, reply: Reply) -> None:
        self.count(call, reply)
        call.connection.answer(call, reply)

    def _break_plain(self, call: PlainCall) -> None:
        """An exception that nobody foresaw must reach neither the parser nor the reader of results."""
        logger.exception("request %s ended in a bug in mqserve, please report it", call.id)
        if call.response_complete:
            return
        call.keep_alive = False
        call.connection.answer(call, problem(500, "the proxy failed on this request: see its log", call.id))

    # What both do.

    def admit(self, call: HttpCall, endpoint: Endpoint | None = None, *, is_job: bool = False) -> Wish:
        """Returns what the request asks for; `endpoint` is where it goes, if that is not its own. Raises MQServeError if it cannot be sent,
        before its body is read. A job is worth to be sent while no replica is there."""
        if call.head_bytes > MAX_HEAD_BYTES:  # an AMQP content header must fit one frame, and a larger one kills the whole connection
            size = f"{call.head_bytes} bytes and the limit is {MAX_HEAD_BYTES}"
            raise TooLarge(f"the request line and headers take {size}: send less, or send it in the body", status=431)
        content_type, method, shard_key, timeout_s, priority = read_headers(call.headers)
        backend, shadows = choose(endpoint or call.target.endpoint, shard_key)
        self._check_up(backend, is_job=is_job)
        return backend, shadows, content_type, method, timeout_s, priority

    def send(self, call: HttpCall, wish: Wish, body: bytes, routes: RouteTable) -> None:
        """Raises MQServeError if the request was not sent; otherwise it counts as waiting until its end."""
        backend, shadows, content_type, method, timeout_s, priority = wish
        meta, endpoint = head_of(call, method), call.target.endpoint.name
        self._metrics.waiting[backend, endpoint] += 1  # before it is sent, since it may end at once
        try:
            self._sender.send(
                call,
                backend,
                body,
                content_type,
                meta,
                origin="http",
                timeout_s=min(timeout_s, routes.timeouts_s[backend]),
                replay_s=routes.replays_s[backend],
                at_most_once=backend in routes.at_most_once,
                priority=WAIT_PRIORITIES[priority],
            )
        except MQServeError:
            self._metrics.waiting[backend, endpoint] -= 1
            raise
        self._metrics.sent[endpoint] += 1
        for shadow in shadows:
            self._sender.send_shadow(shadow, body, content_type, meta, origin="http", timeout_s=routes.timeouts_s[shadow])

    def has_ended(self, call: HttpCall) -> None:
        """A request that was sent waits no more."""
        self._metrics.waiting[call.backend, call.target.endpoint.name] -= 1

    def reply_to(self, call: HttpCall, end: Result | MQServeError) -> Reply:
        if isinstance(end, MQServeError):
            return from_error(end, call.id, debug=self._debug)
        return from_result(end, call.id, debug=self._debug, to_head=call.method == "HEAD")

    def _flow(self, call: HttpCall, stream: IncomingStream) -> Reply | Flow:
        """Returns an answer that flows; its head alone where HTTP has no body for it."""
        head = stream.head
        assert head is not None, "a stream is shown with its head"
        to_head = call.method == "HEAD"
        if to_head or head.status in NO_BODY:
            self._sender.leave(stream)
            return head_reply(head, call.backend, call.id, to_head=to_head)
        if head.form is Form.ITEMS:
            return self.events.flow(stream, call.backend, call.target.pattern)
        return Flow(head_reply(head, call.backend, call.id), stream, RawBody(head.length), call.target.pattern)

    def count(self, call: HttpCall, reply: AnyReply | Flow) -> None:
        status = reply.reply[0] if isinstance(reply, Flow) else reply[0]
        self._metrics.route(call.target.pattern).answered(status, (time.monotonic() - call.arrived) * 1000)

    def _check_up(self, backend: str, *, is_job: bool) -> None:
        """Whether waiting is of any use: a backend that only restarts is worth it, one without any replica for so long is not."""
        if trouble := self._sender.trouble:
            raise StoreUnavailable(f"no result could be stored or read: {trouble}", public=trouble)
        if is_job or not self.routes.down_since:
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

    async def _metrics_page(self, scope: Scope) -> Reply:
        try:
            return 200, [(b"content-type", CONTENT_TYPE)], await self._metrics.exposition()
        except MQServeError as error:
            return problem(503, str(error), mint_id(), retry_after_s=1)
