"""Chooses the backend for a request of an endpoint, and the backends that get copies."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import NamedTuple

from ...broker.pipelines import Stages
from .documents import Endpoint


def entry_of(endpoint: Endpoint, endpoints: Mapping[str, Endpoint]) -> Endpoint:
    """Returns the endpoint whose traffic decides where a request goes first: that of the first stage of a pipeline, else its own."""
    return endpoints[endpoint.stages[0]] if endpoint.stages else endpoint


def stages_of(endpoint: Endpoint, shard_key: str) -> Stages | None:
    """Returns what a request goes through if the endpoint is a pipeline."""
    return Stages(endpoint.name, endpoint.stages, shard_key) if endpoint.stages else None


def longest_s(pipeline: Endpoint, endpoints: Mapping[str, Endpoint], timeouts_s: Mapping[str, float]) -> float:
    """Returns how long a request of a pipeline may be awaited: as long as those of all its stages one after the other. `timeouts_s` has
    those of the backends."""
    stages = [endpoints[name].traffic for name in pipeline.stages if name in endpoints]
    return sum(max(timeouts_s[backend] for backend in traffic) for traffic in stages)


class Choice(NamedTuple):
    """The backend of one request, and the backends of its copies."""

    backend: str
    shadows: list[str]


def choose(endpoint: Endpoint, shard_key: str) -> Choice:
    """Chooses at random, or by the shard key: then the same everywhere, for as long as the traffic does not change.

    Each shadow has a draw of its own. Ray Serve 1.x uses one draw for both, which ties a shadow's sample to one side of a split.
    """
    if len(endpoint.traffic) == 1 and not endpoint.shadows:
        return Choice(next(iter(endpoint.traffic)), [])
    backend = choose_backend(endpoint.traffic, _draw(shard_key, ""))
    return Choice(backend, [name for name, part in endpoint.shadows.items() if _draw(shard_key, name) < part])


def _draw(shard_key: str, purpose: str) -> float:
    """Returns a number in [0, 1)."""
    if not shard_key:
        return random.random()
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{shard_key}".encode() if purpose else shard_key.encode()).digest()[:8]) / 2**64


def choose_backend(traffic: Mapping[str, float], value: float) -> str:
    """Returns the backend for `value` in [0, 1): names sorted, the first whose cumulative weight exceeds it, as in Ray Serve 1.x."""
    total = 0.0
    names = sorted(name for name, weight in traffic.items() if weight > 0)
    for name in names:
        total += traffic[name]
        if value < total:
            return name
    return names[-1]
