"""What a client reads of an instance: its endpoints and pipelines as plain data, and the ids of requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..broker.envelope import endpoint_key
from ..broker.errors import BadType, BadValue, UnknownEndpoint
from ..controller.state.beats import MemberState, ProxyBeat, living, read_beats
from ..controller.state.documents import Desired

_SHOWN_NAMES = 10


def unknown_endpoint(name: str, known: Collection[str]) -> UnknownEndpoint:
    """Returns the error, with a note for whoever called: the message may reach a web client, which is not to learn the other names."""
    error = UnknownEndpoint(f"Endpoint '{name}' does not exist.")
    shown = ", ".join(sorted(known)[:_SHOWN_NAMES]) + (f" and {len(known) - _SHOWN_NAMES} more" if len(known) > _SHOWN_NAMES else "")
    error.add_note(f"Known: {shown or 'none yet'}. Deploy it first.")
    return error


def endpoints_of(desired: Desired) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "route": endpoint.route,
            "methods": list(endpoint.methods),
            "traffic": dict(endpoint.traffic),
            "shadows": dict(endpoint.shadows),
            **({"prefix": True} if endpoint.prefix else {}),
        }
        for name, endpoint in desired.endpoints.items()
        if not endpoint.stages
    }


def pipelines_of(desired: Desired) -> dict[str, dict[str, Any]]:
    return {
        name: {"route": endpoint.route, "methods": list(endpoint.methods), "stages": list(endpoint.stages)}
        for name, endpoint in desired.endpoints.items()
        if endpoint.stages
    }


def url_among(fields: Mapping[str, bytes], now_ms: int) -> str:
    """Returns the URL of the first live proxy, the instance's own before external ones; empty if there is none."""
    proxies = sorted(living(read_beats(dict(fields)), ProxyBeat, now_ms).values(), key=lambda beat: (beat.external, beat.id))
    return next((beat.url for beat in proxies if beat.state is MemberState.READY), "")


def check_id(what: str, read_as: str, given: object) -> None:
    """Raises BadType for what is no id."""
    if not isinstance(given, str):
        raise BadType(f"the id of a {what} is a text of 32 characters, not {given!r}: see `{read_as}`")


def key_of(own_id: str, backend: str | None, endpoint: str | None) -> str:
    """Returns the id under which the result stands. Raises BadValue."""
    if backend is not None and endpoint is not None:
        raise BadValue("give the backend or the endpoint that the message was published to, not both")
    if endpoint is not None:
        return endpoint_key(endpoint, own_id)
    return own_id if backend is None else f"{backend}/{own_id}"
