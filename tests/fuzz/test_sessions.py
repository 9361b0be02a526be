"""What stands in feeds and inboxes for a WebSocket session: a word, or left out; and no word of any kind breaks a link."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.calls.links import Link, Links
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import SESSION_KIND, InboxEntry
from mqserve.broker.sessions import Accept, Close, CloseCode, Over, Part, Taken, Word, entry_of, read_word
from tests.fuzz.material import bytes_like, good_text, plain

pytestmark = pytest.mark.anyio

numbers = st.integers(0, 2**53)
words = st.one_of(
    st.builds(Accept, good_text, good_text, st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=3).map(tuple)),
    st.builds(Part, st.binary(max_size=60), st.booleans(), st.booleans()),
    st.builds(Taken, numbers, numbers, good_text),
    st.builds(Close, numbers, good_text),
    st.builds(Over, numbers, good_text),
)
SAMPLES = [msgspec.msgpack.encode(word) for word in (Accept("f", "chat", ((b"a", b"b"),)), Part(b"x"), Taken(1, 2, "f"), Close(1000, "r"))]


@given(st.sampled_from(SAMPLES).flatmap(bytes_like) | plain.map(msgspec.msgpack.encode))
def test_any_bytes_are_a_word_or_left_out(raw: bytes) -> None:
    word = read_word(InboxEntry(1, "id", SESSION_KIND, 0, raw))
    assert word is None or isinstance(word, Word)


@given(words)
def test_what_was_written_is_read(word: Word) -> None:
    entry = msgspec.msgpack.decode(entry_of("id", 3, word), type=InboxEntry)
    assert read_word(entry) == word


@given(st.lists(st.tuples(st.integers(0, 4), words), max_size=12))
async def test_a_link_hears_anything(heard: list[tuple[int, Word]]) -> None:
    links = Links(EmbeddedStore(), "own", "peer", CloseCode.RESTART)
    link = Link("id", "peer", links, lambda: None)
    links.add(link)
    link.offer("hello")
    link.flush()
    for seq, word in heard:
        links.hear(InboxEntry(1, "id", SESSION_KIND, seq, msgspec.msgpack.encode(word)))
        link.take()
    link.lose(CloseCode.RESTART)
    assert not len(links)
