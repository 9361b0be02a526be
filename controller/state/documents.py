"""The two documents of an instance: what is wanted (written by clients) and what is seen (written by the leading controller).

Both are JSON in the store, so that an operator can read them with `redis-cli get`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
import pydantic

from ...broker.errors import UNPARSABLE, BadEnvelope
from ...broker.store import WRONG_TYPE
from .config import BackendConfig
from .resources import ActorOptions, Demand

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
T = TypeVar("T")


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
    keeps_queues: bool = False  # what waits in them at its end is for the next instance of the namespace
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
