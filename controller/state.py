"""The state model: what is wanted (written by clients) and what is seen (written by the leading controller).

Both are JSON documents in the store, so that an operator can read them with `redis-cli get`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ..broker.documents import follow
from ..broker.errors import UNPARSABLE, BadEnvelope
from ..broker.store import WRONG_TYPE, Store
from ..broker.store_keys import StoreKeys
from .resources import ActorOptions, Capacity, Demand

MAX_REQUEST_TIMEOUT_S = 25 * 60  # below RabbitMQ's consumer_timeout of 30 minutes

Whole = Annotated[int, Field(gt=0, lt=2**31)]  # of a config
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # of a document
T = TypeVar("T")
logger = logging.getLogger(__name__)

SYNC_CONCURRENCY = 8  # max_concurrent_queries of a plain handler, as in the seed
ASYNC_CONCURRENCY = 100


class BackendConfig(BaseModel):
    """What a backend's user may turn while it serves. Unknown keys are refused, and assignment is validated.

    num_replicas: copies of the backend.
    max_batch_size: requests that an `accept_batch` handler gets at most in one call; 1 when None.
    batch_wait_timeout: seconds that a batch waits to be full; 0 takes what is there.
    max_concurrent_queries: requests that one replica holds at a time; default 8 for a plain handler, twice the batch size for
        one with `max_batch_size`, 100 for an async one.
    sync_threads: how many plain calls a replica runs at once; 1, since models are rarely thread-safe.
    request_timeout_s: seconds from the request's arrival to its answer, at most 25 minutes.
    max_queued_requests: waiting requests beyond which callers are told 429; None for no limit. Changing it makes a new queue.
    graceful_shutdown_timeout_s: seconds a stopping replica has for what it is running.
    start_timeout_s: seconds a new replica has to get ready.
    delivery: "at_least_once", or "at_most_once": never run twice; a request whose replica died is answered 502.
    max_attempts: runs of one request that may end with their replica; after that it goes to the dead letters and is answered 500.
    user_config: given to the class's `reconfigure` after construction and at each change of it.
    health_check_period_s, health_check_timeout_s: how often the class's `check_health` is called, and how long it may take;
        a replica that fails it three times in a row is replaced.
    max_surge: replicas that may run beyond num_replicas while new code is rolled out.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)  # JSON has neither

    num_replicas: Whole = 1
    max_batch_size: Whole | None = None
    batch_wait_timeout: Annotated[float, Field(ge=0)] = 0.0
    max_concurrent_queries: Whole | None = None
    sync_threads: Whole = 1
    request_timeout_s: Annotated[float, Field(gt=0, le=MAX_REQUEST_TIMEOUT_S)] = 60.0
    max_queued_requests: Whole | None = None
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 20.0
    start_timeout_s: Annotated[float, Field(gt=0, le=45 * 60)] = 120.0  # code that is rolled back to is kept for an hour
    delivery: Literal["at_least_once", "at_most_once"] = "at_least_once"
    max_attempts: Whole = 3
    user_config: Any = None
    health_check_period_s: Annotated[float, Field(gt=0)] = 10.0
    health_check_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    max_surge: Whole = 1

    def concurrency(self, is_async: bool) -> int:
        """Requests that one replica holds at most, whoever sent them; recomputed whenever a part of it changes."""
        if self.max_concurrent_queries is not None:
            return self.max_concurrent_queries
        if self.max_batch_size is not None and (self.batch_wait_timeout > 0 or not is_async):
            return 2 * self.max_batch_size
        return ASYNC_CONCURRENCY if is_async else max(SYNC_CONCURRENCY, 2 * self.sync_threads)


class Backend(msgspec.Struct, frozen=True):
    """A named implementation. `version` is that of the document that brought its code: none is used twice, also where one that failed is
    rolled back, or where the name is used again. `generation` grows with its queue's frozen arguments."""

    name: str
    code: str  # sha256 of the code in the store
    code_name: str
    settings: dict[str, Any] = {}
    options: ActorOptions = ActorOptions()
    version: Count = 1
    generation: Count = 1
    config_version: Count = 1
    rolled_back: str = ""  # why the last roll-out of code was undone

    @property
    def config(self) -> BackendConfig:
        return BackendConfig.model_validate(self.settings)


class Endpoint(msgspec.Struct, frozen=True):
    """A named target of traffic. `route` None: reachable by handle only."""

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: dict[str, float]
    shadows: dict[str, float] = {}


class HttpOptions(msgspec.Struct, frozen=True):
    """Where proxies listen and on which nodes. `middlewares` is the sha256 of their code, empty for none."""

    host: str = "127.0.0.1"
    port: int = 8000
    location: str = "HeadOnly"  # or EveryNode, NoServer
    middlewares: str = ""
    debug: bool = False


