"""What travels arrives equal and of the same types; what cannot is named; what strangers pickled is never opened."""

import datetime
import math
import pickle
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from mqserve.broker.errors import BadEnvelope, BadSignature, NotEncodable
from mqserve.broker.values.codecs import MSGPACK, PICKLE, decode_plain, decode_value, encode_value, media_type
from mqserve.broker.values.signing import SealScope, Signer

NO_SIGNER = Signer([], "ns")
CLAIM = SealScope("request", "b", "id")
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, "", "grüße 🐇", b"", b"\x00\xff"),
        *(0, -1, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63)),
        *(3.14, -0.0, 1e308, 5e-324, math.inf),
        *([], {}, [1, [2.0, [None]]], {"a": {"b": [True]}, "": b"x"}),
    ],
    ids=repr,
)
def test_plain_data_travels_without_a_key_and_arrives_exactly(value: object) -> None:
    content_type, body = encode_value(value, NO_SIGNER, CLAIM)
    assert content_type == MSGPACK
    arrived = decode_value(body, content_type, NO_SIGNER, CLAIM)
    assert (repr(arrived), type(arrived)) == (repr(value), type(value))


class Text(str):
    pass


ODD = {
    "tuple": (1, 2),
    "set": {1},
    "complex": 1j,
    "uuid.UUID": uuid.UUID(int=7),
    "datetime.date": datetime.date(2026, 1, 2),
    "int beyond 64 bits": 2**64,
    "dict key of type int": {1: "a"},
    f"{__name__}.Text": Text("a"),
}


@pytest.mark.parametrize(("kind", "value"), list(ODD.items()), ids=list(ODD))
def test_other_objects_travel_as_a_sealed_pickle(signer: Signer, kind: str, value: object) -> None:
    content_type, body = encode_value(value, signer, CLAIM)
    assert content_type == PICKLE
    arrived = decode_value(body, content_type, signer, CLAIM)
    assert (arrived, type(arrived)) == (value, type(value))


@pytest.mark.parametrize(("kind", "value"), list(ODD.items()), ids=list(ODD))
@pytest.mark.parametrize("nest", [lambda value: value, lambda value: [1, {"a": [value]}]], ids=["bare", "nested"])
def test_without_a_key_the_odd_type_is_named_however_deep_it_is(kind: str, value: object, nest: Any) -> None:
    with pytest.raises(NotEncodable, match=f"a {kind} in it .*MQSERVE_SECRET_KEY"):
        encode_value(nest(value), NO_SIGNER, CLAIM)


def test_an_integer_below_64_bits_needs_a_key() -> None:
    with pytest.raises(NotEncodable, match="int beyond 64 bits"):
        encode_value(-(2**63) - 1, NO_SIGNER, CLAIM)


def test_an_object_that_does_not_pickle_is_named(signer: Signer) -> None:
    with pytest.raises(NotEncodable, match=r"_thread\.lock"):
        encode_value(threading.Lock(), signer, CLAIM)


@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"\ud800": 1}], ids=["bare", "in a list", "as a key"])
def test_text_that_utf_8_cannot_write_travels_by_pickle(signer: Signer, value: object) -> None:
    content_type, body = encode_value(value, signer, CLAIM)
    assert decode_value(body, content_type, signer, CLAIM) == value


def test_text_that_utf_8_cannot_write_is_named_without_a_key() -> None:
    with pytest.raises(NotEncodable, match="a str that UTF-8 cannot write in it"):
        encode_value(["\ud800"], NO_SIGNER, CLAIM)


def test_a_list_that_holds_itself_travels_by_pickle(signer: Signer) -> None:
    content_type, body = encode_value(CYCLE, signer, CLAIM)
    arrived = decode_value(body, content_type, signer, CLAIM)
    assert arrived[0] is arrived


@pytest.mark.parametrize("depth", [100, 600, 5000])
def test_a_deeply_nested_list_arrives_or_is_refused_by_us(signer: Signer, depth: int) -> None:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    try:
        content_type, body = encode_value(value, signer, CLAIM)
    except NotEncodable:
        return
    arrived = decode_value(body, content_type, signer, CLAIM)
    for _ in range(depth):
        (arrived,) = arrived
    assert arrived == []


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_a_pickle_that_we_did_not_seal_is_never_opened(signer: Signer, tmp_path: Path) -> None:
    file = tmp_path / "opened"
    naked = pickle.dumps(Bomb(file))
    sealed_by_another = Signer([b"x" * 32], "ns").seal(naked, SealScope("request", "b", "id", PICKLE))
    for body in (naked, sealed_by_another):
        with pytest.raises(BadSignature):
            decode_value(body, PICKLE, signer, CLAIM)
        with pytest.raises(BadEnvelope):
            decode_plain(body, PICKLE)
    assert not file.exists()
    decode_value(encode_value(Bomb(file), signer, CLAIM)[1], PICKLE, signer, CLAIM)
    assert file.exists()  # so it would have been, had one of them been opened


def test_a_sealed_pickle_opens_for_its_own_request_only(signer: Signer) -> None:
    _, body = encode_value((1, 2), signer, CLAIM)
    with pytest.raises(BadSignature):
        decode_value(body, PICKLE, signer, SealScope("request", "b", "another id"))


@pytest.mark.parametrize(
    ("body", "content_type", "value"),
    [
        (b'{"a": [1, 2.5, null]}', "application/json", {"a": [1, 2.5, None]}),
        (b"[1]", "Application/Problem+JSON; charset=utf-8", [1]),
        (b"", "application/json", None),
        (b"\x93\x01\x02\x03", "application/msgpack", [1, 2, 3]),
        ("grüße".encode(), "text/plain; charset=utf-8", "grüße"),
        (b"\x00\xff", "image/png", b"\x00\xff"),
    ],
)
def test_plain_bodies_are_decoded_by_their_content_type(body: bytes, content_type: str, value: object) -> None:
    assert decode_plain(body, content_type) == value


@pytest.mark.parametrize(("body", "content_type"), [(b"{", "application/json"), (b"\xc1", "application/msgpack"), (b"\xff", "text/plain")])
def test_a_body_that_does_not_parse_is_a_bad_envelope_that_names_its_type(body: bytes, content_type: str) -> None:
    with pytest.raises(BadEnvelope, match=content_type):
        decode_plain(body, content_type)


def test_a_media_type_is_read_without_its_parameters_and_case() -> None:
    assert media_type("Text/HTML ; charset=x") == "text/html"
