"""The two documents of an instance: the desired state (written by clients) and the observed state (written by the leading controller).

Both are JSON in the store, so that an operator can read them with `redis-cli get`. `reading.py` reads them.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ...broker.callbacks import NO_CALLBACKS, CallbackRules
from .config import BackendConfig
from .resources import ActorOptions, Demand

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
CatchUp = Literal["skip", "once"]
T = TypeVar("T")

ANY_METHOD = "*"  # stands among an endpoint's methods for all of them


class CodeKind(Enum):
    """What a backend's code is."""

    HANDLER = "handler"  # a function or a class that is called with requests
    APP = "app"  # an ASGI app
    APP_OBJECT = "app object"  # an ASGI app that is one object of an embedded instance, so one replica can have it
    NAMED = "named"  # an import string: its replicas tell whether it is an app, and then the client that deployed it writes that here

    @property
    def is_app(self) -> bool:
        return self in (CodeKind.APP, CodeKind.APP_OBJECT)


class Backend(msgspec.Struct, frozen=True, dict=True):
    """A named implementation. `version` is the version of the document that deployed its code. No version is used twice, not even after a
    roll-back, or for a new backend of the same name. `generation` grows when its queue's frozen arguments change."""

    name: str
    code: str  # sha256 of the code in the store
    code_name: str
    settings: dict[str, Any] = {}
    options: ActorOptions = ActorOptions()
    version: Count = 1
    generation: Count = 1
    config_version: Count = 1
    rolled_back: str = ""  # why the last roll-out of code was undone
    kind: CodeKind = CodeKind.HANDLER

    @cached_property
    def config(self) -> BackendConfig:
        """For reading only, since all readers in this process share it."""
        return BackendConfig.model_validate(self.settings)

    @property
    def shards(self) -> int:
        """The number of queues of its current generation. Cheaper than `config`, since each follower asks at every change."""
        return int(self.settings.get("queue_shards", 1))


class Endpoint(msgspec.Struct, frozen=True):
    """A named target of traffic. With `route` None only handles reach it. With `prefix` the route is also that of all paths below it, and
    the `root_path` of the app that answers them. One with `stages` is a pipeline, which has no traffic of its own: they are the names of
    the endpoints that its requests go through."""

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: dict[str, float]
    shadows: dict[str, float] = {}
    prefix: bool = False
    stages: tuple[str, ...] = ()


class Schedule(msgspec.Struct, frozen=True):
    """A call of an endpoint that becomes a job at each time of a cron expression (`cron.py`)."""

    name: str
    endpoint: str
    cron: str
    timezone: str
    call: bytes  # a ScheduledCall
    token: str  # random: from it follow the ids of its jobs
    catch_up: CatchUp = "skip"  # for what was missed: nothing, or one job
    since_ms: Count = 0  # store time: it fires for what comes later
    paused: bool = False


class HttpOptions(msgspec.Struct, frozen=True):
    """Where proxies listen and on which nodes; `workers` of them share each node's socket. `middlewares` is the sha256 of their code,
    empty for none."""

    host: str = "127.0.0.1"
    port: int = 8000
    location: str = "HeadOnly"  # or EveryNode, NoServer
    middlewares: str = ""
    debug: bool = False
    workers: Count = 1
    futures_path: str = "/-/futures"  # where requests are found by their ids


class Desired(msgspec.Struct, frozen=True):
    """The state that users asked for. Versions are ordered as (epoch, version)."""

    epoch: Count = 1
    version: Count = 0
    instance: str = ""
    head_node: str = ""  # the node that started the instance; with HeadOnly it runs the proxy
    http: HttpOptions = HttpOptions()
    backends: dict[str, Backend] = {}
    endpoints: dict[str, Endpoint] = {}
    convertors: dict[str, str] = {}  # name -> sha256 of its code
    schedules: dict[str, Schedule] = {}
    forced: tuple[str, ...] = ()  # backends deleted by force: their queues and replicas do not drain
    closing: bool = False  # the instance is being shut down
    keeps_queues: bool = False  # messages that wait when it closes are left for the next instance of the namespace
    incomplete: bool = False  # the starter has not yet deployed all that it declares
    operations: tuple[str, ...] = ()  # the latest operation ids, so that a retry recognizes itself

    @property
    def codes(self) -> frozenset[str]:
        """The hashes of all code that the document names."""
        return frozenset({*(backend.code for backend in self.backends.values()), *self.convertors.values(), self.http.middlewares} - {""})

    @property
    def shards(self) -> dict[str, int]:
        """Each backend's number of queues."""
        return {name: backend.shards for name, backend in self.backends.items()}

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)


class Assignment(msgspec.Struct, frozen=True):
    """A replica that a node has to run."""

    backend: str
    node: str
    version: Count
    demand: Demand = Demand()
    gpus: tuple[Count, ...] = ()  # indexes of the node's devices


def deaths_of(backend: str) -> str:
    """Returns the name under which `Observed.problems` has too many deaths of the backend's ready replicas."""
    return f"deaths of {backend}"


class Observed(msgspec.Struct, frozen=True):
    """What the leading controller decided and saw; nodes and replicas act on it, under its epoch."""

    epoch: Count = 0
    version: Count = 0
    seen: tuple[Count, Count] = (0, 0)  # (epoch, version) of the desired document that this follows
    queues: dict[str, tuple[Count, ...]] = {}  # generations that replicas consume, the current one last
    retiring: dict[str, tuple[Count, ...]] = {}  # generations that no replica consumes any more, about to be deleted
    shards: dict[str, dict[Count, Count]] = {}  # backend -> generation -> the number of its queues, where that is not 1
    replicas: dict[str, Assignment] = {}
    draining: dict[str, Assignment] = {}  # no longer assigned but still running, so they still take their room
    proxies: tuple[str, ...] = ()  # nodes that have to run a proxy
    problems: dict[str, str] = {}  # backend -> why it does not get ready; and other names of trouble, such as `deaths_of(backend)`
    down_since: dict[str, Count] = {}  # backend -> store ms since when no replica has been ready or starting
    sealed_by: tuple[str, ...] = ()  # ids of the leader's keys, if all proxies and replicas seal their requests: replicas demand seals then
    serving: tuple[str, ...] | None = None  # backends with a ready replica; None: written by an earlier version
    job_limit_s: Count = 0  # how long a job may run on this broker; 0 for no limit beside that of its backend, or none known
    store_is_full: str = ""  # why no new jobs are taken, in words fit for strangers
    callbacks: CallbackRules = NO_CALLBACKS  # which callback URLs jobs may have

    @property
    def sealed(self) -> bool:
        """Whether replicas demand seals."""
        return bool(self.sealed_by)

    def shards_of(self, backend: str, generation: int) -> int:
        """The number of queues of that generation."""
        return self.shards.get(backend, {}).get(generation, 1)

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)
