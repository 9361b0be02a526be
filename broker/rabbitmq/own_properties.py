"""Reads the properties of requests that our own senders wrote, in a third of pamqp's time.

The time saved pays for checking seals. Any other content header is left to pamqp; both readers give the same result for the headers that
both can read.
"""

from __future__ import annotations

import struct
from typing import Any

from pamqp.commands import Basic
from pamqp.header import ContentHeader

_BYTE_ARRAY = ord("x")
_USER_ID = 1 << 4
# the flags that our senders set, all of them and no other: content type, headers, delivery mode, expiration, message id
_OURS = 1 << 15 | 1 << 13 | 1 << 12 | 1 << 8 | 1 << 7
_beginning = struct.Struct(">HHQHB").unpack_from  # class, weight, size of the body, flags, length of the content type
_length = struct.Struct(">I").unpack_from


def read_ours(frame: bytes) -> ContentHeader | None:
    """Returns the content header of a frame's payload, or None if our senders never write such a header or if it is cut off."""
    try:
        return _read(frame)
    except (struct.error, IndexError, UnicodeDecodeError):
        return None


def _read(frame: bytes) -> ContentHeader | None:
    class_id, weight, body_size, flags, length = _beginning(frame)
    if flags & ~_USER_ID != _OURS:
        return None
    properties = Basic.Properties.__new__(Basic.Properties)  # skip the constructor, which sets and checks all that is set here
    at = 15 + length
    properties.content_type = frame[15:at].decode()
    headers = _read_table(frame, at)
    if headers is None:
        return None
    properties.headers, at = headers
    properties.delivery_mode = frame[at]
    at, properties.expiration = _read_text(frame, at + 1)
    at, properties.message_id = _read_text(frame, at)
    properties.user_id = None
    if flags & _USER_ID:
        at, properties.user_id = _read_text(frame, at)
    if at != len(frame):  # a length leads beyond the end, or bytes are left over
        return None
    properties.content_encoding = properties.priority = properties.correlation_id = properties.reply_to = None
    properties.timestamp = properties.message_type = properties.app_id = None
    properties.cluster_id = ""
    header = ContentHeader.__new__(ContentHeader)
    header.class_id, header.weight, header.body_size, header.properties = class_id, weight, body_size, properties
    return header


def _read_table(frame: bytes, at: int) -> tuple[dict[str, Any], int] | None:
    """Returns the entries, all byte arrays as our senders write them, and the end offset; None if an entry has another type."""
    end = at + 4 + _length(frame, at)[0]
    at += 4
    headers: dict[str, Any] = {}
    while at < end:
        kind = at + 1 + frame[at]
        if frame[kind] != _BYTE_ARRAY:
            return None
        begin = kind + 5
        stop = begin + _length(frame, kind + 1)[0]
        headers[frame[at + 1 : kind].decode()] = bytearray(frame[begin:stop])
        at = stop
    return (headers, at) if at == end else None


def _read_text(frame: bytes, at: int) -> tuple[int, str]:
    end = at + 1 + frame[at]
    return end, frame[at + 1 : end].decode()
