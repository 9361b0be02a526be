"""Values to bytes and back: MessagePack for values that it restores exactly, a sealed pickle for others, else an error."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec

from ..errors import UNPARSABLE, BadEnvelope, NotEncodable
from . import pickling
from .signing import SealScope, Signer

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
MSGPACK = "application/msgpack"
PICKLE = "application/x-python-pickle"  # always sealed; an unsealed one is never opened

_msgpack = msgspec.msgpack.Encoder()


def media_type(content_type: str) -> str:
    """`text/plain` for `Text/Plain; charset=utf-8`."""
    return content_type.partition(";")[0].strip().lower()


def encode_value(value: object, signer: Signer, claim: SealScope, lifetime_ms: int = 0) -> tuple[str, bytes]:
    """Returns (content type, bytes) that `decode_value` turns back into an equal value of the same types. `lifetime_ms` is how long a
    pickle can be opened, by default as long as its purpose says.

    Raises NotEncodable if the value cannot be pickled, or needs a pickle and there is no key to seal it.
    """
    odd = ""
    try:
        if is_plain(value):
            return MSGPACK, _msgpack.encode(value)
    except UnicodeEncodeError:
        odd = "str that UTF-8 cannot write"
    except RecursionError:
        odd = "list or dict nested too deeply"
    if not signer:
        raise NotEncodable(
            f"a value with a {odd or _odd_type(value)} in it travels only as a signed pickle, and there is no key: set MQSERVE_SECRET_KEY, "
            "or send None, bool, int, float, str, bytes, lists and str-keyed dicts"
        )
    try:
        payload = pickling.dumps(value)
    except Exception as error:
        raise NotEncodable(f"a value with a {odd or _odd_type(value)} in it cannot travel: it does not pickle ({error})") from error
    return PICKLE, signer.seal(payload, _with_type(claim), lifetime_ms)


def decode_value(body: bytes, content_type: str, signer: Signer, claim: SealScope) -> Any:
    """Returns the value. Raises BadEnvelope for bytes that do not parse or an object of a class that this process cannot import, and
    BadSignature, before anything is unpickled, for a pickle that we did not seal."""
    if media_type(content_type) == PICKLE:
        return load_pickle(signer.open(body, _with_type(claim)))
    return decode_plain(body, content_type)


def sealed_anew(body: bytes, content_type: str, signer: Signer, claim: SealScope, new: SealScope, lifetime_ms: int = 0) -> bytes:
    """Returns the bytes of an encoded value for another scope; only those of a pickle differ. Raises BadSignature for a pickle that we did
    not seal."""
    if media_type(content_type) != PICKLE:
        return body
    return signer.seal(signer.open(body, _with_type(claim)), _with_type(new), lifetime_ms)


def load_pickle(pickled: bytes) -> Any:
    """Unpickles a value whose seal was checked. Raises BadEnvelope if the class of an object in it cannot be imported here, and whatever
    user code raises while it makes the objects."""
    try:
        return pickle.loads(pickled)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, AttributeError) and not str(error).startswith("Can't get attribute"):
            raise
        raise BadEnvelope(
            f"the value has an object of a class that this process cannot import ({error}): send plain data, or put the module of the "
            "class where both sides import it"
        ) from error


def check_plain(body: bytes, content_type: str) -> None:
    """Raises BadEnvelope for bytes that `decode_plain` would refuse, without building objects: a few MiB of empty arrays would become a
    hundred times as much."""
    kind = media_type(content_type)
    try:
        if kind == JSON or kind.endswith("+json"):
            body.decode()
            if body:
                msgspec.json.decode(body, type=msgspec.Raw)
        elif kind == MSGPACK:
            if body:
                msgspec.msgpack.decode(body, type=msgspec.Raw)
        else:
            decode_plain(body, content_type)
    except UNPARSABLE as error:
        raise BadEnvelope(f"the body does not parse as {kind!r} ({error})") from error


def decode_plain(body: bytes, content_type: str) -> Any:
    """Decodes what any client may send: JSON and MessagePack to objects, text to str, other bytes as they are. Never a pickle."""
    kind = media_type(content_type)
    try:
        if kind == JSON or kind.endswith("+json"):
            return msgspec.json.decode(body) if body else None
        if kind == MSGPACK:
            return msgspec.msgpack.decode(body) if body else None
        if kind.startswith("text/"):
            return body.decode()
    except UNPARSABLE as error:
        raise BadEnvelope(f"the body does not parse as {kind!r} ({error})") from error
    if kind == PICKLE:
        raise BadEnvelope("a pickle from a stranger is never opened: send JSON, MessagePack, text or bytes")
    return body


def _with_type(claim: SealScope) -> SealScope:
    return SealScope(claim.purpose, claim.backend, claim.id, PICKLE)


_ATOMS = frozenset({type(None), bool, float, str, bytes})


def is_plain(value: object) -> bool:
    """Whether MessagePack restores the value equal and of the same types. Raises RecursionError for a value that is nested too deeply."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is int:
        return -(2**63) <= value < 2**64  # type: ignore[operator]
    if kind is list:
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if kind is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())  # type: ignore[attr-defined]
    return False


def _odd_type(value: object) -> str:
    """The name, for an error message, of the type that keeps `value` from being plain data."""
    if type(value) is list:
        return next(_odd_type(item) for item in value if not is_plain(item))
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                return f"dict key of type {_name(type(key))}"
            if not is_plain(item):
                return _odd_type(item)
    return "int beyond 64 bits" if type(value) is int else _name(type(value))


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
