"""The two documents of an instance: the desired state (written by clients) and the observed state (written by the leading controller).

Both are JSON in the store, so that an operator can read them with `redis-cli get`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import pydantic

from ...broker.errors import UNPARSABLE, BadEnvelope
from ...broker.store import WRONG_TYPE
from .config import BackendConfig
from .resources import ActorOptions, Demand

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
T = TypeVar("T")


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

    @cached_property
    def config(self) -> BackendConfig:
        """For reading only, since all readers in this process share it."""
        return BackendConfig.model_validate(self.settings)

    @property
    def shards(self) -> int:
        """The number of queues of its current generation. Cheaper than `config`, since each follower asks at every change."""
        return int(self.settings.get("queue_shards", 1))


class Endpoint(msgspec.Struct, frozen=True):
    """A named target of traffic. With `route` None only handles reach it."""

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: dict[str, float]
    shadows: dict[str, float] = {}


class HttpOptions(msgspec.Struct, frozen=True):
    """Where proxies listen and on which nodes; `workers` of them share each node's socket. `middlewares` is the sha256 of their code,
    empty for none."""

    host: str = "127.0.0.1"
    port: int = 8000
    location: str = "HeadOnly"  # or EveryNode, NoServer
    middlewares: str = ""
    debug: bool = False
    workers: Count = 1


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

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Desired:
        """Raises BadEnvelope for bytes that are no such document, or one that contradicts itself."""
        if raw is None:
            return cls()
        global _last
        last = _last  # replaced as a whole, since several threads read
        if raw != last.raw:
            last = _last = _read_changes(raw, last) or _read_all(raw)
        return last.desired


class Assignment(msgspec.Struct, frozen=True):
    """A replica that a node has to run."""

    backend: str
    node: str
    version: Count
    demand: Demand = Demand()
    gpus: tuple[Count, ...] = ()  # indexes of the node's devices


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
    problems: dict[str, str] = {}  # backend (or "proxy on <node>") -> why it is not as desired
    down_since: dict[str, Count] = {}  # backend -> store ms since when no replica has been ready or starting
    sealed: bool = False  # all proxies and replicas seal their requests, so replicas demand seals
    serving: tuple[str, ...] | None = None  # backends with a ready replica; None: written by an earlier version

    def shards_of(self, backend: str, generation: int) -> int:
        """The number of queues of that generation."""
        return self.shards.get(backend, {}).get(generation, 1)

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Observed:
        """Raises BadEnvelope for bytes that are no such document."""
        global _last_observed
        if raw is None:
            return cls()
        last = _last_observed
        if raw != last[0]:
            last = _last_observed = raw, decode_document(raw, cls, "observed state")
        return last[1]


_last_observed: tuple[bytes | None, Observed] = None, Observed()  # in the embedded form all followers read the same


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


class _Read(NamedTuple):
    """The desired document that this process has read last, with its entries by their bytes. Whoever follows it decodes and checks only
    what has changed since; in the embedded form all followers share one copy."""

    raw: bytes | None
    desired: Desired
    backends: dict[bytes, Backend]
    endpoints: dict[bytes, Endpoint]


_last = _Read(None, Desired(), {}, {})


class _Split(Desired, frozen=True):
    """A desired document whose entries are not decoded yet."""

    backends: dict[str, msgspec.Raw] = {}  # type: ignore[assignment]
    endpoints: dict[str, msgspec.Raw] = {}  # type: ignore[assignment]


def _read_changes(raw: bytes, before: _Read) -> _Read | None:
    """Returns None for a document in which anything is wrong."""
    try:
        split = msgspec.json.decode(raw, type=_Split)
        raw_backends = {name: bytes(found) for name, found in split.backends.items()}
        raw_endpoints = {name: bytes(found) for name, found in split.endpoints.items()}
        backends = {name: before.backends.get(found) or _decode_backend(found) for name, found in raw_backends.items()}
        endpoints = {name: before.endpoints.get(found) or _decode_endpoint(found) for name, found in raw_endpoints.items()}
        new = Desired(
            backends=backends, endpoints={name: one for name, one in endpoints.items() if raw_endpoints[name] not in before.endpoints}
        )
        if _contradiction(new):
            return None
    except UNPARSABLE:
        return None
    known = backends.keys()
    for name, endpoint in endpoints.items():
        if endpoint.name != name or not (endpoint.traffic.keys() <= known and endpoint.shadows.keys() <= known):
            return None
    fields = {name: getattr(split, name) for name in Desired.__struct_fields__}
    desired = Desired(**{**fields, "backends": backends, "endpoints": endpoints})
    return _Read(
        raw,
        desired,
        {found: backends[name] for name, found in raw_backends.items()},
        {found: endpoints[name] for name, found in raw_endpoints.items()},
    )


def _read_all(raw: bytes) -> _Read:
    """Raises BadEnvelope with a sentence that says what is wrong, and where."""
    desired = decode_document(raw, Desired, "desired state")
    if wrong := _contradiction(desired):
        raise BadEnvelope(f"the desired state in the store contradicts itself: {wrong}")
    return _Read(raw, desired, {}, {})


_decode_backend = msgspec.json.Decoder(Backend).decode
_decode_endpoint = msgspec.json.Decoder(Endpoint).decode


def _contradiction(desired: Desired) -> str:
    """Returns how the document contradicts itself, or an empty string. Its readers rely on the rules checked here."""
    for name, backend in desired.backends.items():
        try:
            _ = backend.config
        except pydantic.ValidationError as error:
            return f"backend {name!r} has a bad config ({error.errors()[0]['msg']})"
    for name, endpoint in desired.endpoints.items():
        if missing := {*endpoint.traffic, *endpoint.shadows} - desired.backends.keys():
            return f"endpoint {name!r} sends to {min(missing)!r}, which is no backend"
        if min(endpoint.traffic.values(), default=0) < 0 or not 0.999 < sum(endpoint.traffic.values()) < 1.001:
            return f"the weights of endpoint {name!r} are not 0 or more, and 1 altogether"
    named: list[tuple[str, Any]] = [*desired.backends.items(), *desired.endpoints.items()]
    return next((f"{name!r} is called {thing.name!r} inside" for name, thing in named if thing.name != name), "")
