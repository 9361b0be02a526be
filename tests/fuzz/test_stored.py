"""What stands in the store: results, notes, code and whatever is sealed. It is what was written, or it is refused; no pickle is opened."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.calls.idempotency import Claim, IdempotencyKeys
from mqserve.broker.errors import BadEnvelope, BadSignature, MQServeError, NotEncodable
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import ErrorInfo, InboxEntry, Result, entry_of, read_entry
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values import code
from mqserve.broker.values.codecs import JSON, MSGPACK, PICKLE, TEXT, decode_plain, decode_value, encode_value
from mqserve.broker.values.signing import SealScope, Signer
from mqserve.client.answers import read_result
from mqserve.proxy.responses import from_result
from tests.fuzz.material import any_text, anything, bomb, bytes_like, cases, good_text, plain

SIGNER = Signer([b"k" * 32, b"an older key, thirty-two bytes long"], "ns", clock=lambda: 1_000_000.0)
NO_SIGNER = Signer([], "ns")
CLAIM = SealScope("result", "backend", "id", PICKLE)
SEALED = SIGNER.seal(b"payload", CLAIM)
VALID = Result(
    status=200, backend="b", content_type=JSON, headers=((b"x-a", b"1"),), body=b"{}", error=ErrorInfo("ValueError", "no", "at", b"s")
)
CONTENT_TYPES = st.sampled_from([JSON, "application/problem+json", MSGPACK, TEXT, "text/plain", "image/png", PICKLE, ""]) | any_text

results = st.builds(
    Result,
    status=st.integers(200, 599),
    backend=good_text,
    attempt=st.integers(1, 9),
    content_type=good_text,
    headers=st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=3).map(tuple),
    body=st.binary(max_size=60),
    error=st.none() | st.builds(ErrorInfo, good_text, good_text, good_text, st.binary(max_size=20)),
)


def read(raw: bytes) -> Result | None:
    try:
        return Result.from_bytes(raw)
    except BadEnvelope as refused:
        assert "the stored result" in str(refused)
        return None


def check_answer(result: Result) -> None:
    """What the proxy makes of it is a well-formed response."""
    status, headers, body = from_result(result, "id", debug=False)
    assert 100 <= status <= 599 and isinstance(body, bytes)
    assert not any(bad in name + value for name, value in headers for bad in (b"\r", b"\n", b"\0"))


@pytest.mark.parametrize("raw", cases("results"))
def test_results_that_did_harm_are_refused(raw: bytes) -> None:
    assert read(raw) is None


@pytest.mark.parametrize("raw", cases("notes"))
def test_notes_that_did_harm_are_left_out(raw: bytes) -> None:
    assert read_entry(raw) is None


@pytest.mark.parametrize("raw", cases("seals"))
def test_seals_that_did_harm_are_refused(raw: bytes) -> None:
    with pytest.raises(BadSignature):
        SIGNER.open(raw, CLAIM)


@given(bytes_like(VALID.to_bytes()) | plain.map(msgspec.msgpack.encode))
def test_a_result_of_any_bytes_is_a_result_or_refused(raw: bytes) -> None:
    result = read(raw)
    if result is not None:
        check_answer(result)
        try:
            read_result(result, "id", SIGNER)
        except (Exception, BaseExceptionGroup) as error:
            assert isinstance(error, MQServeError)


@given(results)
def test_a_result_is_read_as_it_was_written_and_answered(result: Result) -> None:
    assert Result.from_bytes(result.to_bytes()) == result
    check_answer(result)


@given(bytes_like(entry_of("id", VALID.to_bytes())) | plain.map(msgspec.msgpack.encode))
def test_a_note_of_any_bytes_is_a_note_or_left_out(raw: bytes) -> None:
    note = read_entry(raw)
    assert note is None or isinstance(note, InboxEntry)


@given(bytes_like(SEALED) | plain.map(msgspec.msgpack.encode), st.booleans())
def test_a_seal_that_was_touched_opens_nothing(raw: bytes, has_keys: bool) -> None:
    try:
        assert (SIGNER if has_keys else NO_SIGNER).open(raw, CLAIM) == b"payload" and _means_the_same(raw)
    except BadSignature as refused:
        assert str(refused)


def _means_the_same(raw: bytes) -> bool:
    """MessagePack can write one value in several ways; none of them changes what was signed."""
    return bool(msgspec.msgpack.decode(raw) == msgspec.msgpack.decode(SEALED))


claims = st.builds(SealScope, st.sampled_from(["code", "request", "result"]), good_text, good_text, good_text)


@given(claims, claims, st.sampled_from(["ns", "other"]), st.binary(min_size=32, max_size=40), st.binary(max_size=40))
def test_a_seal_opens_for_its_own_claim_namespace_and_key_alone(
    mine: SealScope, other: SealScope, namespace: str, key: bytes, payload: bytes
) -> None:
    sealed = Signer([b"m" * 32], "ns").seal(payload, mine)
    try:
        opened = Signer([key], namespace).open(sealed, other)
    except BadSignature:
        assert (mine, "ns", b"m" * 32) != (other, namespace, key)
    else:
        assert (mine, "ns", b"m" * 32, payload) == (other, namespace, key, opened)


@pytest.mark.parametrize("raw", cases("bodies"))
@pytest.mark.parametrize("content_type", [JSON, MSGPACK, TEXT, PICKLE])
def test_bodies_that_did_harm_are_refused(raw: bytes, content_type: str) -> None:
    decode_or_refuse(raw, content_type)


def decode_or_refuse(body: bytes, content_type: str) -> None:
    for read in (decode_plain, lambda body, kind: decode_value(body, kind, SIGNER, SealScope("request", "b", "id"))):
        try:
            read(body, content_type)
        except BadEnvelope as refused:
            assert str(refused)


@given(bytes_like(b'{"a": [1, 2.5, "text", null]}', msgspec.msgpack.encode({"a": [1, 2.5, b"\0", None]}), SEALED), CONTENT_TYPES)
def test_a_body_of_any_bytes_and_any_type_is_data_or_refused(body: bytes, content_type: str) -> None:
    decode_or_refuse(body, content_type)


@given(plain)
def test_plain_values_come_back_equal(value: Any) -> None:
    content_type, body = encode_value(value, NO_SIGNER, CLAIM)
    assert repr(decode_value(body, content_type, NO_SIGNER, CLAIM)) == repr(value)  # by repr: 1 and True and 1.0 are equal


@given(anything)
def test_any_value_comes_back_equal_or_cannot_be_sent(value: Any) -> None:
    try:
        content_type, body = encode_value(value, SIGNER, CLAIM)
    except NotEncodable:
        return
    assert type(decode_value(body, content_type, SIGNER, CLAIM)) is type(value)


@pytest.mark.parametrize(
    "content_type", [PICKLE, "application/X-Python-Pickle; charset=utf-8", JSON, MSGPACK, TEXT, "text/x", "image/png", ""]
)
def test_no_body_is_a_pickle_to_be_opened(content_type: str, tmp_path: Path) -> None:
    decode_or_refuse(bomb(tmp_path / "opened"), content_type)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("signer", [SIGNER, NO_SIGNER], ids=["with a key", "without a key"])
def test_no_result_and_no_error_in_it_is_a_pickle_to_be_opened(signer: Signer, tmp_path: Path) -> None:
    pickled = bomb(tmp_path / "opened")
    for foreign in (pickled, Signer([b"f" * 32], "ns").seal(pickled, CLAIM), SIGNER.seal(pickled, SealScope("request", "b", "id", PICKLE))):
        with pytest.raises(MQServeError):
            read_result(Result(backend="b", content_type=PICKLE, body=foreign), "id", signer)
        with pytest.raises(MQServeError):
            read_result(Result(status=500, backend="b", error=ErrorInfo("ValueError", "no", sealed=foreign)), "id", signer)
    for raw in (pickled, msgspec.msgpack.encode(pickled)):
        assert read(raw) is None and read_entry(raw) is None
    assert not (tmp_path / "opened").exists()


@pytest.mark.anyio
async def test_no_code_convertor_or_middleware_is_a_pickle_to_be_opened(tmp_path: Path) -> None:
    store, keys, pickled = EmbeddedStore(), StoreKeys("ns"), bomb(tmp_path / "opened")
    foreign = Signer([b"f" * 32], "ns").seal(pickled, SealScope("code"))
    documents = [
        pickled,
        code.Code("f", sealed=pickled).to_bytes(),
        code.Code("f", sealed=foreign).to_bytes(),
        code.Code("f", target="os:getcwd", args_type=PICKLE, args=pickled).with_seal(SIGNER).to_bytes(),
        code.Code("f", target="os:getcwd", args_type=PICKLE, args=foreign).with_seal(SIGNER).to_bytes(),
    ]
    for raw in documents:
        sha256 = hashlib.sha256(raw).hexdigest()
        await store.set(keys.code(sha256), raw)
        with pytest.raises(BadEnvelope):
            await code.load(store, keys, sha256, SIGNER)
    assert not (tmp_path / "opened").exists()


@given(bytes_like(code.Code("f", target="os:getcwd", args_type=MSGPACK, args=b"\x90").to_bytes()))
def test_code_of_any_bytes_is_code_or_refused(raw: bytes) -> None:
    try:
        code.unpack(raw, hashlib.sha256(raw).hexdigest(), Signer([], "ns"))
    except (MQServeError, ImportError) as refused:
        assert str(refused)


HELD = Claim(1, "i" * 32, "b", b"f" * 32)


@given(bytes_like(msgspec.msgpack.encode(HELD)) | plain.map(msgspec.msgpack.encode))
def test_what_stands_at_an_idempotency_key_is_a_claim_or_refused(raw: bytes) -> None:
    async def claim() -> Claim:
        store, keys = EmbeddedStore(), StoreKeys("ns")
        await store.set(keys.idempotent(b"scope".hex()), raw)
        return await IdempotencyKeys(store, keys).claim(b"scope", HELD)

    try:
        assert asyncio.run(claim()).fingerprint == HELD.fingerprint
    except MQServeError as refused:
        assert str(refused)
