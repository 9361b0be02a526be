"""The life of a proxy: bind, open broker and store, follow the routes, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..broker.backoff import delays
from ..broker.calls.cancellations import Cancellations, notice_of_proxy
from ..broker.calls.idempotency import IdempotencyKeys
from ..broker.calls.job_sending import JobSender
from ..broker.calls.sending import RequestSender
from ..broker.errors import BackendFailed, MQServeError, StoreUnavailable
from ..broker.failures import LEAVING, describe, traceback_of
from ..broker.process import forks
from ..broker.process.lifeline import Stop, stop_event
from ..broker.process.listener import KEY_BYTES, bind
from ..broker.process.printable import printable_lines
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.ticks import next_tick_s
from ..broker.queue import Queue
from ..broker.rabbitmq.queue import open_rabbitmq
from ..broker.redis.store import open_redis
from ..broker.sessions import MAX_MESSAGE_BYTES
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values import code
from ..controller.state.beats import BEAT_EVERY_S, PROXY_DRAIN_S, MemberState, ProxyBeat
from ..controller.state.convertors import Convertors
from ..controller.state.documents import Desired, Observed
from ..controller.state.following import follow_state
from ..controller.state.presence import Presence
from ..controller.state.reading import read_desired, read_observed
from .app import ProxyApp
from .common_ids import CommonIds
from .plain_edge import APART, PlainEdgeProtocol
from .readiness import Readiness
from .routes import RouteTable
from .shared_metrics import SharedMetrics

logger = logging.getLogger(__name__)

FAILED_EXIT = 3
# longer than a load balancer keeps its connections (usually 60 s): otherwise it may send just when we close, and report a bad gateway
KEEP_ALIVE_S = 75
LAST_ANSWERS_S = 2.0  # a connection that is idle for this long while a proxy ends is closed


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """Which proxy this is and where it listens. An external proxy was started by hand, so it is neither counted nor stopped.

    `fd` is the node's listening socket, which stays open while one proxy follows another; without it the proxy binds its own. `common_fd`
    is the common file of all proxies on that socket, if there are several.
    """

    proxy_id: str
    host: str = "127.0.0.1"
    port: int = 8000
    node: str = ""
    external: bool = False
    debug: bool = False
    fd: int | None = None
    common_fd: int | None = None


async def main(settings: Settings, options: ProxyOptions) -> int:
    """Runs a proxy as a process; returns the exit code."""
    stop = stop_event()
    async with open_redis(settings.store_url, settings.namespace, settings.result_files) as store:
        proxy = Proxy(settings, options, store)
        async with open_rabbitmq(
            settings.broker_url, settings.namespace, options.proxy_id, seals=settings.header_seals, may_be_away=True, sends_only=True
        ) as queue:
            try:
                await proxy.run(queue, stop)
            except MQServeError as error:
                logger.error("%s: %s", options.proxy_id, error)
                return FAILED_EXIT
    return 0


class Proxy:
    """One HTTP server, in a process of its own or inside the embedded form."""

    def __init__(self, settings: Settings, options: ProxyOptions, store: Store) -> None:
        self._settings = settings
        self._options = options
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._shared_metrics, self._common_ids = _open_common_file(options.common_fd)
        self._state = MemberState.STARTING
        self._error = ""
        self._behind = RateLimitedLog(logger)
        field = f"proxy:{options.proxy_id}"
        self._presence = Presence(store, self._keys.beats, field, lambda: self._beat().to_bytes(), BEAT_EVERY_S)
        self._queue: Queue | None = None
        self._app: ProxyApp | None = None
        self._outer = _Outermost()
        self._readiness = Readiness(store)
        self._middlewares = ""
        self._convertors = Convertors(store, self._keys, settings.signer)
        self._refuses, self._refused = (0, 0), ""  # the version that this proxy cannot follow, and why
        self._address: tuple[str, int] = (options.host, options.port)

    def __repr__(self) -> str:
        return f"<Proxy {self._options.proxy_id} {self._state} on {self.url}>"

    @property
    def url(self) -> str:
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def run(self, queue: Queue, stop: Stop) -> None:
        """Serves until `stop` is set, then drains.

        Raises BadValue if it cannot listen, and BackendFailed if it cannot build its routes, convertors or middlewares; its last beat
        carries the reason, too.
        """
        self._queue = queue
        sender = RequestSender(queue, self._store, self._keys, self._options.proxy_id, leaves_files=True)
        failure: MQServeError | None = None  # raised outside the group, which would wrap it
        async with asyncio.TaskGroup() as tasks:
            beating, reading = tasks.create_task(self._presence.beat_forever()), tasks.create_task(sender.run())
            try:
                with self._listener() as listener, forks.guarded_service(listener):
                    self._address = (self._options.host, listener.getsockname()[1])
                    await self._serve(listener, sender, queue, stop)
            except MQServeError as error:
                self._state, self._error = MemberState.FAILED, str(error)
                failure = error
            finally:
                await self._settle(sender)
                await self._presence.leave(with_last_words=self._state is MemberState.FAILED)
                beating.cancel()
                reading.cancel()
        if failure is not None:
            raise failure

    async def _settle(self, sender: RequestSender) -> None:
        """Cancels the requests that the end of this proxy cuts off, since their clients are gone, and waits for what is on its way: streams
        that were cut are cancelled by their ids, and jobs go on."""
        if len(sender.pending):
            with contextlib.suppress(MQServeError):
                await self._store.append_log(self._keys.cancelled, notice_of_proxy(sender.pending.inbox))
        settling = [sender.settle()]
        if self._app is not None:
            settling.append(self._app.jobs.settle())
        await asyncio.gather(*settling)

    def _on_cancelled(self, heard: Cancellations, names: Sequence[str], sender: RequestSender, stop: Stop) -> None:
        """Answers the requests that were cancelled elsewhere, perhaps through another proxy of this port.

        Ends the proxy if it was frozen or cut off for so long that the controller has cancelled its requests: the node then starts
        another."""
        for name in names:
            sender.end_cancelled(name)
            sender.pending.streams.replica_died(name)
            if self._app is not None:
                self._app.sockets.replica_died(name)
        if heard.has(sender.pending.inbox) and not stop.is_set():
            logger.error("%s was silent for too long and its requests are not run any more: ending", self._options.proxy_id)
            stop.set()

    def _listener(self) -> socket.socket:
        options = self._options
        if options.fd is None:
            return bind(options.host, options.port)
        os.set_inheritable(options.fd, False)
        return socket.socket(fileno=options.fd)

    async def _serve(self, listener: socket.socket, sender: RequestSender, queue: Queue, stop: Stop) -> None:
        heard = Cancellations(self._store, self._keys, lambda names: self._on_cancelled(heard, names, sender, stop))
        app = await self._first_app(sender, queue, heard)
        server = _Server(_uvicorn_config(self._outer))
        async with asyncio.TaskGroup() as tasks:
            minding = [tasks.create_task(work) for work in (self._follow(app), app.departures.watch_forever(), heard.listen())]
            if self._shared_metrics is not None:
                minding.append(tasks.create_task(self._shared_metrics.share_forever()))
            serving = tasks.create_task(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            self._say(MemberState.READY)
            await stop.wait()
            self._say(MemberState.DRAINING)
            app.sockets.drain()
            app.polls.end()
            if not await self._instance_closes():
                app.events.reconnect()
            await server.last_answers()
            server.end()
            await serving
            if self._shared_metrics is not None:
                await self._shared_metrics.close()
            for task in minding:
                task.cancel()

    async def _instance_closes(self) -> bool:
        """Whether this proxy ends with its instance: then no other one goes on with the streams of events, which run to their end here."""
        with contextlib.suppress(MQServeError):
            raw = await self._store.get(self._keys.desired)
            return raw is None or read_desired(raw).closing
        return False

    async def _first_app(self, sender: RequestSender, queue: Queue, heard: Cancellations) -> ProxyApp:
        try:
            desired = read_desired(await self._store.get(self._keys.desired))
            app = self._app = ProxyApp(
                sender,
                JobSender(queue, self._store, self._keys, sender.held, self._settings.signer),
                IdempotencyKeys(self._store, self._keys),
                await self._table(desired, Observed()),
                lambda: self._readiness.look(queue),
                metrics=self._shared_metrics,
                common_ids=self._common_ids,
                is_cancelled=heard.has,
                debug=self._options.debug or desired.http.debug,
                admin_token=self._settings.admin_token,
            )
            self._move_futures(app, desired.http.futures_path)
            self._outer.app, self._middlewares = await self._with_middlewares(app, desired), desired.http.middlewares
        except (Exception, *LEAVING) as error:  # users' middlewares and convertors may raise anything
            raise BackendFailed(_why(error)) from error
        return app

    async def _follow(self, app: ProxyApp) -> None:
        """Follows the routes; keeps the last good ones while the store or the controller is away."""
        async for desired, observed in follow_state(self._store, self._keys):
            if desired is None:
                self._readiness.follow(desired, observed)
                continue
            for pause_s in delays():
                self._note_serving(app, observed or Observed())
                try:
                    await self._take_over(app, desired, observed or Observed())
                    self._behind.over()
                    break
                except (Exception, *LEAVING) as error:
                    trace = "" if isinstance(error, MQServeError) else f"\n{printable_lines(traceback_of(error).rstrip())}"
                    self._behind.say(f"{self._options.proxy_id} serves the last good routes, and tries again: {_why(error)}{trace}")
                    if not isinstance(error, StoreUnavailable):
                        self._refuse(desired, _why(error))
                    await asyncio.sleep(pause_s)
                    with contextlib.suppress(MQServeError):  # this version may never work, but a later one may
                        raw, raw_observed = await self._store.get_documents([self._keys.desired, self._keys.observed])
                        observed = read_observed(raw_observed)
                        desired = read_desired(raw) if raw is not None else desired

    def _note_serving(self, app: ProxyApp, observed: Observed) -> None:
        """Notes which backends serve, even if the routes of this version cannot be followed: a bad route must not make a backend look
        down."""
        app.routes.down_since = observed.down_since
        app.futures.refusal, app.jobs.callbacks = observed.store_is_full, observed.callbacks
        self._readiness.see(observed)

    async def _take_over(self, app: ProxyApp, desired: Desired, observed: Observed) -> None:
        """Switches to the new routes and middlewares, or changes nothing: a client that waits for this version must find both."""
        table = await self._table(desired, observed)
        outer = self._outer.app
        if desired.http.middlewares != self._middlewares:
            outer = await self._with_middlewares(app, desired)
        new = [why for route, why in table.left_out.items() if route not in app.routes.left_out]
        app.routes, self._outer.app, self._middlewares = table, outer, desired.http.middlewares
        self._move_futures(app, desired.http.futures_path)
        app.forget_deleted(desired)
        self._readiness.follow(desired, observed)
        if new:  # follow the rest: one bad route must not affect the others
            self._refuse(desired, new[0])
        elif self._refused not in table.left_out.values():
            self._refuses, self._refused = (0, 0), ""
        self._presence.tell()

    def _move_futures(self, app: ProxyApp, path: str) -> None:
        app.futures.move(path)
        self._outer.apart = (*APART, path.encode() + b"/")

    def _refuse(self, desired: Desired, why: str) -> None:
        """Reports that this version cannot be followed. The client that committed it waits for that, and may undo the change."""
        self._refuses, self._refused = (desired.epoch, desired.version), why
        self._presence.tell()

    async def _table(self, desired: Desired, observed: Observed) -> RouteTable:
        await self._convertors.register(desired.convertors)
        before = self._app.routes if self._app else None
        table = RouteTable(desired, observed, before)
        for route, why in table.left_out.items():
            if before is None or route not in before.left_out:
                logger.error("serving all routes but one: %s", why)
        return table

    async def _with_middlewares(self, app: ProxyApp, desired: Desired) -> Any:
        """Wraps the app in the instance's middlewares, the first outermost."""
        if not desired.http.middlewares:
            return app
        middlewares, _ = await code.load(self._store, self._keys, desired.http.middlewares, self._settings.signer)
        wrapped: Any = app
        for middleware in reversed(middlewares):
            if isinstance(middleware, str):
                middleware = Middleware(await asyncio.to_thread(code.load_import_string, middleware))
            wrapped = middleware.cls(wrapped, *middleware.args, **middleware.kwargs)
        return wrapped

    def _say(self, state: MemberState) -> None:
        self._state = state
        self._presence.tell()

    def _beat(self) -> ProxyBeat:
        options = self._options
        error = self._error or (self._queue.why_down if self._queue else "")
        left_out = "; ".join(self._app.routes.left_out.values()) if self._app else ""
        return ProxyBeat(
            id=options.proxy_id, at=self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), state=self._state,
            error=error or left_out, node=options.node, external=options.external, url=self.url,
            follows=self._app.routes.version if self._app else (0, 0), refuses=self._refuses, refused=self._refused,
            seal_key=self._settings.signer.current_key_id,
            noted=self._store.health.noted,
        )  # fmt: skip


