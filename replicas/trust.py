"""Decides whose `mq` headers count and whose sealed pickles are opened. Everybody may publish plain data."""

from __future__ import annotations

from ..broker.envelope import Envelope
from ..broker.errors import BackendFailed, BadEnvelope, BadSignature
from ..broker.rabbitmq.connection import user_of
from ..broker.settings import Settings
from ..broker.values.codecs import PICKLE, media_type
from ..broker.values.header_seals import Seal

_CLAIMS = "the mq header says more than a direct publisher may (deadline, meta.call, job.callback)"


class SenderTrust:
    """Checks the sender of a message by the seal of its header, which needs the secret key, and by AMQP's `user_id`: RabbitMQ refuses a
    message whose `user_id` is not its connection's user.

    Raises BackendFailed if neither can identify senders.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_checked = not settings.embedded  # in one process there are no strangers
        self._has_key = bool(settings.secret_keys)
        self._pickle_users = frozenset(settings.trusted_users)
        self._header_users = frozenset(settings.header_users)
        if self._is_checked and not self._has_key:
            self._header_users = self._header_users or frozenset((_own_user(settings),))
        self.demands_seals = False  # True once all members that send requests are known to seal them

    def __repr__(self) -> str:
        return f"<SenderTrust, {'sealed' if self._has_key and self.demands_seals else ', '.join(sorted(self._header_users)) or 'anybody'}>"

    def check_header(self, envelope: Envelope) -> None:
        """Raises BadSignature for a header whose sender is not trusted; nothing in it may be used."""
        if envelope.seal is Seal.VALID:
            if envelope.reply_to and envelope.reply_to != _sealed_reply_to(envelope):
                raise BadSignature("a sealed message with a reply_to was not sent by mqserve: somebody repeats it to have the answer")
            return
        if not self._is_checked or not envelope.header.claims:
            return
        if envelope.seal is Seal.FOREIGN:
            raise BadSignature(f"{_CLAIMS}, and its seal is of a key that is not known here: all processes need one MQSERVE_SECRET_KEY")
        if envelope.seal is Seal.BROKEN:
            raise BadSignature(f"{_CLAIMS}, and its seal does not fit: it was made for another message, backend or namespace")
        if self._has_key and self.demands_seals:
            raise BadSignature(
                f"{_CLAIMS}, and it has no seal: leave the header out, or, in a process of mqserve, update it and set MQSERVE_SECRET_KEY"
            )
        if self._header_users and envelope.user_id not in self._header_users:
            raise BadSignature(
                f"{_CLAIMS}, and RabbitMQ's user {envelope.user_id!r}, who sent it without a seal, is none whose headers count: leave the "
                "header out, or, in a process of mqserve, set MQSERVE_SECRET_KEY everywhere or MQSERVE_HEADER_USERS at its replicas"
            )

    def check_pickle(self, envelope: Envelope) -> None:
        """Raises BadEnvelope, before anything is decoded, for a pickle without a `user_id` or with one that is not trusted."""
        if not self._is_checked or envelope.header.origin == "http":  # the body of an HTTP request is never opened as a pickle
            return
        if media_type(envelope.content_type) != PICKLE and not envelope.carries:  # what a job carries may be pickles
            return
        if not envelope.user_id:
            raise BadEnvelope("a sealed pickle without the AMQP property user_id is not opened: set it to the sender's user, as handles do")
        if self._pickle_users and envelope.user_id not in self._pickle_users:
            raise BadEnvelope(
                f"a sealed pickle of RabbitMQ's user {envelope.user_id!r} is not opened: MQSERVE_TRUSTED_USERS of this replica names "
                f"{', '.join(sorted(self._pickle_users))}"
            )


def _sealed_reply_to(envelope: Envelope) -> str:
    return envelope.header.job.reply_to if envelope.header.job is not None else ""


def _own_user(settings: Settings) -> str:
    """Returns the RabbitMQ user of this process. Without a key its headers count unless other users are named, since all processes of a
    small instance share one user."""
    if user := user_of(settings.broker_url):
        return user
    raise BackendFailed(
        "without MQSERVE_SECRET_KEY replicas go by the RabbitMQ user of a message, and where processes log in by certificate none names "
        "its own: set MQSERVE_SECRET_KEY, the same for all processes"
    )
