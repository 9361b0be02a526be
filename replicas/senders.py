"""Whose sealed pickles a replica opens: a second lock beside the seal, which RabbitMQ keeps."""

from __future__ import annotations

from ..broker.codecs import PICKLE, media_type
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope
from ..broker.settings import Settings


class Senders:
    """The broker vouches for `user_id`: it refuses a message with another than its connection's own."""

    def __init__(self, settings: Settings) -> None:
        self._is_checked = not settings.embedded  # in one process there is nobody else
        self._trusted = frozenset(settings.trusted_users)

    def __repr__(self) -> str:
        return f"<Senders {', '.join(sorted(self._trusted)) or 'anybody with a name'}>"

    def check(self, envelope: Envelope) -> None:
        """Raises BadEnvelope, before anything is decoded, for a pickle that nobody or nobody trusted put his name to."""
        if not self._is_checked or envelope.header.origin == "http" or media_type(envelope.content_type) != PICKLE:
            return  # of HTTP a pickle is only bytes: its body is never opened as one
        if not envelope.user_id:
            raise BadEnvelope("a sealed pickle without the AMQP property user_id is not opened: set it to the sender's user, as handles do")
        if self._trusted and envelope.user_id not in self._trusted:
            raise BadEnvelope(
                f"a sealed pickle of RabbitMQ's user {envelope.user_id!r} is not opened: MQSERVE_TRUSTED_USERS of this replica names "
                f"{', '.join(sorted(self._trusted))}"
            )