class Desired(msgspec.Struct, frozen=True):
    """What the users want. Versions order as (epoch, version)."""

    epoch: Count = 1
    version: Count = 0
    instance: str = ""
    head_node: str = ""  # the node that started the instance: the one of HeadOnly
    http: HttpOptions = HttpOptions()
    backends: dict[str, Backend] = {}
    endpoints: dict[str, Endpoint] = {}
    convertors: dict[str, str] = {}  # name -> sha256 of its code
    forced: tuple[str, ...] = ()  # backends deleted by force: neither their queues nor their replicas drain
    closing: bool = False  # the instance is being shut down
    incomplete: bool = False  # what its starter declares is not all deployed yet
    operations: tuple[str, ...] = ()  # the last operation ids, so that a retry recognises itself

    @property
    def codes(self) -> frozenset[str]:
        """The hashes of all code it names."""
        return frozenset({*(backend.code for backend in self.backends.values()), *self.convertors.values(), self.http.middlewares} - {""})

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Desired:
        """Raises BadEnvelope for what is no such document, or one that contradicts itself."""
        if raw is None:
            return cls()
        desired = decode_document(raw, cls, "desired state")
        if wrong := _contradiction(desired):
            raise BadEnvelope(f"the desired state in the store contradicts itself: {wrong}")
        return desired


class Assignment(msgspec.Struct, frozen=True):
    """A replica that a node is to run."""

    backend: str
    node: str
    version: Count
    demand: Demand = Demand()
    gpus: tuple[Count, ...] = ()  # positions among the node's devices


class Observed(msgspec.Struct, frozen=True):
    """What the leading controller decided and saw; nodes and replicas act on it, under its epoch."""

    epoch: Count = 0
    version: Count = 0
    seen: tuple[Count, Count] = (0, 0)  # (epoch, version) of the desired document this follows
    queues: dict[str, tuple[Count, ...]] = {}  # generations that replicas take from, the current one last
    retiring: dict[str, tuple[Count, ...]] = {}  # generations that nobody takes from any more, about to be deleted
    replicas: dict[str, Assignment] = {}
    draining: dict[str, Assignment] = {}  # no longer assigned, and not gone yet: they still take their room
    proxies: tuple[str, ...] = ()  # nodes that are to run one
    problems: dict[str, str] = {}  # backend (or "proxy on <node>") -> why it is not as wanted
    down_since: dict[str, Count] = {}  # backend -> store ms since which no replica has been ready or starting
    sealed: bool = False  # all proxies and replicas seal the requests that they send, so replicas demand it
    serving: tuple[str, ...] | None = None  # backends with a replica that is ready; None: written by a controller that does not say

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Observed:
        """Raises BadEnvelope for what is no such document."""
        return cls() if raw is None else decode_document(raw, cls, "observed state")


