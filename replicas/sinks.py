"""Where the values go that a generator yields: into a stream, or into one piece where the caller wants one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..broker.amqp_replies import MAX_REPLY_BYTES
from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.envelope import Envelope
from ..broker.errors import BadType, TooLarge
from ..broker.results import Result, ResultLimit
from ..broker.streams import Form, Head, Owner
from ..broker.values.codecs import TEXT
from ..broker.values.signing import Signer
from ..controller.state.config import BackendConfig
from .chunks import EVENTS, BodyChunks, checked, encode_item, takes_events
from .job_chunks import JobChunks
from .outgoing import Outgoing
from .replies import plain_result, value_result
from .stages import Job, KeptJob

WAIT_LIMIT = ResultLimit(
    MAX_BODY_BYTES, f"the result has more than {MAX_BODY_BYTES} bytes, which is the limit: return less, or a reference to it"
)
_JOINED_LIMIT = ResultLimit(
    MAX_BODY_BYTES,
    f"the chunks have more than {MAX_BODY_BYTES} bytes in all, which is the limit of an answer in one piece: read them as a stream",
)


class Sink(Protocol):
    """Takes the values of one generator, in the worker's thread."""

    @property
    def has_room(self) -> bool:
        """Whether the generator may go on."""
        ...

    @property
    def wants_more(self) -> bool:
        """Whether the generator is to go on at all."""
        ...

    def take(self, value: object) -> None:
        """Raises MQServeError for a value that cannot be sent."""
        ...

    def park(self, resume: Callable[[], None]) -> bool:
        """See `Outgoing.park`."""
        ...

    def end(self) -> Result:
        """Returns the result of a generator that has ended in order."""
        ...


class _Unlimited:
    """A sink that always has room."""

    has_room = True
    wants_more = True

    def park(self, resume: Callable[[], None]) -> bool:
        return True


