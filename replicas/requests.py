"""What the user's code receives: a Starlette request for HTTP, an object of the same shape for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.convertors import CONVERTOR_TYPES
from starlette.datastructures import Headers
from starlette.requests import Request as StarletteRequest

from ..broker.codecs import decode_plain
from ..broker.envelope import Envelope, Meta
from ..broker.errors import UNPARSABLE, BadEnvelope, BadType, words_of


class BadBody(BadEnvelope):
    """The caller's body does not parse as what it says it is: 422, unless the handler catches this."""


class Request(StarletteRequest):
    """An HTTP request; `path_params` are typed by the route's convertors, and `.data` needs no await.

    `id` is the same in every run of the request, `attempt` the number of this run.
    """

    def __init__(self, envelope: Envelope) -> None:
        self._content_type = envelope.content_type
        super().__init__(_scope(envelope.header.meta))
        self._body = envelope.body  # Starlette reads it from here rather than from the network
        self.id = envelope.id
        self.attempt = envelope.attempt

    @property
    def data(self) -> Any:
        """The body by its content type: JSON or MessagePack decoded, text as str, other bytes as they are. Raises BadBody."""
        return _decode(self._body, self._content_type)

    async def json(self) -> Any:
        """As Starlette's; raises BadBody for malformed JSON."""
        return _decode(self._body, "application/json")


class ServeRequest:
    """A request of a handle or of a direct publisher, in the shape of a web request.

    `id` is the same in every run of the request (empty for a message without one), `attempt` the number of this run.
    """

    def __init__(self, envelope: Envelope, load: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        meta = envelope.header.meta
        self._load = load
        self._loaded: tuple[Any, dict[str, Any]] | None = None
        self._raw = b"" if envelope.header.origin else envelope.body
        self.id = envelope.id
        self.attempt = envelope.attempt
        self.method = meta.method
        self.headers = Headers(raw=list(meta.headers))
        self.path_params: dict[str, Any] = convert_params(meta)

    def __repr__(self) -> str:
        return f"<ServeRequest {self.method}>"

    @property
    def data(self) -> Any:
        """The handle's object, or the published body by its content type."""
        return self._content()[0]

    @property
    def query_params(self) -> Mapping[str, Any]:
        """The keyword arguments of `remote`, as they were; with `getlist` and `multi_items` as a web request has them."""
        return _Arguments(self._content()[1])

    async def body(self) -> Any:
        """Any object, as the seed has it; for a direct publisher's message its bytes."""
        return self._raw if self._raw else self.data

    async def json(self) -> Any:
        """The object itself; text and bytes are parsed first."""
        if isinstance(self.data, str | bytes):
            return _decode(self.data.encode() if isinstance(self.data, str) else self.data, "application/json")
        return self.data

    async def form(self) -> dict[str, Any]:
        """The dict that was sent. Raises BadType for anything else."""
        if not isinstance(self.data, dict):
            raise BadType(f"form() needs a dict, and the request carries a {type(self.data).__name__}: send a dict, or read .data")
        return self.data

    def _content(self) -> tuple[Any, dict[str, Any]]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


class _Arguments(dict[str, Any]):
    def getlist(self, key: str) -> list[Any]:
        if key not in self:
            return []
        return list(self[key]) if isinstance(self[key], list) else [self[key]]

    def multi_items(self) -> list[tuple[str, Any]]:
        return [(key, item) for key in self for item in self.getlist(key)]


def convert_params(meta: Meta) -> dict[str, Any]:
    """The typed path parameters; the text was matched by the same convertor in the proxy."""
    try:
        return {name: CONVERTOR_TYPES[convertor].convert(text) for name, convertor, text in meta.params}
    except BaseException as error:  # a convertor may be anybody's, and so may an mq header; not even SystemExit is the replica's end
        raise BadBody(f"the path parameters do not convert ({type(error).__name__}: {words_of(error)})") from error


def _scope(meta: Meta) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": meta.http_version,
        "method": meta.method,
        "scheme": meta.scheme,
        "path": meta.path,
        "raw_path": meta.path.encode(),
        "root_path": "",
        "query_string": meta.query,
        "headers": list(meta.headers),
        "path_params": convert_params(meta) if meta.params else {},
        "client": meta.client,
        "server": meta.server,
    }


def _decode(body: bytes, content_type: str) -> Any:
    try:
        if content_type == "application/json":
            return msgspec.json.decode(body)
        return decode_plain(body, content_type)
    except BadEnvelope as error:
        raise BadBody(str(error)) from error
    except UNPARSABLE as error:
        raise BadBody(f"the body does not parse as {content_type} ({error}): send what its Content-Type says") from error
