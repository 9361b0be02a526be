"""The ids of a group's jobs follow from the group's; what is kept of a group is parsed or refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.calls.chord_calls import VERSION, ChordCall
from mqserve.broker.envelope import RequestHead, is_minted, mint_id
from mqserve.broker.errors import BadEnvelope
from mqserve.broker.job_groups import GroupFacts, member_id
from mqserve.broker.values.signing import MIN_KEY_BYTES, Signer


def test_members_have_ids_of_their_own_which_look_like_any() -> None:
    one, other = mint_id(), mint_id()
    ids = [member_id(group, number) for group in (one, other) for number in range(100)]
    assert len(set(ids)) == 200 and all(map(is_minted, ids))
    assert ids[:100] == [member_id(one, number) for number in range(100)]


@given(total=st.integers(0, 2**62), expires_ms=st.integers(0, 2**62), endpoint=st.text())
def test_what_is_kept_of_a_group_is_read_as_it_was_written(total: int, expires_ms: int, endpoint: str) -> None:
    facts = GroupFacts(total, endpoint.encode(errors="replace").decode(), 7, expires_ms)
    assert GroupFacts.from_bytes(facts.to_bytes()) == facts


@given(st.binary())
def test_any_bytes_are_a_group_or_refused(raw: bytes) -> None:
    try:
        GroupFacts.from_bytes(raw)
    except BadEnvelope:
        pass


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x81\xa5total\xff", b"\xc1", b"\x91" * 2000])
def test_what_another_program_wrote_is_refused_in_one_sentence(raw: bytes) -> None:
    with pytest.raises(BadEnvelope, match="another program"):
        GroupFacts.from_bytes(raw)


CALL = ChordCall(VERSION, mint_id(), RequestHead(endpoint="e"), "key", 4, "tag", "https://hooks.example/", 60, 1, 2, 3)


@pytest.mark.parametrize("signer", [Signer([], "n"), Signer([b"k" * MIN_KEY_BYTES], "n")], ids=["without a key", "with a key"])
def test_the_call_that_follows_a_group_is_read_as_it_was_written(signer: Signer) -> None:
    assert ChordCall.opened(CALL.sealed(signer, "g"), signer, "g") == CALL


@given(st.binary())
def test_any_bytes_are_a_call_or_refused(raw: bytes) -> None:
    for signer in (Signer([], "n"), Signer([b"k" * MIN_KEY_BYTES], "n")):
        with pytest.raises(BadEnvelope):
            ChordCall.opened(raw, signer, "g")


def test_a_call_is_refused_for_another_group_and_under_another_key_and_as_another_version() -> None:
    signer, other, no_key = Signer([b"k" * MIN_KEY_BYTES], "n"), Signer([b"o" * MIN_KEY_BYTES], "n"), Signer([], "n")
    for raw, opener, group in (
        (CALL.sealed(signer, "g"), signer, "another"),
        (CALL.sealed(other, "g"), signer, "g"),
        (CALL.sealed(no_key, "g"), signer, "g"),
        (CALL.sealed(signer, "g"), no_key, "g"),
        (msgspec.structs.replace(CALL, v=VERSION + 1).sealed(signer, "g"), signer, "g"),
    ):
        with pytest.raises(BadEnvelope):
            ChordCall.opened(raw, opener, group)
