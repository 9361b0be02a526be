"""Results of other jobs travel by value as the body of a job, and arrive as a handle would have got them."""

import datetime
from typing import Any

import pytest

from mqserve.broker.errors import BadEnvelope, BadSignature
from mqserve.broker.values.carried import CarriedResult, carry_all, carry_one, read_carried
from mqserve.broker.values.codecs import JSON, MSGPACK, PICKLE, TEXT, encode_value
from mqserve.broker.values.signing import SealScope, Signer

NO_SIGNER = Signer([], "ns")


def result_of(value: Any, signer: Signer, backend: str = "b", job_id: str = "job") -> CarriedResult:
    return CarriedResult(*encode_value(value, signer, SealScope("result", backend, job_id)), backend, job_id)


@pytest.mark.parametrize("value", [None, b"", [1, {"a": b"x"}], 2**63, "text"], ids=repr)
def test_one_result_is_the_value_itself(value: object) -> None:
    assert read_carried(carry_one(result_of(value, NO_SIGNER)), NO_SIGNER, plain=False) == value


def test_many_results_are_the_list_of_the_values_in_order() -> None:
    results = [result_of(number, NO_SIGNER) for number in (3, 1, 2)]
    assert read_carried(carry_all(results), NO_SIGNER, plain=False) == [3, 1, 2]
    assert read_carried(carry_all([]), NO_SIGNER, plain=False) == []
    assert read_carried(carry_all(results[:1]), NO_SIGNER, plain=False) == [3]


def test_a_pickle_keeps_the_seal_of_its_job(signer: Signer) -> None:
    day = datetime.date(2026, 1, 2)
    assert read_carried(carry_one(result_of(day, signer)), signer, plain=False) == day


@pytest.mark.parametrize("backend_and_id", [("other", "job"), ("b", "other")], ids=str)
def test_a_pickle_of_another_job_is_not_opened(signer: Signer, backend_and_id: tuple[str, str]) -> None:
    kind, body, *_ = msgspec_fields(result_of(datetime.date(2026, 1, 2), signer))
    with pytest.raises(BadSignature):
        read_carried(carry_one(CarriedResult(kind, body, *backend_and_id)), signer, plain=False)


def test_a_pickle_is_not_opened_among_the_results_of_web_clients(signer: Signer) -> None:
    sealed = result_of(datetime.date(2026, 1, 2), signer)
    assert sealed.content_type == PICKLE
    with pytest.raises(BadEnvelope, match="never opened"):
        read_carried(carry_one(sealed), signer, plain=True)


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        (JSON, b'{"a": [1, null]}', {"a": [1, None]}),
        ("application/problem+json", b"[1]", [1]),
        (TEXT, "grüße".encode(), "grüße"),
        ("text/plain", b"\xff\x00", b"\xff\x00"),  # how bytes of a handler are answered
        ("text/plain", b"", None),
        ("image/png", b"\x89PNG", b"\x89PNG"),
        (MSGPACK, b"\x93\x01\x02\x03", [1, 2, 3]),
    ],
)
def test_an_answer_to_a_web_client_is_decoded_by_its_content_type(content_type: str, body: bytes, value: object) -> None:
    assert read_carried(carry_one(CarriedResult(content_type, body, "b", "job")), NO_SIGNER, plain=True) == value


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x91\xc3", b"\x92\xc2\x90", b"\x92\xc2\x91\x91\xa1x"], ids=repr)
def test_what_holds_no_results_is_refused(body: bytes) -> None:
    with pytest.raises(BadEnvelope, match="carries"):
        read_carried(body, NO_SIGNER, plain=False)


def msgspec_fields(result: CarriedResult) -> tuple[str, bytes, str, str]:
    return result.content_type, result.body, result.backend, result.id
