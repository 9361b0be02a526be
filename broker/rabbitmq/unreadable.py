"""Handles AMQP properties that pamqp cannot parse, such as an id that is not UTF-8 or a time in the year 300000000.

RabbitMQ carries them as they are, and pamqp's error would end the connection of the consumer: the message is redelivered, and ends the
next connection. So the header frame is read all the same, and `Envelope.from_amqp` refuses the message.

It replaces a function with a private name; `tests/fuzz/test_envelope.py` fails when that moves. Properties that pamqp can read are read
as before.
"""

from __future__ import annotations

import struct

from pamqp import frame
from pamqp.header import ContentHeader

from ..envelope import UnreadableProperties
from .own_properties import read_ours


def install() -> None:
    """Makes pamqp read header frames this way, on all connections of this process."""
    frame._unmarshal_header_frame = read_header


def read_header(frame_data: bytes) -> ContentHeader:
    """Reads the payload of a content header's frame. Properties that cannot be read are UnreadableProperties."""
    if (ours := read_ours(frame_data)) is not None:
        return ours
    try:
        return _read_strictly(frame_data)
    except Exception as error:  # ValueError and its kin, RecursionError, the errors of datetime and decimal
        if len(frame_data) < _FIXED_BYTES:  # no broker sends that: aiormq ends the connection
            raise
        weight, body_size = struct.unpack(">HQ", frame_data[2:12])
        properties = UnreadableProperties()
        properties.why = str(error)[:200]
        return ContentHeader(weight, body_size, properties)


_FIXED_BYTES = 12  # class, weight, size of the body
_read_strictly = frame._unmarshal_header_frame