def _open_common_file(fd: int | None) -> tuple[SharedMetrics | None, CommonIds | None]:
    """Returns what a proxy has in common with those that share its socket."""
    if fd is None:
        return None, None
    os.set_inheritable(fd, False)
    file = forks.guard(io.FileIO(fd, "r+b"))
    return SharedMetrics(file), CommonIds(os.pread(fd, KEY_BYTES, 0))


def _why(error: BaseException) -> str:
    """Why a proxy cannot follow a version, as a sentence."""
    if isinstance(error, MQServeError):
        return str(error)
    return f"middlewares, convertors or routes cannot be made ({describe(error).words}): mend or replace them"


class _Outermost:
    """The ASGI app that uvicorn calls: it calls the app inside the current middlewares."""

    def __init__(self) -> None:
        self.app: Any = None
        self.apart = APART

    @property
    def plain(self) -> ProxyApp | None:
        """The app that takes requests without ASGI; None while middlewares want them."""
        return self.app if type(self.app) is ProxyApp else None

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        called: Awaitable[None] = self.app(scope, receive, send)
        return called


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers and its ten ticks a second, and with our way to begin a shutdown."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    async def main_loop(self) -> None:
        """Sets the date of the answers once a second until `end`."""
        while not self._ending.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_tick_s(1.0)):
                    await self._ending.wait()

    def end(self) -> None:
        """Begins uvicorn's shutdown."""
        self.should_exit = True
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def last_answers(self) -> None:
        """Stops accepting connections, and marks each answer on open ones as the last (`connection: close`): otherwise a client may send
        its next request just when we close. Returns when no connection is open, after at most LAST_ANSWERS_S; uvicorn then finishes the
        rest."""
        close = (b"connection", b"close")
        for listening in self.servers:
            listening.close()
        self.config.encoded_headers.append(close)  # uvicorn rebuilds the default headers from this every second
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpToolsProtocol) and connection.cycle and not connection.cycle.response_complete:
                connection.shutdown()  # a busy connection: its answer says that it is the last
        until = time.monotonic() + LAST_ANSWERS_S
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)


def _uvicorn_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app, interface="asgi3",
        http=PlainEdgeProtocol, ws="none", ws_per_message_deflate=False,  # the edge changes protocols itself
        ws_max_size=MAX_MESSAGE_BYTES, lifespan="off", access_log=False, log_config=None,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=PROXY_DRAIN_S, server_header=False, date_header=True,
        proxy_headers=False,  # the edge reads them
    )  # fmt: skip
