"""Encodes results of user code: for a handle the value itself, for everybody else the body of an HTTP response."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import msgspec
from starlette.responses import Response

from ..broker.envelope import MAX_HEAD_BYTES, Pairs
from ..broker.errors import NotEncodable
from ..broker.results import ErrorInfo, Result
from ..broker.values.carried import BYTES_OR_NONE
from ..broker.values.codecs import JSON, TEXT, encode_value
from ..broker.values.signing import SealScope, Signer
from .jsonable import to_json


def value_result(value: object, backend: str, future_id: str, signer: Signer) -> Result:
    """Returns the result for a handle, whose caller gets an equal object. Raises NotEncodable."""
    content_type, body = encode_value(value, signer, SealScope("result", backend, future_id))
    return Result(backend=backend, content_type=content_type, body=body)


def plain_result(value: object, backend: str) -> Result:
    """Returns the result for HTTP and direct publishers: None is empty, bytes and str are text, a Response stays as it is, the rest is
    JSON. Raises NotEncodable."""
    if isinstance(value, Response):
        return _response_result(value, backend)
    if value is None:
        return Result(backend=backend, content_type=BYTES_OR_NONE)
    if isinstance(value, bytes | bytearray | memoryview):
        return Result(backend=backend, content_type=BYTES_OR_NONE, body=bytes(value))
    if isinstance(value, str):
        return Result(backend=backend, content_type=TEXT, body=str.encode(value))
    try:
        return Result(backend=backend, content_type=JSON, body=to_json(value))
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        remedy = ", or yield the values" if isinstance(value, Iterator | AsyncIterator) else ""
        raise NotEncodable(
            f"the handler returned a {type(value).__name__} that is no JSON ({error}): return plain data or a Response{remedy}"
        ) from error


def _response_result(response: Response, backend: str) -> Result:
    body = bytes(response.body)
    headers: list[tuple[bytes, bytes]] = []
    content_type = b""
    for name, value in response.raw_headers:
        match name.lower():
            case b"content-type":
                content_type = value
            case b"content-length" if body or value == b"0":
                pass  # the proxy sets it; only an answer to HEAD keeps it, since it is the length of the answer to GET
            case _:
                headers.append((name, value))
    if wrong := _no_answer(response.status_code, content_type, tuple(headers)):
        return Result(status=500, backend=backend, error=ErrorInfo(type="mqserve.NotEncodable", message=wrong))
    return Result(
        status=response.status_code, backend=backend, content_type=content_type.decode("latin-1"), headers=tuple(headers), body=body
    )


def response_head(response: Response, backend: str) -> tuple[Result, int | None]:
    """Returns the head of a response that is streamed, and the length of its body if it says one. Raises NotEncodable for what cannot be
    sent."""
    lengths = [value for name, value in response.raw_headers if name.lower() == b"content-length"]
    response.raw_headers = [pair for pair in response.raw_headers if pair[0].lower() != b"content-length"]
    head = _response_result(response, backend)
    if head.error is not None:
        raise NotEncodable(head.error.message)
    return head, int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else None


def _no_answer(status: int, content_type: bytes, headers: Pairs) -> str:
    """Returns why a Response cannot be sent, or an empty string."""
    if not 200 <= status <= 599 or len(content_type) > 255:
        return (
            f"the handler returned a Response that is no answer, with status {status} (200 to 599) and a content type of "
            f"{len(content_type)} bytes (255 at most)"
        )
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEAD_BYTES:
        return f"the handler returned a Response with {size} bytes of headers, and the limit is {MAX_HEAD_BYTES}: send less, or in the body"
    return ""
