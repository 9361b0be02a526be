"""Handles: the Python callers of one endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from .broker.envelope import Meta
from .broker.errors import BadType
from .futures import Future

Send = Callable[[str, Meta, Any, dict[str, Any]], Future]
"""(endpoint, meta, data, keyword arguments) -> its future."""


@dataclass(frozen=True, slots=True)
class HandleOptions:
    """What `options()` sets; each handle has its own."""

    method_name: str = "__call__"
    http_method: str = "GET"
    http_headers: Mapping[str, str] = field(default_factory=dict)


class _BaseHandle:
    """Clean for each `get_handle`; `options` makes another one and leaves this as it is."""

    def __init__(self, endpoint: str, send: Send, options: HandleOptions | None = None) -> None:
        self._endpoint = endpoint
        self._send_request = send
        self._options = options or HandleOptions()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(endpoint={self._endpoint!r})"

    def options(self, **options: Any) -> Self:
        """A handle with these set: method_name, http_method, http_headers. Later ones override earlier ones."""
        try:
            merged = replace(self._options, **options)
        except TypeError:
            known = ", ".join(HandleOptions.__dataclass_fields__)
            raise BadType(f"a handle has no option {', '.join(options)}: there are {known}") from None
        return type(self)(self._endpoint, self._send_request, merged)

    def _send(self, data: Any, arguments: dict[str, Any]) -> Future:
        options = self._options
        headers = tuple((name.lower().encode(), value.encode()) for name, value in options.http_headers.items())
        call = "" if options.method_name == "__call__" else options.method_name
        meta = Meta(method=options.http_method.upper(), headers=headers, endpoint=self._endpoint, call=call)
        return self._send_request(self._endpoint, meta, data, arguments)


class Handle(_BaseHandle):
    """For plain code, in any thread: `ref = handle.remote(x)`, then `serve.get(ref)` or `ref.result()`."""

    def remote(self, data: Any = None, **arguments: Any) -> Future:
        """A future at once. The handler sees `data` as `request.data`, and the keyword arguments as `request.query_params`.

        Raises NotEncodable for what cannot travel. What happens to the request later is told by the future.
        """
        return self._send(data, arguments)


class AsyncHandle(_BaseHandle):
    """For coroutines: `ref = await handle.remote(x)`, then `await ref`."""

    async def remote(self, data: Any = None, **arguments: Any) -> Future:
        """As `Handle.remote`."""
        return self._send(data, arguments)
