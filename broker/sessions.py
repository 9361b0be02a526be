"""A WebSocket session between a proxy and a replica: what the two tell each other, with both directions of its wire form.

A session begins as a request. Its replica accepts it by an entry in the proxy's inbox, and from then on each side appends to the other's
list: the proxy to the replica's feed, the replica to the proxy's inbox. An entry is an InboxEntry of SESSION_KIND: the id of the session,
a number, and one of the words below. Parts and the close of each direction are numbered from 1; the other words have number 0. Nothing of a
session is stored: an entry that was lost is a gap, which ends it. docs/protocol.md has the contract.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from enum import IntEnum

import msgspec

from .envelope import MINTED_ID_LENGTH, Envelope, Pairs
from .errors import UNPARSABLE
from .results import SESSION_KIND, InboxEntry
from .streams import FRAME_BYTES

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_REASON_BYTES = 123  # of a close: a control frame takes no more
SCHEMES = frozenset(("ws", "wss"))


class CloseCode(IntEnum):
    """The close codes that we send ourselves (RFC 6455 and IANA's registry)."""

    NORMAL = 1000
    GOING_AWAY = 1001  # the proxy drains
    ABNORMAL = 1006  # told to an app whose client has gone without a close; never sent
    NO_TEXT = 1007  # a text message is no UTF-8
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011  # the app raised
    RESTART = 1012  # the replica has gone, or a message was lost


class Accept(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The app took the handshake. `feed` is the list that takes what the client sends."""

    feed: str
    subprotocol: str = ""
    headers: Pairs = ()


class Part(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A message, or a part of one: `more` says that it goes on in the next part."""

    data: bytes
    text: bool = False
    more: bool = False


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Credit, and a sign of life: all parts up to `seq` were taken, and `sent` is the number of the last one that went the other way.
    `sender` is the list by which the sender is reached."""

    seq: int
    sent: int
    sender: str


class Close(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The close of a WebSocket, behind all parts before it."""

    code: int = CloseCode.NORMAL
    reason: str = ""


class Over(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The session is not there any more: what was sent before may be lost."""

    code: int
    reason: str = ""


Word = Accept | Part | Taken | Close | Over


def entry_of(session_id: str, seq: int, word: Word) -> bytes:
    return InboxEntry(1, session_id, SESSION_KIND, seq, _encode(word)).to_bytes()


def read_word(entry: InboxEntry) -> Word | None:
    """Returns what an entry of SESSION_KIND says, or None for a word that this process does not know."""
    try:
        return _decode(entry.payload)
    except UNPARSABLE:
        return None


def new_session_id(request_id: str) -> str:
    """Returns an id for the session of one run: a request that runs again begins another session."""
    return f"{request_id}.{secrets.token_hex(4)}"


def request_of(session_id: str) -> str:
    return session_id[:MINTED_ID_LENGTH]


def is_handshake(envelope: Envelope) -> bool:
    header = envelope.header
    return header.origin == "http" and header.meta.scheme in SCHEMES


def parts_of(message: str | bytes) -> Iterator[Part]:
    """Cuts one message into parts of at most FRAME_BYTES."""
    data, text = (message.encode(), True) if isinstance(message, str) else (message, False)
    for start in range(0, len(data) or 1, FRAME_BYTES):
        yield Part(data[start : start + FRAME_BYTES], text, start + FRAME_BYTES < len(data))


def is_close_code(code: object) -> bool:
    """Whether a close frame may carry it."""
    return isinstance(code, int) and (code in _CODES or 3000 <= code < 5000)


_CODES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))
_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Word] = msgspec.msgpack.Decoder(Word).decode