class Discarded(_Unlimited):
    """For a request whose result nobody reads."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def take(self, value: object) -> None:
        """Drops it."""

    def end(self) -> Result:
        return Result(backend=self._backend)


class Listed(_Unlimited):
    """Collects the values for a handle, whose caller gets them as a list."""

    def __init__(self, envelope: Envelope, backend: str, signer: Signer, limit: ResultLimit, job_chunks: JobChunks | None = None) -> None:
        self._envelope = envelope
        self._backend = backend
        self._signer = signer
        self._limit = limit
        self._job_chunks = job_chunks
        self._values: list[Any] = []
        self._size = 0

    def take(self, value: object) -> None:
        self._size += len(value) if isinstance(value, str | bytes | bytearray) else 1
        _check_size(self._size, self._limit)
        self._values.append(value)
        if self._job_chunks is not None:
            self._job_chunks.put_value(value)

    def end(self) -> Result:
        result = value_result(self._values, self._backend, self._envelope.id, self._signer)
        _check_size(len(result.body), self._limit)
        return result


class Joined(_Unlimited):
    """Joins the chunks to one body."""

    def __init__(self, backend: str, limit: ResultLimit, job_chunks: JobChunks | None = None) -> None:
        self._backend = backend
        self._limit = limit
        self._job_chunks = job_chunks
        self._chunks = BodyChunks()
        self._parts: list[bytes] = []
        self._size = 0

    def take(self, value: object) -> None:
        part = self._chunks.encode(value)
        self._size += len(part)
        _check_size(self._size, self._limit)
        self._parts.append(part)
        if self._job_chunks is not None:
            self._job_chunks.put(part, is_text=self._chunks.is_text)

    def end(self) -> Result:
        return Result(backend=self._backend, content_type=self._chunks.content_type, body=b"".join(self._parts))


class HeadOnly(_Unlimited):
    """Takes one chunk for an answer to HEAD, which has the head that an answer to GET would have."""

    def __init__(self, backend: str, *, events: bool) -> None:
        self._backend = backend
        self._events = events
        self._chunks = BodyChunks()
        self.wants_more = True

    def take(self, value: object) -> None:
        self.wants_more = False
        if not self._events:
            self._chunks.encode(value)

    def end(self) -> Result:
        return Result(backend=self._backend, content_type=EVENTS if self._events else self._chunks.content_type)


class Flowing:
    """Sends each value on as a chunk. `touch` has the I/O loop look at the stream."""

    wants_more = True

    def __init__(self, flow: Outgoing, envelope: Envelope, form: Form, signer: Signer, touch: Callable[[], None]) -> None:
        self._flow = flow
        self._envelope = envelope
        self._form = form
        self._signer = signer
        self._touch = touch
        self._body = BodyChunks()
        if form is not Form.BODY:
            flow.begin(head := self._head())
            if form is Form.ITEMS:
                flow.early_head = head
                touch()  # from now on it has its time

    @property
    def has_room(self) -> bool:
        return self._flow.has_room

    def park(self, resume: Callable[[], None]) -> bool:
        return self._flow.park(resume)

    def take(self, value: object) -> None:
        match self._form:
            case Form.BODY:
                data = self._body.encode(value)
                if not self._flow.made:
                    self._flow.begin(self._head())
                elif not data:
                    return
                self._flow.offer(data)
            case Form.ITEMS:
                data = encode_item(value)
                self._flow.offer(data, "" if data else TEXT)  # a first frame without data and type would belong to no chunk
            case Form.VALUES:
                result = value_result(value, self._flow.owner.backend, self._envelope.id, self._signer)
                self._flow.offer(checked(result.body), result.content_type)
        self._touch()

    def end(self) -> Result:
        if self._form is not Form.BODY:
            self._flow.show_head()
        self._flow.check_replay()
        return Result(backend=self._flow.owner.backend, content_type=self._body.content_type)

    def _head(self) -> Head:
        owner = self._flow.owner
        content_type = EVENTS if self._form is Form.ITEMS else self._body.content_type if self._form is Form.BODY else Head().content_type
        return Head(
            content_type=content_type, form=self._form, replica=owner.replica, resumable=owner.resumable, idle_s=self._flow.idle_s,
        )  # fmt: skip


class Replying:
    """Sends each value as a message of its own to a direct publisher's queue."""

    wants_more = True

    def __init__(self, flow: Outgoing, backend: str, touch: Callable[[], None]) -> None:
        self._flow = flow
        self._backend = backend
        self._touch = touch

    @property
    def has_room(self) -> bool:
        return self._flow.has_room

    def park(self, resume: Callable[[], None]) -> bool:
        return self._flow.park(resume)

    def take(self, value: object) -> None:
        result = plain_result(value, self._backend)
        if len(result.body) > MAX_REPLY_BYTES:
            raise TooLarge(f"the handler yielded {len(result.body)} bytes, and a reply carries {MAX_REPLY_BYTES}: yield less", status=500)
        self._flow.offer_whole(result.body, result.content_type)
        self._touch()

    def end(self) -> Result:
        return Result(backend=self._backend, content_type="text/plain")


class ResponseStream:
    """The body of a response that flows. `length` is what its Content-Length says."""

    def __init__(self, flow: Outgoing, touch: Callable[[], None], head: Result, length: int | None) -> None:
        self._flow = flow
        self._touch = touch
        self._left = length
        owner = flow.owner
        flow.begin(Head(head.status, head.content_type, head.headers, Form.BODY, owner.replica, owner.resumable, flow.idle_s, length))

    def __repr__(self) -> str:
        return f"<ResponseStream of {self._flow!r}>"

    async def send(self, data: bytes) -> None:
        """Sends a part of the body, and returns once there is room for the next one. Raises BadType for more than the length."""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise BadType("the response sent more bytes than its Content-Length says")
        if data:
            self._flow.offer(data)
        else:
            self._flow.show_head()
        self._touch()
        await self._flow.room()

    def end(self) -> None:
        """Raises BadType for a body that is shorter than its length."""
        if self._left:
            raise BadType(f"the response ended {self._left} bytes before its Content-Length")
        self._flow.check_replay()


