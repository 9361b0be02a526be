"""Reads the two documents. Each process keeps the last ones that it has read, so that a follower decodes and checks only what has changed
since. In the embedded form all followers share one copy, which nobody may change."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import msgspec
import pydantic

from ...broker.errors import UNPARSABLE, BadEnvelope
from ...broker.store import WRONG_TYPE
from .documents import Backend, Desired, Endpoint, Observed

T = TypeVar("T")


def read_desired(raw: bytes | None) -> Desired:
    """Raises BadEnvelope for bytes that are no such document, or one that contradicts itself."""
    return Desired() if raw is None else _desired.read(raw)


def read_observed(raw: bytes | None) -> Observed:
    """Raises BadEnvelope for bytes that are no such document."""
    return Observed() if raw is None else _observed.read(raw)


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


class _ObservedReader:
    def __init__(self) -> None:
        self._last: tuple[bytes | None, Observed] = None, Observed()  # replaced as a whole, since several threads read

    def read(self, raw: bytes) -> Observed:
        last = self._last
        if raw != last[0]:
            last = self._last = raw, decode_document(raw, Observed, "observed state")
        return last[1]


class _Read(NamedTuple):
    """A desired document with its entries by their bytes."""

    raw: bytes | None
    desired: Desired
    backends: dict[bytes, Backend]
    endpoints: dict[bytes, Endpoint]


class _Split(Desired, frozen=True):
    """A desired document whose entries are not decoded yet."""

    backends: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)  # type: ignore[assignment]
    endpoints: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)  # type: ignore[assignment]


class _DesiredReader:
    def __init__(self) -> None:
        self._last = _Read(None, Desired(), {}, {})  # replaced as a whole, since several threads read

    def read(self, raw: bytes) -> Desired:
        last = self._last
        if raw != last.raw:
            last = self._last = _read_changes(raw, last) or _read_all(raw)
        return last.desired


_desired, _observed = _DesiredReader(), _ObservedReader()
_decode_backend = msgspec.json.Decoder(Backend).decode
_decode_endpoint = msgspec.json.Decoder(Endpoint).decode


def _read_changes(raw: bytes, before: _Read) -> _Read | None:
    """Returns None for a document in which anything is wrong: `_read_all` then says what, and where."""
    try:
        split = msgspec.json.decode(raw, type=_Split)
        raw_backends = {name: bytes(found) for name, found in split.backends.items()}
        raw_endpoints = {name: bytes(found) for name, found in split.endpoints.items()}
        backends = {name: before.backends.get(found) or _decode_backend(found) for name, found in raw_backends.items()}
        endpoints = {name: before.endpoints.get(found) or _decode_endpoint(found) for name, found in raw_endpoints.items()}
    except UNPARSABLE:
        return None
    fields = {name: getattr(split, name) for name in Desired.__struct_fields__}
    desired = Desired(**{**fields, "backends": backends, "endpoints": endpoints})
    if _contradiction(desired, before.desired):
        return None
    return _Read(
        raw,
        desired,
        {found: backends[name] for name, found in raw_backends.items()},
        {found: endpoints[name] for name, found in raw_endpoints.items()},
    )


def _read_all(raw: bytes) -> _Read:
    """Raises BadEnvelope with a sentence that says what is wrong, and where."""
    desired = decode_document(raw, Desired, "desired state")
    if wrong := _contradiction(desired, Desired()):
        raise BadEnvelope(f"the desired state in the store contradicts itself: {wrong}")
    return _Read(raw, desired, {}, {})


def _contradiction(desired: Desired, before: Desired) -> str:
    """Returns how the document contradicts itself, or an empty string. Its readers rely on the rules checked here. What an entry says by
    itself was checked with `before` if it is the same one."""
    for name, backend in desired.backends.items():
        if backend is not before.backends.get(name):
            try:
                _ = backend.config
            except pydantic.ValidationError as error:
                return f"backend {name!r} has a bad config ({error.errors()[0]['msg']})"
    known = desired.backends.keys()
    for name, endpoint in desired.endpoints.items():
        if not (endpoint.traffic.keys() <= known and endpoint.shadows.keys() <= known):
            return f"endpoint {name!r} sends to {min({*endpoint.traffic, *endpoint.shadows} - known)!r}, which is no backend"
        for stage in endpoint.stages:
            if stage not in desired.endpoints or desired.endpoints[stage].stages:
                return f"pipeline {name!r} has the stage {stage!r}, which is no endpoint"
        if endpoint is not before.endpoints.get(name) and not endpoint.stages and not _are_shares(endpoint.traffic):
            return f"the weights of endpoint {name!r} are not 0 or more, and 1 altogether"
    named: list[tuple[str, Any]] = [*desired.backends.items(), *desired.endpoints.items(), *desired.schedules.items()]
    return next((f"{name!r} is called {thing.name!r} inside" for name, thing in named if thing.name != name), "")


def _are_shares(traffic: dict[str, float]) -> bool:
    return min(traffic.values(), default=0) >= 0 and 0.999 < sum(traffic.values()) < 1.001
