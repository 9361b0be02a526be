"""Beats: what each node, proxy and replica says of itself, and how old it may be."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ...broker.errors import UNPARSABLE
from .documents import Count
from .resources import Capacity

BEAT_EVERY_S = 1.0
PROXY_DRAIN_S = 20  # what a proxy gives its open requests when it ends
SILENT_AFTER_S = 6.0  # a member that has not beaten for this long is gone


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


def read_beats(fields: Mapping[str, bytes]) -> dict[str, Beat]:
    """By field; what does not parse (another version's) is left out."""
    beats: dict[str, Beat] = {}
    for field, raw in fields.items():
        try:
            beats[field] = msgspec.json.decode(raw, type=Beat)
        except UNPARSABLE:
            continue
    return beats
