"""A seal opens for exactly what it was made for, and for nobody without the key."""

from dataclasses import replace

import msgspec
import pytest

from mqserve.broker.errors import BadSignature, BadValue
from mqserve.broker.values.signing import Purpose, SealScope, Signer

OLD, NEW = b"o" * 32, b"n" * 32
CLAIM = SealScope("request", "b", "id", "application/x")


def test_what_is_sealed_opens_again(signer: Signer) -> None:
    assert signer.open(signer.seal(b"payload", CLAIM), CLAIM) == b"payload"


@pytest.mark.parametrize(
    "claim",
    [
        replace(CLAIM, purpose="result"),
        replace(CLAIM, backend="other"),
        replace(CLAIM, id="other"),
        replace(CLAIM, content_type="other"),
        SealScope("request", "bid", "", "application/x"),
    ],
    ids=["purpose", "backend", "id", "content type", "fields run together"],
)
def test_a_seal_opens_under_no_other_claim(signer: Signer, claim: SealScope) -> None:
    with pytest.raises(BadSignature, match="does not fit"):
        signer.open(signer.seal(b"payload", CLAIM), claim)


def test_a_seal_of_another_namespace_is_refused() -> None:
    with pytest.raises(BadSignature):
        Signer([NEW], "one").open(Signer([NEW], "other").seal(b"payload", CLAIM), CLAIM)


@pytest.mark.parametrize(("purpose", "days"), [("request", 8), ("result", 31)])
def test_a_seal_holds_until_its_expiry(purpose: Purpose, days: int) -> None:
    now = [1_000_000.0]
    signer, claim = Signer([NEW], "ns", clock=lambda: now[0]), replace(CLAIM, purpose=purpose)
    sealed = signer.seal(b"payload", claim)
    now[0] += days * 24 * 3600
    assert signer.open(sealed, claim) == b"payload"
    now[0] += 1
    with pytest.raises(BadSignature, match="expired"):
        signer.open(sealed, claim)


def test_a_sealer_may_say_how_long_its_seal_holds() -> None:
    now = [1_000_000.0]
    signer = Signer([NEW], "ns", clock=lambda: now[0])
    sealed = signer.seal(b"payload", CLAIM, lifetime_ms=40 * 24 * 3600 * 1000)
    now[0] += 40 * 24 * 3600
    assert signer.open(sealed, CLAIM) == b"payload"
    now[0] += 1
    with pytest.raises(BadSignature, match=r"expired: it was good until 1970-02-21"):
        signer.open(sealed, CLAIM)


def test_code_does_not_expire() -> None:
    now = [1_000_000.0]
    signer, claim = Signer([NEW], "ns", clock=lambda: now[0]), replace(CLAIM, purpose="code")
    sealed = signer.seal(b"payload", claim)
    now[0] += 10 * 365 * 24 * 3600
    assert signer.open(sealed, claim) == b"payload"


@pytest.mark.parametrize(("place", "value"), list(enumerate([2, "00000000", 9999, b"m" * 32, b"other payload"])))
def test_a_change_of_any_part_breaks_the_seal(signer: Signer, place: int, value: object) -> None:
    parts = msgspec.msgpack.decode(signer.seal(b"payload", CLAIM))
    parts[place] = value
    with pytest.raises(BadSignature):
        signer.open(msgspec.msgpack.encode(parts), CLAIM)


@pytest.mark.parametrize("raw", [b"", b"\x80\x04N.", b"\x90", b"\x95\x01\x01\x01\x01\x01", msgspec.msgpack.encode([1, "", 0, b"", b""])])
def test_bytes_that_were_never_sealed_are_refused(signer: Signer, raw: bytes) -> None:
    with pytest.raises(BadSignature):
        signer.open(raw, CLAIM)


def test_a_key_is_rotated_without_a_refusal() -> None:
    before, during, after = Signer([OLD], "ns"), Signer([NEW, OLD], "ns"), Signer([NEW], "ns")
    assert during.open(before.seal(b"old", CLAIM), CLAIM) == b"old"
    assert after.open(during.seal(b"new", CLAIM), CLAIM) == b"new"
    with pytest.raises(BadSignature, match="MQSERVE_SECRET_KEY"):
        after.open(before.seal(b"old", CLAIM), CLAIM)


def test_a_short_key_is_refused_with_the_way_to_make_one() -> None:
    with pytest.raises(BadValue, match="openssl rand"):
        Signer([b"k" * 31], "ns")


def test_nothing_is_sealed_or_opened_without_a_key(signer: Signer) -> None:
    keyless = Signer([], "ns")
    assert not keyless
    with pytest.raises(BadSignature, match="MQSERVE_SECRET_KEY"):
        keyless.seal(b"payload", CLAIM)
    with pytest.raises(BadSignature):
        keyless.open(signer.seal(b"payload", CLAIM), CLAIM)


def test_no_key_shows_in_the_signers_state() -> None:
    assert "ooo" not in repr(Signer([OLD], "ns"))
