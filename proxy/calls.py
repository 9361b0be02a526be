"""One HTTP request on its way to a backend, as the object that also waits for its result."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from ..broker.calls.call import Awaited, Call
from ..broker.calls.incoming import IncomingStream
from ..broker.errors import MQServeError
from ..broker.jobs import JobFacts
from ..broker.results import Result
from .responses import Reply
from .routes import Target
from .streaming import Flow

if TYPE_CHECKING:
    from .app import ProxyApp
    from .jobs import JobCall

Address = tuple[str, int]


class HttpCall(Call):
    """The head of a request beside what any call has. `target` is set once a route has matched."""

    __slots__ = (
        "arrived",
        "client",
        "headers",
        "http_version",
        "method",
        "path",
        "query",
        "raw_path",
        "scheme",
        "server",
        "state",
        "target",
    )

    reads_alone = True
    arrived: float  # monotonic
    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    http_version: str
    scheme: str
    client: Address | None
    server: tuple[str, int | None] | None
    state: dict[str, Any] | None  # what middlewares left on the request
    target: Target

    @property
    def head_bytes(self) -> int:
        """The size of the request line and headers, as an AMQP header would carry them."""
        return len(self.raw_path) + len(self.query) + sum([len(name) + len(value) + 4 for name, value in self.headers])

    def header(self, wanted: bytes) -> bytes:
        return next((value for name, value in self.headers if name == wanted), b"")


class AsgiCall(Awaited, HttpCall):
    """A request that came through ASGI: a task awaits its result, or the beginning of its stream."""

    __slots__ = ("future",)

    future: asyncio.Future[Result | IncomingStream]

    def __init__(self, scope: dict[str, Any], id: str) -> None:
        self.id = id
        self.arrived = time.monotonic()
        self.method, self.path, self.raw_path, self.query = scope["method"], scope["path"], scope["raw_path"] or b"", scope["query_string"]
        self.headers, self.http_version, self.scheme = scope["headers"], scope["http_version"], scope["scheme"]
        self.client, self.server, self.state = scope["client"], scope["server"], scope.get("state")
        self.future = asyncio.get_running_loop().create_future()

    def began(self, stream: IncomingStream) -> None:
        if self.future.done():  # its task was cancelled
            self.sender.leave(stream)
        else:
            self.future.set_result(stream)

    def leave(self) -> None:
        """Its task is cancelled, and nobody else will see a stream that has begun meanwhile."""
        if not self.future.done() or self.future.cancelled() or self.future.exception() is not None:
            return
        if isinstance(stream := self.future.result(), IncomingStream):
            self.sender.leave(stream)


class Connection(Protocol):
    """Where a plain request came from."""

    def answer(self, call: PlainCall, reply: Reply) -> None:
        """Writes the answer, unless the client has gone."""
        ...

    def stream(self, call: PlainCall, flow: Flow) -> None:
        """Writes an answer that flows, as long as the client takes it."""
        ...


class _NobodyReads:
    """Stands where uvicorn wakes the readers of a request's body: that of a plain request is read already."""

    def set(self) -> None:
        pass


class PlainCall(HttpCall):
    """A plain request: it came whole in one read, and no middleware wants it. So no task runs for it; its result is its answer.

    A connection holds it where uvicorn holds a `RequestResponseCycle`, and uses these names of it.
    """

    __slots__ = (
        "app", "chunked_encoding", "connection", "disconnected", "expected_content_length", "keep_alive", "response_complete",
        "response_started", "transport",
    )  # fmt: skip

    message_event = _NobodyReads()
    keep_alive: bool
    chunked_encoding: bool  # this and the next are set for an answer that flows
    expected_content_length: float

    def __init__(self, connection: Connection, app: ProxyApp) -> None:
        self.id = app.mint_id()
        self.arrived = time.monotonic()
        self.state = None
        self.connection = connection
        self.app = app
        self.disconnected = self.response_complete = self.response_started = False

    def begin(self, body: bytes) -> bool:
        """Serves it. Returns False if it has to come by ASGI instead."""
        return self.app.begin_plain(self, body)

    def left(self) -> None:
        """The client has gone before its answer began."""
        self.app.leave_plain(self)

    def answered(self, result: Result) -> None:
        self.app.end_plain(self, result)

    def began(self, stream: IncomingStream) -> None:
        self.app.stream_plain(self, stream)

    def failed(self, error: MQServeError) -> None:
        self.app.end_plain(self, error)

    def abandoned(self) -> None:
        self.app.abandon_plain(self)


class PlainJob(PlainCall):
    """A plain request that is sent as a job, which no `RequestSender` sees: its submission has one end. Its answer is the promise, and it
    goes on when its client has gone.

    `prefix` is what a server in front took away from the path.
    """

    __slots__ = ("job", "prefix")

    prefix: str
    job: JobCall

    def begin(self, body: bytes) -> bool:
        return self.app.begin_plain_job(self, body)

    def left(self) -> None:
        """Nothing ends: the job goes on."""

    def submitted(self, outcome: JobFacts | MQServeError) -> None:
        """Called at the end of its submission."""
        self.app.end_plain_job(self, outcome)
