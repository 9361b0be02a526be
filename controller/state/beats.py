"""Beats, the heartbeats of nodes, proxies and replicas: what each member reports, and how old a beat may be."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ...broker.errors import UNPARSABLE
from .documents import Count
from .resources import Capacity

BEAT_EVERY_S = 1.0
PROXY_DRAIN_S = 20  # the time an ending proxy gives its open requests
SILENT_AFTER_S = 6.0  # a member whose last beat is older counts as gone


class Beat(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node, a proxy or a replica reports about itself, every BEAT_EVERY_S and at each change."""

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
    generations: tuple[Count, ...] = ()  # the queues that this replica consumes or still holds messages of
    url: str = ""
    follows: tuple[Count, Count] = (0, 0)  # a proxy's (epoch, version) of the desired document; a replica's (0, config version)
    refuses: tuple[Count, Count] = (0, 0)  # the (epoch, version) of the desired document that a proxy cannot follow
    refused: str = ""  # why it refuses; of a replica, why its code refused the config it follows
    noted: str = ""  # keys in the store that another program wrote, as this member found them
    ended: dict[str, str] = {}  # of a node: children that ended by themselves -> how
    takes_proxy: bool = False  # of a node: whether a proxy may run here
    capacity: Capacity = Capacity()
    running: Count = 0
    served: Count = 0
    # whether it seals the requests that it sends; an earlier version does not, nor does a process without the secret key
    seals: bool = False

    @property
    def field(self) -> str:
        return f"{self.kind}:{self.id}"

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)


def read_beats(fields: Mapping[str, bytes]) -> dict[str, Beat]:
    """Returns the beats by field; beats that do not parse (another version's) are left out."""
    beats: dict[str, Beat] = {}
    for field, raw in fields.items():
        try:
            beats[field] = msgspec.json.decode(raw, type=Beat)
        except UNPARSABLE:
            continue
    return beats
