"""Turns a stored result into the value that the caller gets, or the exception."""

from __future__ import annotations

import concurrent.futures
import pickle
from typing import Any

from ..broker.errors import (
    BackendGone,
    BadEnvelope,
    BadSignature,
    BadType,
    BadValue,
    Cancelled,
    MembersFailed,
    NotEncodable,
    RemoteError,
    ReplicaLost,
    RequestTimeout,
)
from ..broker.failures import add_note, describe
from ..broker.results import MEMBERS_FAILED, ErrorInfo, Outcome, Result
from ..broker.streams import REPLICA_LOST
from ..broker.values.carried import BYTES_OR_NONE
from ..broker.values.codecs import PICKLE, decode_value, media_type
from ..broker.values.signing import SealScope, Signer

_OTHERS_OWN = (concurrent.futures.CancelledError, StopIteration, StopAsyncIteration)


def check_results(results: object) -> None:
    """Raises BadValue unless `results` is a kind of results that a caller can ask for."""
    if results not in ("any", "plain"):
        raise BadValue(f"results must be 'any', or 'plain' for a caller that opens no pickle, not {results!r}")


def read_result(result: Result, future_id: str, signer: Signer, backend: str | None = None, *, plain: bool = False) -> Any:
    """Returns the value of a result, or raises its error. `backend` names the backend that must have made it. With `plain` no pickle is
    opened, whoever sealed it."""
    if backend is not None and result.backend and result.backend != backend:
        raise BadValue(f"the result {future_id!r} is the answer of backend {result.backend!r}, not of {backend!r}")
    if result.error is not None:
        raise _exception(result.error, result, future_id, signer, plain=plain)
    if result.frames:
        raise BadType(f"the answer to request {future_id} was streamed: its values are read with serve.stream({future_id!r})")
    if result.content_type == BYTES_OR_NONE:
        return result.body or None
    if plain and media_type(result.content_type) == PICKLE:
        raise NotEncodable(
            f"the answer of backend {result.backend!r} to request {future_id} travels as a pickle, and this caller opens none "
            "(results='plain'): let the handler return None, bool, int, float, str, bytes, lists and str-keyed dicts"
        )
    try:
        return decode_value(result.body, result.content_type, signer, SealScope("result", result.backend, future_id))
    except BadEnvelope as error:
        raise RemoteError(f"the answer of backend {result.backend!r} to request {future_id} cannot be opened here: {error}") from error


def _exception(error: ErrorInfo, result: Result, future_id: str, signer: Signer, *, plain: bool) -> BaseException:
    match result.outcome:
        case Outcome.CANCELLED:
            return Cancelled(error.message)
        case Outcome.LATE:
            return RequestTimeout(error.message, phase=error.phase)
        case Outcome.GONE:
            return BackendGone(error.message)
    if error.type == MEMBERS_FAILED:
        return MembersFailed(error.message)
    kind = ReplicaLost if error.type == REPLICA_LOST else RemoteError
    exception: BaseException = kind(f"{error.type}: {error.message}")
    if error.sealed and not plain:
        try:
            opened = pickle.loads(signer.open(error.sealed, SealScope("result", result.backend, future_id, "exception")))
            exception = opened if _may_be_raised_here(opened) else exception
        except BadSignature as refused:
            exception.add_note(f"its own object was not opened: {refused}")
        except BaseException as failed:  # the constructor of the exception's class may raise anything
            exception.add_note(f"its own object could not be opened here: {describe(failed).words}")
    if error.traceback:
        add_note(exception, f"Remote traceback, of backend {result.backend!r}:\n{error.traceback.rstrip()}")
    return exception


def _may_be_raised_here(opened: object) -> bool:
    """Whether the exception may be raised in the caller. Not if it would end the caller's program, or act as the caller's own
    cancellation or end of an iteration. The type is checked, since an object can lie about its class."""
    return issubclass(type(opened), Exception) and not issubclass(type(opened), _OTHERS_OWN)