class Beat(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node, a proxy or a replica says of itself, every BEAT_EVERY_S and at each change."""

    kind: str  # node, proxy, replica
    id: str
    at: Count  # store ms
    pid: Count = 0
    host: str = ""
    state: str = "ready"  # starting, ready, draining, failed
    error: str = ""
    node: str = ""
    external: bool = False
    backend: str = ""
    version: Count = 0
    generations: tuple[Count, ...] = ()  # queues whose messages this replica takes or still holds
    url: str = ""
    follows: tuple[Count, Count] = (0, 0)  # a proxy's (epoch, version) of the desired document; a replica's (0, config version)
    refuses: tuple[Count, Count] = (0, 0)  # the (epoch, version) of the desired document that a proxy cannot follow
    refused: str = ""  # why; of a replica, why its code refused the config it follows
    noted: str = ""  # what it found in the store that another program wrote there
    ended: dict[str, str] = {}  # a node's children that ended by themselves -> how
    takes_proxy: bool = False  # a node on which a proxy may run
    capacity: Capacity = Capacity()
    running: Count = 0
    served: Count = 0
    seals: bool = False  # the requests that it sends; an earlier version does not, nor does a process without the secret key

    @property
    def field(self) -> str:
        return f"{self.kind}:{self.id}"

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)


BEAT_EVERY_S = 1.0
PROXY_DRAIN_S = 20  # what a proxy gives its open requests when it ends
SILENT_AFTER_S = 6.0  # a member that has not beaten for this long is gone


def read_beats(fields: Mapping[str, bytes]) -> dict[str, Beat]:
    """By field; what does not parse (another version's) is left out."""
    beats: dict[str, Beat] = {}
    for field, raw in fields.items():
        try:
            beats[field] = msgspec.json.decode(raw, type=Beat)
        except UNPARSABLE:
            continue
    return beats


def decode_document(raw: bytes, kind: type[T], what: str) -> T:
    """Raises BadEnvelope with a sentence for an operator."""
    if raw == WRONG_TYPE:
        raise BadEnvelope(
            f"the {what} in the store is no string, so another program wrote it: delete it for its controller to write it anew"
        )
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNPARSABLE as error:
        raise BadEnvelope(
            f"the {what} in the store does not parse ({error}): mend it, or delete it for its controller to write it anew"
        ) from error


def _contradiction(desired: Desired) -> str:
    """What the readers of the document could not live with, in words."""
    for name, backend in desired.backends.items():
        try:
            _ = backend.config
        except pydantic.ValidationError as error:
            return f"backend {name!r} has a bad config ({error.errors()[0]['msg']})"
    for name, endpoint in desired.endpoints.items():
        if missing := {*endpoint.traffic, *endpoint.shadows} - set(desired.backends):
            return f"endpoint {name!r} sends to {min(missing)!r}, which is no backend"
        if min(endpoint.traffic.values(), default=0) < 0 or not 0.999 < sum(endpoint.traffic.values()) < 1.001:
            return f"the weights of endpoint {name!r} are not 0 or more, and 1 altogether"
    named: list[tuple[str, Any]] = [*desired.backends.items(), *desired.endpoints.items()]
    return next((f"{name!r} is called {thing.name!r} inside" for name, thing in named if thing.name != name), "")


D = TypeVar("D", Desired, Observed)
DOUBTED_FOR_S = 15.0  # longer than a change of leaders takes


class _Latest(Generic[D]):
    """The last good version of a document, and no older one at first: that is a copy from before the store failed, which whoever leads
    replaces. What is still there after DOUBTED_FOR_S is believed."""

    def __init__(self, kind: type[D]) -> None:
        self._kind: type[D] = kind
        self._doubted_since = math.inf  # monotonic
        self._broken: bytes | None = None  # the one that was said last: it is read again whenever the other document changes
        self.value: D | None = None

    @property
    def doubts(self) -> bool:
        return self._doubted_since < math.inf

    def take(self, raw: bytes | None) -> None:
        try:
            found = None if raw is None else self._kind.from_bytes(raw)
        except BadEnvelope as error:
            if raw != self._broken:
                logger.warning("%s; going on with the last good one", error)
            self._broken = raw
            return
        if self.value is not None and found is not None and (found.epoch, found.version) < (self.value.epoch, self.value.version):
            self._doubted_since = min(self._doubted_since, time.monotonic())
            if time.monotonic() - self._doubted_since < DOUBTED_FOR_S:
                return
        self._doubted_since = math.inf
        self.value = found

    def forget(self) -> None:
        self._doubted_since = math.inf
        self.value = None


async def follow_state(store: Store, keys: StoreKeys) -> AsyncIterator[tuple[Desired | None, Observed | None]]:
    """Both documents now, and after every change; of one that is broken, or older than what was there, the last good one."""
    desired, observed = _Latest(Desired), _Latest(Observed)
    instance = ""
    async for raw_desired, raw_observed in follow(store, keys.desired, keys.observed, again=lambda: desired.doubts or observed.doubts):
        if raw_desired is not None and (found := _instance_of(raw_desired)) not in ("", instance):
            instance = found
            desired.forget()
            observed.forget()
        desired.take(raw_desired)
        observed.take(raw_observed)
        yield desired.value, observed.value


class _Named(msgspec.Struct):
    instance: str = ""


def _instance_of(raw: bytes) -> str:
    try:
        return msgspec.json.decode(raw, type=_Named).instance
    except UNPARSABLE:
        return ""


class Choice(NamedTuple):
    """Where one request goes, and where its copies go."""

    backend: str
    shadows: list[str]


def choose(endpoint: Endpoint, shard_key: str) -> Choice:
    """By chance, or by the shard key: then the same everywhere, for as long as the traffic does not change.

    Unlike the seed, which uses one draw for both, a shadow's draw is its own: its sample is not tied to one side of a split.
    """
    if len(endpoint.traffic) == 1 and not endpoint.shadows:
        return Choice(next(iter(endpoint.traffic)), [])
    backend = choose_backend(endpoint.traffic, _draw(shard_key, ""))
    return Choice(backend, [name for name, part in endpoint.shadows.items() if _draw(shard_key, name) < part])


def _draw(shard_key: str, purpose: str) -> float:
    """A number in [0, 1)."""
    if not shard_key:
        return random.random()
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{shard_key}".encode() if purpose else shard_key.encode()).digest()[:8]) / 2**64


def choose_backend(traffic: Mapping[str, float], value: float) -> str:
    """The backend for `value` in [0, 1): names sorted, the first whose cumulative weight exceeds it, as in the seed."""
    total = 0.0
    names = sorted(name for name, weight in traffic.items() if weight > 0)
    for name in names:
        total += traffic[name]
        if value < total:
            return name
    return names[-1]
