"""Decides what `/-/readyz` says: not ready only while requests cannot be answered, and until the declared routes are served for the first
time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..broker.queue import Queue
from ..broker.store import Store
from ..controller.state.documents import Desired, Endpoint, Observed

DOWN_AFTER_MS = 10_000  # a backend without a replica for this long no longer delays readiness: its callers get an error


class Readiness:
    """The readiness of one proxy. Broker and store are checked each time; whether all routes are served is established once per instance:
    a backend that loses its replicas later is no reason to take a proxy with all its other routes out of service."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._desired: Desired | None = None
        self._observed = Observed()
        self._served = ""  # the instance whose routes were all served at least once
        self._has_ended = False

    def __repr__(self) -> str:
        return f"<Readiness, {self._waits_for() or 'served'}>"

    def follow(self, desired: Desired | None, observed: Observed | None) -> None:
        """Takes the current documents; the proxy serves their routes."""
        if desired is None:  # the document was lost or cleared
            self._has_ended = self._desired is not None and self._desired.closing
            return
        self._desired, self._observed, self._has_ended = desired, observed or Observed(), False

    def see(self, observed: Observed) -> None:
        """Notes which backends serve now. The routes may still be those of an earlier version."""
        self._observed = observed

    def look(self, queue: Queue) -> tuple[bool, dict[str, Any]]:
        """Returns (ready, facts that are fit for strangers)."""
        why: dict[str, str] = {}
        if queue.down_s:
            why["broker"] = queue.trouble
        if trouble := self._store.health.trouble:
            why["store"] = trouble
        if waits_for := self._waits_for():
            why["routes"] = waits_for
        facts = {name: name not in why for name in ("broker", "store", "routes")}
        return not why, {**facts, "why": why} if why else facts

    def _waits_for(self) -> str:
        if self._desired is None:
            return "no instance is there yet"
        if self._has_ended:
            return "the instance was shut down"
        if self._desired.instance == self._served:
            return ""
        missing = _missing(self._desired, self._observed, self._store.now_ms())
        if not missing:
            self._served = self._desired.instance
        return missing


def _missing(desired: Desired, observed: Observed, now_ms: int) -> str:
    """Names a declared route that is not served yet, in words fit for strangers; an empty string if all are served."""
    if desired.incomplete:
        return "not all that was declared is deployed yet"
    if observed.serving is None:  # written by an older controller, which does not report it
        return ""
    waiting = [
        name for name in _routed(desired.endpoints.values()) if name not in observed.serving and not _is_down(observed, name, now_ms)
    ]
    return f"no replica is ready yet of {len(waiting)} backends that have a route" if waiting else ""


def _routed(endpoints: Iterable[Endpoint]) -> set[str]:
    """The backends that HTTP requests go to."""
    return {name for endpoint in endpoints if endpoint.route is not None for name, weight in endpoint.traffic.items() if weight > 0}


def _is_down(observed: Observed, name: str, now_ms: int) -> bool:
    return name in observed.down_since and now_ms - observed.down_since[name] > DOWN_AFTER_MS
