"""What stands in streams, owners and feeds: it is what was written, or it is refused in words, or left out."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.errors import BadEnvelope
from mqserve.broker.streams import FRAME_BYTES, Credit, Form, Frame, Head, Owner, frames_of, read_credit
from tests.fuzz.material import bytes_like, good_text, plain

heads = st.builds(
    Head,
    status=st.integers(200, 599),
    content_type=good_text,
    headers=st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=3).map(tuple),
    form=st.sampled_from(Form),
    replica=good_text,
    resumable=st.booleans(),
    idle_s=st.floats(0, 1e6),
    length=st.none() | st.integers(0, 2**50),
)
frames = st.builds(Frame, st.binary(max_size=60), st.booleans(), good_text, st.none() | heads)
owners = st.builds(Owner, good_text, st.integers(1, 9), good_text, good_text, st.booleans(), st.binary(max_size=8))
credits = st.builds(Credit, st.just(1), good_text, good_text, st.integers(0, 2**53), st.integers(0, 2**53), st.booleans())
FRAME = Frame(b"data", True, "text/plain", Head(headers=((b"a", b"b"),), length=1, form=Form.ITEMS)).to_bytes()
OWNER = Owner("r", 1, "b", "e", True, b"12345678").to_bytes()
CREDIT = Credit(1, "id", "inbox", 3, 400, True).to_bytes()
any_bytes = plain.map(msgspec.msgpack.encode)


@given(bytes_like(FRAME) | any_bytes)
def test_a_frame_of_any_bytes_is_a_frame_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(Frame.from_bytes(raw), Frame)
    except BadEnvelope as refused:
        assert "a part of a streamed answer" in str(refused)


@given(bytes_like(OWNER) | any_bytes)
def test_an_owner_of_any_bytes_is_an_owner_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(Owner.from_bytes(raw), Owner)
    except BadEnvelope as refused:
        assert "the owner of the stream" in str(refused)


@given(bytes_like(CREDIT) | any_bytes)
def test_a_credit_of_any_bytes_is_a_credit_or_left_out(raw: bytes) -> None:
    credit = read_credit(raw)
    assert credit is None or credit.v == 1


@given(frames, owners, credits)
def test_what_was_written_is_read(frame: Frame, owner: Owner, credit: Credit) -> None:
    assert Frame.from_bytes(frame.to_bytes()) == frame
    assert Owner.from_bytes(owner.to_bytes()) == owner
    assert read_credit(credit.to_bytes()) == credit


@given(st.integers(0, 3 * FRAME_BYTES + 1), st.none() | heads)
def test_a_chunk_is_cut_into_frames_that_are_all_of_it(size: int, head: Head | None) -> None:
    data = bytes(size)
    cut = list(frames_of(data, "text/plain", head))
    assert b"".join(frame.data for frame in cut) == data
    assert all(len(frame.data) <= FRAME_BYTES for frame in cut)
    assert [frame.more for frame in cut] == [True] * (len(cut) - 1) + [False]
    assert [frame.head for frame in cut] == [head] + [None] * (len(cut) - 1)
