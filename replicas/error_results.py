"""Turns any exception of user code into a result of bounded size.

A web client gets the status, headers and detail of an `HTTPException` (Starlette's, and so FastAPI's); 422 if the request's own data
did not validate; the status of an error of ours that the handler let pass; and 500 for everything else.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException

from ..broker import backoff
from ..broker.envelope import MAX_HEAD_BYTES, Pairs
from ..broker.errors import MQServeError, Overloaded, RequestTimeout, public_words
from ..broker.failures import MAX_MESSAGE, describe, name_of, writable
from ..broker.process.printable import printable
from ..broker.results import ErrorInfo, Phase, Result
from ..broker.values import pickling
from ..broker.values.signing import SealScope, Signer
from .job_words import RetryLater
from .validation import Data, find_invalid

logger = logging.getLogger(__name__)

MAX_SEALED_BYTES = 64 * 1024  # of the pickled exception; of a larger one only type, message and traceback travel
MAX_MEMBERS_BYTES = 16 * 1024


class Told(NamedTuple):
    """The answer that a web client gets for an exception."""

    status: int = 500
    message: str = ""  # empty for the exception's own
    is_meant: bool = False  # the handler raised it as an answer, so the traceback is left out
    headers: Pairs = ()
    members: bytes = b""  # a JSON object whose members the problem document gets


def error_result(error: BaseException, backend: str, future_id: str, signer: Signer, data: Data) -> Result:
    """Returns the exception as a result. Raises nothing, whatever the exception's own methods do."""
    failure = describe(error)
    told = _told(error, data)
    info = ErrorInfo(
        type=failure.type,
        message=told.message or failure.message,
        traceback="" if told.is_meant else failure.traceback,
        sealed=_sealed(error, backend, future_id, signer),
        members=told.members,
        phase=_phase_of(error),
    )
    return Result(status=told.status, backend=backend, headers=told.headers, error=info)


def _phase_of(error: BaseException) -> Phase:
    """Returns the phase of a RequestTimeout that a handler let pass, QUEUE for anything else. A user's subclass counts as anything else."""
    return Phase.RUN if type(error) is RequestTimeout and error.phase == Phase.RUN else Phase.QUEUE


def _told(error: BaseException, data: Data) -> Told:
    try:
        kind = type(error)  # rather than isinstance, which asks the exception for its `__class__`
        if issubclass(kind, HTTPException):
            return _of_http(error)  # type: ignore[arg-type]
        if issubclass(kind, MQServeError):
            return _of_ours(error)  # type: ignore[arg-type]
        if issubclass(kind, RetryLater):
            return Told(503, is_meant=True, headers=_retry_after(error.after_s))  # type: ignore[attr-defined]
        if invalid := find_invalid(error, data):
            first = invalid[0]
            where = ".".join(map(str, first.loc))
            more = f" (and {len(invalid) - 1} more)" if len(invalid) > 1 else ""
            members = _members({"errors": [one._asdict() for one in invalid]})
            return Told(422, writable(f"{where}: {first.msg}{more}", MAX_MESSAGE), members=members)
    except BaseException as failed:
        logger.warning("a %s cannot be told to a web client but as a 500 (%s)", name_of(type(error)), printable(describe(failed).words))
    return Told()


def _of_http(error: HTTPException) -> Told:
    if not 200 <= error.status_code <= 599:
        return Told(500, f"the handler raised an HTTPException with status {error.status_code!r}, and there are 200 to 599")
    headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in (error.headers or {}).items())
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        return Told(500, f"the handler raised an HTTPException with more than {MAX_HEAD_BYTES} bytes of headers: send less")
    detail: object = error.detail
    if isinstance(detail, str):
        return Told(int(error.status_code), writable(detail, MAX_MESSAGE), True, headers)
    return Told(int(error.status_code), writable(repr(detail), MAX_MESSAGE), True, headers, _members({"detail": detail}))


def _of_ours(error: MQServeError) -> Told:
    status = error.status if error.status in range(400, 600) else 500  # a user's subclass may have any
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else backoff.retry_after_s() if status == 503 else 0
    return Told(status, writable(public_words(error), MAX_MESSAGE), headers=_retry_after(retry_after_s) if retry_after_s else ())


def _retry_after(after_s: float) -> Pairs:
    return ((b"retry-after", b"%d" % math.ceil(after_s)),)


def _members(members: dict[str, object]) -> bytes:
    """Returns the members as JSON; nothing if they are too large or have no JSON."""
    try:
        encoded = msgspec.json.encode(members)
    except (TypeError, ValueError, RecursionError):
        return b""
    return encoded if len(encoded) <= MAX_MEMBERS_BYTES else b""


def _sealed(error: BaseException, backend: str, future_id: str, signer: Signer) -> bytes:
    """Returns the signed pickle of the exception, for handles. Empty without a key, and if the exception is too large or has no pickle."""
    if not signer:
        return b""
    try:
        pickled = pickling.dumps(error)
        return signer.seal(pickled, SealScope("result", backend, future_id, "exception")) if len(pickled) <= MAX_SEALED_BYTES else b""
    except BaseException:
        return b""
