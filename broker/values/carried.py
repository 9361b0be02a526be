"""Results of other jobs as the body of a job: that of the stage before it in a pipeline, or those of all members of a group.

They travel by value, so that the job needs nothing of what the store keeps. Who sends the job opens none of them: each body is as its
replica made it, and a pickle among them keeps its own seal, that of a result, which is checked where it is opened. The header of the
message says that the body is one of these (`JobHead.carried`); a content type alone could be anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import UNPARSABLE, BadEnvelope
from .codecs import decode_plain, decode_value
from .signing import SealScope, Signer

CARRIED = "application/x-mqserve-results"
BYTES_OR_NONE = "text/plain"  # without a charset: how a handler's bytes and None are answered over HTTP


class CarriedResult(msgspec.Struct, frozen=True, array_like=True):
    """The result of one job that has succeeded. `backend` and `id` are those of that job."""

    content_type: str
    body: bytes
    backend: str
    id: str


class Carried(msgspec.Struct, frozen=True, array_like=True):
    """The body. The handler gets the value of the only result or, if there are `many`, the list of all values."""

    many: bool
    results: tuple[CarriedResult, ...]


def carry_one(result: CarriedResult) -> bytes:
    """Returns the body of a job whose handler gets this value."""
    return _encode(Carried(False, (result,)))


def carry_all(results: Sequence[CarriedResult]) -> bytes:
    """Returns the body of a job whose handler gets the list of these values."""
    return _encode(Carried(True, tuple(results)))


def read_carried(body: bytes, signer: Signer, *, plain: bool) -> Any:
    """Returns the value, or the list of values, as a handle would have got each. With `plain` no pickle is opened. Raises BadEnvelope, and
    BadSignature for a pickle that we did not seal as that job's result."""
    try:
        carried = _decode(body)
    except UNPARSABLE as error:
        raise BadEnvelope(f"the results that the job carries do not parse ({error}): another version sent it") from error
    values = [_value(result, signer, plain) for result in carried.results]
    if carried.many:
        return values
    if len(values) != 1:
        raise BadEnvelope(f"the job carries {len(values)} results in the place of one: another program sent it")
    return values[0]


def _value(result: CarriedResult, signer: Signer, plain: bool) -> Any:
    if result.content_type == BYTES_OR_NONE:
        return result.body or None
    if plain:
        return decode_plain(result.body, result.content_type)
    return decode_value(result.body, result.content_type, signer, SealScope("result", result.backend, result.id))


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Carried).decode