def _check_size(size: int, limit: ResultLimit) -> None:
    if size > limit.max_bytes:
        raise TooLarge(limit.refusal, status=500)


class Sinks:
    """Chooses the sink of a generator by what its caller takes."""

    def __init__(self, backend: str, replica_id: str, config: BackendConfig, touch: Callable[[Job], None]) -> None:
        self._backend = backend
        self._replica_id = replica_id
        self._touch = touch
        self.config = config
        self.job_limit = WAIT_LIMIT  # of the results of jobs

    def __repr__(self) -> str:
        return f"<Sinks of {self._backend}>"

    def of(self, job: Job, signer: Signer) -> Sink:
        envelope, header = job.envelope, job.envelope.header
        if isinstance(job, KeptJob):
            return self._of_job(job, signer)
        if envelope.reply_to and not header.origin:
            job.flow = self._new_flow(envelope, is_reply=True)
            return Replying(job.flow, self._backend, lambda: self._touch(job))
        if header.shadow or not envelope.id:
            return Discarded(self._backend)
        if header.origin == "handle" and not (header.stream and header.inbox):
            return Listed(envelope, self._backend, signer, _JOINED_LIMIT)
        if header.origin == "handle":
            return self._flowing(job, Form.VALUES, signer, resumable=header.stream == 2)
        events = header.origin == "http" and takes_events(header.meta.headers)
        if header.origin == "http" and header.meta.method == "HEAD":
            return HeadOnly(self._backend, events=events)
        if header.origin == "http" and header.inbox:
            return self._flowing(job, Form.ITEMS if events else Form.BODY, signer, resumable=events)
        return Joined(self._backend, _JOINED_LIMIT)

    def _of_job(self, job: KeptJob, signer: Signer) -> Sink:
        """The answer of a job is one piece, and those who follow it are told of its parts."""
        envelope, header = job.envelope, job.envelope.header
        if not envelope.id and not envelope.reply_to:
            return Discarded(self._backend)
        if header.origin == "handle":
            return Listed(envelope, self._backend, signer, self.job_limit, job.chunks)
        is_head = header.origin == "http" and header.meta.method == "HEAD"
        if is_head:
            return HeadOnly(self._backend, events=takes_events(header.meta.headers))
        return Joined(self._backend, self.job_limit, job.chunks)

    def _flowing(self, job: Job, form: Form, signer: Signer, *, resumable: bool) -> Flowing:
        flow = self.flow(job, resumable=resumable, is_body=form is Form.BODY)
        return Flowing(flow, job.envelope, form, signer, lambda: self._touch(job))

    def response(self, job: Job, head: Result, length: int | None) -> ResponseStream | None:
        """Returns the stream of a response, or None where its caller takes one piece."""
        header = job.envelope.header
        if header.origin != "http" or header.shadow or not header.inbox or isinstance(job, KeptJob):
            return None
        return ResponseStream(self.flow(job, is_body=True), lambda: self._touch(job), head, length)

    def flow(self, job: Job, *, resumable: bool = False, is_body: bool = False) -> Outgoing:
        """Returns the stream of a job, which its admission has made if an earlier run has shown a part of it."""
        envelope = job.envelope
        if job.flow is None:
            job.flow = self._new_flow(envelope, resumable=resumable, is_body=is_body)
        return job.flow

    def _new_flow(self, envelope: Envelope, *, resumable: bool = False, is_reply: bool = False, is_body: bool = False) -> Outgoing:
        future_id, endpoint, config = envelope.future_id(self._backend), envelope.header.meta.endpoint, self.config
        replays = config.on_death == "replay"
        owner = Owner.new(self._replica_id, envelope.attempt, self._backend, endpoint, resumable=resumable, replays=replays)
        return Outgoing(future_id, owner, envelope.header.inbox, config, is_reply=is_reply, joins=is_body and not replays)
