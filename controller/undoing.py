"""Undoing a change of many parts: a pure function from two versions of the desired document to the change that leads back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from .changes import Change, needs_new_queue
from .state.documents import Backend, Desired, Endpoint

T = TypeVar("T")


def undo(before: Desired, made: Desired, reason: str) -> Change:
    """Restores what `made` changed of `before`, except what somebody changed meanwhile. `reason` is noted at backends that get their old
    code back."""

    def change(desired: Desired) -> Desired:
        restored = _restored(before.backends, made.backends, desired.backends, _deployed)
        backends = {name: _as_next(backend, desired, reason) for name, backend in restored.items()}
        endpoints = _restored(before.endpoints, made.endpoints, desired.endpoints, _itself)
        endpoints = _without_dangling(endpoints, desired.endpoints, {*backends, *desired.backends})
        endpoints = _with_stages(endpoints, desired.endpoints)
        for endpoint in endpoints.values():  # of somebody else, who uses a backend of ours
            backends |= {name: desired.backends[name] for name in (*endpoint.traffic, *endpoint.shadows) if name not in backends}
        changed_http = made.http.middlewares != before.http.middlewares and desired.http.middlewares == made.http.middlewares
        http = msgspec.structs.replace(desired.http, middlewares=before.http.middlewares) if changed_http else desired.http
        convertors = _restored(before.convertors, made.convertors, desired.convertors, _itself)
        schedules = _restored(before.schedules, made.schedules, desired.schedules, _itself)
        forced = tuple(name for name in desired.forced if name not in backends)
        return msgspec.structs.replace(
            desired, backends=backends, endpoints=endpoints, http=http, convertors=convertors, schedules=schedules, forced=forced
        )

    return change


def _restored(before: Mapping[str, T], made: Mapping[str, T], now: Mapping[str, T], identity: Callable[[T | None], Any]) -> dict[str, T]:
    """Returns `now` with the entries of `before` where `made` has others that still stand; `identity(entry)` is what is compared. The order
    is that of `before`, since the older of two endpoints wins."""

    def is_undone(name: str) -> bool:
        was, became, there = identity(before.get(name)), identity(made.get(name)), identity(now.get(name))
        return bool(was != became and there == became)

    names = (*before, *(name for name in now if name not in before))
    entries = ((name, before.get(name) if is_undone(name) else now.get(name)) for name in names)
    return {name: entry for name, entry in entries if entry is not None}


def _itself(entry: T | None) -> T | None:
    return entry


def _deployed(backend: Backend | None) -> tuple[int, int] | None:
    """Names what clients deployed: the controller may give a backend another generation of its queue meanwhile."""
    return None if backend is None else (backend.version, backend.config_version)


def _as_next(backend: Backend, desired: Desired, reason: str) -> Backend:
    """The backend as it follows on what stands in the document now: counts only grow."""
    now = desired.backends.get(backend.name)
    if now is None:  # it was deleted; no version is used twice
        return msgspec.structs.replace(backend, version=desired.version + 1)
    if now is backend or _deployed(now) == _deployed(backend):
        return backend
    return msgspec.structs.replace(
        backend,
        generation=now.generation + int(needs_new_queue(now.config, backend.config)),
        config_version=now.config_version + int(now.settings != backend.settings),
        rolled_back=reason if now.version != backend.version else backend.rolled_back,
    )


def _without_dangling(restored: Mapping[str, Endpoint], now: Mapping[str, Endpoint], backends: set[str]) -> dict[str, Endpoint]:
    """Keeps today's endpoint, or none, where somebody has meanwhile deleted a backend of the one before, or taken its route."""
    taken = {
        endpoint.route: endpoint.name for endpoint in now.values() if endpoint.route is not None and restored.get(endpoint.name) == endpoint
    }
    kept: dict[str, Endpoint] = {}
    for name, endpoint in restored.items():
        has_room = endpoint.route is None or taken.get(endpoint.route, name) == name
        is_possible = has_room and {*endpoint.traffic, *endpoint.shadows} <= backends
        found = endpoint if is_possible else now.get(name)
        if found is not None:
            kept[name] = found
    return kept


def _with_stages(restored: Mapping[str, Endpoint], now: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
    """Leaves out a restored pipeline whose stages somebody has deleted, and keeps the stages of one that somebody else has made."""
    kept: dict[str, Endpoint] = dict(restored)
    for name, endpoint in restored.items():
        for stage in endpoint.stages:
            if stage not in kept and stage in now and now.get(name) == endpoint:
                kept[stage] = now[stage]
    return {name: endpoint for name, endpoint in kept.items() if set(endpoint.stages) <= kept.keys()}
