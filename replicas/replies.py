"""Results of user code to bytes: for a handle the value itself, for everybody else what HTTP would say."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterable, Iterable
from typing import Any

import msgspec
import pydantic
from starlette.responses import Response, StreamingResponse

from ..broker import pickling
from ..broker.codecs import BYTES, JSON, TEXT, encode_value
from ..broker.errors import NotEncodable
from ..broker.results import ErrorInfo, Result
from ..broker.signing import Claim, Signer
from .handler import NoSuchMethod
from .requests import BadBody


def value_result(value: object, backend: str, future_id: str, signer: Signer) -> Result:
    """For a handle: the caller gets an equal object. Raises NotEncodable."""
    content_type, body = encode_value(value, signer, Claim("result", backend, future_id))
    return Result(backend=backend, content_type=content_type, body=body)


def plain_result(value: object, backend: str) -> Result:
    """For HTTP and direct publishers: None is empty, bytes and str are text, a Response is itself, the rest is JSON."""
    if isinstance(value, Response):
        return _response_result(value, backend)
    if value is None:
        return Result(backend=backend, content_type="text/plain")
    if isinstance(value, bytes):
        return Result(backend=backend, content_type="text/plain", body=value)
    if isinstance(value, str):
        return Result(backend=backend, content_type=TEXT, body=value.encode())
    try:
        return Result(backend=backend, content_type=JSON, body=_encode_json(value))
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise NotEncodable(
            f"the handler returned a {type(value).__name__} that is no JSON ({error}): return plain data or a Response"
        ) from error


def error_result(error: BaseException, backend: str, future_id: str, signer: Signer) -> Result:
    """An exception of the user's is a result too."""
    status = 422 if isinstance(error, BadBody) else 404 if isinstance(error, NoSuchMethod) else 500
    info = ErrorInfo(
        type=_public_name(type(error)),
        message=_writable(_message(error)),
        traceback=_writable("".join(traceback.format_exception(error))),
        sealed=_seal_exception(error, backend, future_id, signer),
    )
    return Result(status=status, backend=backend, error=info)


async def collect_stream(response: StreamingResponse) -> Response:
    """A streamed response, whole: results travel in one piece."""
    chunks: list[bytes] = []
    iterator: Any = response.body_iterator
    if isinstance(iterator, AsyncIterable):
        async for chunk in iterator:
            chunks.append(chunk.encode() if isinstance(chunk, str) else bytes(chunk))
    elif isinstance(iterator, Iterable):
        chunks.extend(chunk.encode() if isinstance(chunk, str) else bytes(chunk) for chunk in iterator)
    whole = Response(b"".join(chunks), status_code=response.status_code)
    whole.raw_headers = [pair for pair in response.raw_headers if pair[0] != b"content-length"]
    return whole


def _response_result(response: Response, backend: str) -> Result:
    headers = tuple((name, value) for name, value in response.raw_headers if name not in (b"content-length", b"content-type"))
    content_type = response.headers.get("content-type", "")
    if not 200 <= response.status_code <= 599 or len(content_type.encode()) > 255:
        message = (
            f"the handler returned a Response that is no answer, with status {response.status_code} (200 to 599) and a content type of "
            f"{len(content_type.encode())} bytes (255 at most)"
        )
        return Result(status=500, backend=backend, error=ErrorInfo(type="mqserve.NotEncodable", message=message))
    return Result(
        status=response.status_code, backend=backend, content_type=content_type or BYTES, headers=headers, body=bytes(response.body)
    )


def _json_hook(value: Any) -> Any:
    """What msgspec does not know: pydantic, numpy scalars and arrays, exceptions."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # numpy, torch: without importing either
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, BaseException):
        return str(value)
    raise TypeError(f"there is no JSON for {type(value).__qualname__}")


def _bytes_as_text(value: Any) -> Any:
    """The seed's encoder turns bytes into UTF-8 text, where msgspec would write base64."""
    if isinstance(value, bytes | bytearray):
        return value.decode()
    if isinstance(value, dict):
        return {_bytes_as_text(key): _bytes_as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bytes_as_text(item) for item in value]
    return value


_encoder = msgspec.json.Encoder(enc_hook=_json_hook)


def _encode_json(value: object) -> bytes:
    return _encoder.encode(_bytes_as_text(value) if isinstance(value, dict | list | tuple) else value)


def _public_name(kind: type[BaseException]) -> str:
    """What clients in other languages may match on: our own errors without the module they happen to live in."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    package = kind.__module__.partition(".")[0]
    return f"{package if package == 'mqserve' else kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a user's __str__ may do anything
        return "(its message cannot be shown)"


def _writable(text: str) -> str:
    """With escapes for what UTF-8 cannot write, such as the name of a file that was not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _seal_exception(error: BaseException, backend: str, future_id: str, signer: Signer) -> bytes:
    if not signer:
        return b""
    frames = error.__traceback__
    try:
        return signer.seal(pickling.dumps(error.with_traceback(None)), Claim("result", backend, future_id, "exception"))
    except Exception:
        return b""  # type, message and traceback travel all the same
    finally:
        error.__traceback__ = frames  # the log wants it
