"""The settings of a backend that its user may change while it serves."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...broker.jobs import MAX_RESULT_TTL_S
from ...broker.streams import IDLE_TIMEOUT_S, KEPT_BYTES, KEPT_FRAMES, RESUME_GRACE_S
from .retries import Retry, with_named_settings

MAX_REQUEST_TIMEOUT_S = 25 * 60  # below RabbitMQ's consumer_timeout of 30 minutes
MAX_QUEUE_SHARDS = 64  # one of RabbitMQ's queues uses one core at most
MAX_REPLICAS = 10_000  # of a backend; each is a process or a thread, and a slip of the keyboard should start none
SYNC_CONCURRENCY = 64  # of a plain handler whose calls are so short that this many take no time
ASYNC_CONCURRENCY = 100
MAX_JOB_TIMEOUT_S = 7 * 24 * 3600  # a day below what the queue for jobs allows (JOB_UNACKED_MS)
MIN_RESULT_TTL_S = 1

Whole = Annotated[int, Field(gt=0, lt=2**31)]


class BackendConfig(BaseModel):
    """What a backend's user may turn while it serves. Unknown keys are refused, and assignment is validated.

    num_replicas: copies of the backend, at most 10,000.
    max_batch_size: requests that an `accept_batch` handler gets at most in one call; 1 when None.
    batch_wait_timeout: seconds that a batch waits to be full; 0 takes what is there.
    max_concurrent_queries: requests that one replica holds at a time; default 100 for an async handler, twice the batch size for
        one with `max_batch_size`, and for a plain one what it can run and what runs within 2 ms, up to 64.
    max_sessions: WebSocket sessions that one replica of an ASGI app may have; a handshake beyond them is answered 503.
    sync_threads: how many plain calls a replica runs at once; 1, since models are rarely thread-safe.
    request_timeout_s: seconds from the request's arrival to its answer, at most 25 minutes.
    max_queued_requests: waiting requests beyond which callers are told 429; None for no limit. Changing it makes a new queue.
    queue_shards: RabbitMQ queues of the backend, for rates above what one carries. Changing it makes new queues.
    graceful_shutdown_timeout_s: seconds a stopping replica has for what it is running.
    start_timeout_s: seconds a new replica has to get ready.
    delivery: "at_least_once", or "at_most_once": never run twice; a request whose replica died is answered 502.
    max_attempts: runs of one request that may end with their replica; after that it goes to the dead letters and is answered 500.
    user_config: given to the class's `reconfigure` after construction and at each change of it.
    health_check_period_s, health_check_timeout_s: how often the class's `check_health` is called, and how long it may take;
        a replica that fails it three times in a row is replaced.
    max_surge: replicas that may run beyond num_replicas while new code is rolled out.
    stream_idle_timeout_s: seconds from one chunk of a streamed answer to the next, at most 25 minutes; only while its reader takes them.
    resume_grace_s: seconds that a stream which can be resumed waits for a reader, at most 25 minutes.
    on_death: what becomes of a streamed answer whose replica died: "fail", it ends with an error, or "replay", the handler runs again and
        what was shown is passed over, which needs a handler that makes the same chunks again.
    stream_kept_bytes, stream_kept_frames: what is kept at most of a stream that can be resumed; the oldest part goes first.
    job_slots: jobs that one replica holds at a time; default half of what it runs at a time, at least 1.
    job_timeout_s: seconds that a job may run, at most 7 days. The default is lower where RabbitMQ is older than 3.12.
    result_ttl_s: seconds that results are kept, at most 30 days; when None, ten minutes, and those of jobs a day.
    retry: how jobs are tried again whose handler raised an exception; None: they are not.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)  # allow_inf_nan: JSON has neither

    num_replicas: Annotated[Whole, Field(le=MAX_REPLICAS)] = 1
    max_batch_size: Whole | None = None
    batch_wait_timeout: Annotated[float, Field(ge=0)] = 0.0
    max_concurrent_queries: Whole | None = None
    max_sessions: Whole = 1000
    sync_threads: Whole = 1
    request_timeout_s: Annotated[float, Field(gt=0, le=MAX_REQUEST_TIMEOUT_S)] = 60.0
    max_queued_requests: Whole | None = None
    queue_shards: Annotated[int, Field(gt=0, le=MAX_QUEUE_SHARDS)] = 1
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 20.0
    # less than an hour, since a roll-back needs the old code, which is kept for an hour
    start_timeout_s: Annotated[float, Field(gt=0, le=45 * 60)] = 120.0
    delivery: Literal["at_least_once", "at_most_once"] = "at_least_once"
    max_attempts: Whole = 3
    user_config: Any = None
    health_check_period_s: Annotated[float, Field(gt=0)] = 10.0
    health_check_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    max_surge: Whole = 1
    stream_idle_timeout_s: Annotated[float, Field(gt=0, le=MAX_REQUEST_TIMEOUT_S)] = IDLE_TIMEOUT_S
    resume_grace_s: Annotated[float, Field(ge=0, le=MAX_REQUEST_TIMEOUT_S)] = RESUME_GRACE_S
    on_death: Literal["fail", "replay"] = "fail"
    stream_kept_bytes: Whole = KEPT_BYTES
    stream_kept_frames: Whole = KEPT_FRAMES
    job_slots: Whole | None = None
    job_timeout_s: Annotated[float, Field(gt=0, le=MAX_JOB_TIMEOUT_S)] = 3600.0
    result_ttl_s: Annotated[float, Field(ge=MIN_RESULT_TTL_S, le=MAX_RESULT_TTL_S)] | None = None
    retry: Annotated[Retry | None, BeforeValidator(with_named_settings)] = None

    @model_validator(mode="after")
    def _may_run_twice(self) -> Self:
        again = "on_death 'replay'" if self.on_death == "replay" else "retry" if self.retry is not None else ""
        if again and self.delivery == "at_most_once":
            wrong = f"{again} runs a request again, and with delivery 'at_most_once' none is: choose one of them"
            raise PydanticCustomError("delivery", "{wrong}", {"wrong": wrong})
        return self

    @model_validator(mode="after")
    def _fits_its_shards(self) -> Self:
        if self.queue_shards > 1 and (wrong := self._shards_do_not_fit()):
            raise PydanticCustomError("queue_shards", "{wrong}", {"wrong": wrong})
        return self

    def _shards_do_not_fit(self) -> str:
        """Returns why a replica could not take from all queues and keep the other settings; empty if it can."""
        shards, held = self.queue_shards, self.concurrency(is_async=False)
        if held < shards:
            return f"a replica takes from all {shards} queues (queue_shards), so it must be allowed to hold as many requests, not {held}"
        if self.max_queued_requests is not None and self.max_queued_requests < shards:
            return f"max_queued_requests is divided among the {shards} queues (queue_shards), so it must be at least that"
        if self.delivery == "at_most_once":
            return "with delivery 'at_most_once' there is one queue: queue_shards would let a replica hold, and lose, what it does not run"
        return ""

    @property
    def replay_s(self) -> float:
        """How long the broker keeps a request beyond its time, so that another replica can replay its answer: a run ends after that."""
        return MAX_REQUEST_TIMEOUT_S if self.on_death == "replay" else 0

    def concurrency(self, is_async: bool) -> int:
        """The number of requests that one replica holds at most, from all senders; recomputed whenever one of its inputs changes."""
        if self.max_concurrent_queries is not None:
            return self.max_concurrent_queries
        if self.max_batch_size is not None and (self.batch_wait_timeout > 0 or not is_async):
            return 2 * self.max_batch_size
        return ASYNC_CONCURRENCY if is_async else max(SYNC_CONCURRENCY, 2 * self.sync_threads)

    def held_jobs(self, is_async: bool) -> int:
        """The number of jobs that one replica holds at most. By default they leave half of the places to requests that somebody waits
        for."""
        if self.job_slots is not None:
            return self.job_slots
        runs = self.concurrency(is_async) if is_async or self.max_batch_size is not None else self.sync_threads
        return max(1, runs // 2)

    def longest_job_s(self, limit_s: int) -> float:
        """The time that a job may run, where RabbitMQ holds its message for `limit_s` at most; 0 for no such limit."""
        return min(self.job_timeout_s, limit_s) if limit_s else self.job_timeout_s
