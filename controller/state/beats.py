"""Beats, the heartbeats of supervisors, nodes, proxies and replicas: what each member reports, and how old a beat may be."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from ...broker.errors import UNPARSABLE
from .documents import Count
from .resources import Capacity

BEAT_EVERY_S = 1.0
PROXY_DRAIN_S = 20  # the time an ending proxy gives its open requests
SILENT_AFTER_S = 6.0  # a member whose last beat is older counts as gone


class MemberState(StrEnum):
    """The state that a member reports."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"  # in its last beat: it has ended


class Kind(StrEnum):
    """The kinds of members, in the order in which they are shown."""

    SUPERVISOR = "supervisor"
    NODE = "node"
    PROXY = "proxy"
    REPLICA = "replica"


class _Beat(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind"):
    """The fields of every beat. A member writes one every BEAT_EVERY_S and at each change."""

    id: str
    at: Count  # store ms
    pid: Count = 0
    host: str = ""
    state: MemberState = MemberState.READY
    error: str = ""
    node: str = ""
    external: bool = False
    url: str = ""
    noted: str = ""  # keys that another program has overwritten, as far as this member met them

    @property
    def kind(self) -> str:
        """One of `Kind`, or a kind that only another version knows."""
        return str(self.__struct_config__.tag)

    @property
    def field(self) -> str:
        return f"{self.kind}:{self.id}"

    def is_recent(self, now_ms: int) -> bool:
        return now_ms - self.at < SILENT_AFTER_S * 1000

    def is_alive(self, now_ms: int) -> bool:
        """Whether the beat is recent and does not say that the member has ended."""
        return self.is_recent(now_ms) and self.state is not MemberState.FAILED

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)


class SupervisorBeat(_Beat, frozen=True, tag=Kind.SUPERVISOR.value):
    """The beat of a detached instance's supervisor."""


class NodeBeat(_Beat, frozen=True, tag=Kind.NODE.value):
    """The beat of a node. Its `url` shows metrics."""

    ended: dict[str, str] = {}  # children that ended by themselves -> how
    takes_proxy: bool = False  # whether a proxy may run there
    capacity: Capacity = Capacity()
    running: Count = 0  # replicas


class ProxyBeat(_Beat, frozen=True, tag=Kind.PROXY.value):
    """The beat of a proxy. Its `url` is where it serves."""

    follows: tuple[Count, Count] = (0, 0)  # the (epoch, version) of the desired document
    refuses: tuple[Count, Count] = (0, 0)  # that of a document that it cannot follow
    refused: str = ""  # why
    seal_key: str = ""  # the id of the key that seals its requests: an earlier version does not seal, nor does a process without a key


class ReplicaBeat(_Beat, frozen=True, tag=Kind.REPLICA.value):
    """The beat of a replica. `follows` is (0, config version), and `refused` says why its code refused that config."""

    backend: str = ""
    version: Count = 0
    generations: tuple[Count, ...] = ()  # of the queue: those that it consumes or still holds messages of
    follows: tuple[Count, Count] = (0, 0)
    refused: str = ""
    running: Count = 0
    served: Count = 0
    seal_key: str = ""
    takes: bool = False  # whether it may have taken requests: then one of them may be what it has died of, ready or not
    is_app: bool = False  # whether its code is an ASGI app
    convertors: tuple[Count, Count] | None = None  # (epoch, version) of the document whose convertors it has; None: it follows none yet
    convertor_error: str = ""  # why it cannot make one of those


class OtherBeat(_Beat, frozen=True, tag="other"):
    """A beat of a kind that this version does not know. It is shown and otherwise ignored."""

    said: str = ""

    @property
    def kind(self) -> str:
        return self.said


Beat = SupervisorBeat | NodeBeat | ProxyBeat | ReplicaBeat | OtherBeat
B = TypeVar("B", SupervisorBeat, NodeBeat, ProxyBeat, ReplicaBeat)


def read_beats(fields: Mapping[str, bytes]) -> dict[str, Beat]:
    """Returns the beats by field; beats that do not parse (another version's) are left out."""
    beats: dict[str, Beat] = {}
    for field, raw in fields.items():
        try:
            beats[field] = _decode(raw)
        except msgspec.ValidationError:
            if (other := _read_other(raw)) is not None:
                beats[field] = other
        except UNPARSABLE:
            continue
    return beats


def _read_other(raw: bytes) -> OtherBeat | None:
    try:
        said = msgspec.json.decode(raw, type=dict[str, Any])
        kind = str(said.get("kind", ""))
        return None if kind in list(Kind) else msgspec.convert({**said, "kind": "other", "said": kind}, OtherBeat)
    except UNPARSABLE:
        return None


def beats_of(beats: Mapping[str, Beat], kind: type[B]) -> list[B]:
    return [beat for beat in beats.values() if isinstance(beat, kind)]


def living(beats: Mapping[str, Beat], kind: type[B], now_ms: int) -> dict[str, B]:
    """Returns the members of a kind that are alive, by id."""
    return {beat.id: beat for beat in beats_of(beats, kind) if beat.is_alive(now_ms)}


_decode = msgspec.json.Decoder(Beat).decode
