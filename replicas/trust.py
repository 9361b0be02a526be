"""Who may be believed: whose `mq` headers count, and whose sealed pickles are opened. Everybody may publish plain data."""

from __future__ import annotations

from ..broker.envelope import Envelope
from ..broker.errors import BackendFailed, BadEnvelope, BadSignature
from ..broker.rabbitmq.connection import user_of
from ..broker.settings import Settings
from ..broker.values.codecs import PICKLE, media_type
from ..broker.values.header_seals import Seal

_CLAIMS = "the mq header says more than a direct publisher may (deadline and meta.call)"


class SenderTrust:
    """Goes by the seal of the header, which only a holder of the secret key can make, and by AMQP's `user_id`: RabbitMQ refuses a message
    that names another user than its connection's own.

    Raises BackendFailed where neither can tell who sent a message.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_checked = not settings.embedded  # in one process there is nobody else
        self._has_key = bool(settings.secret_keys)
        self._pickle_users = frozenset(settings.trusted_users)
        self._header_users = frozenset(settings.header_users)
        if self._is_checked and not self._has_key:
            self._header_users = self._header_users or frozenset((_own_user(settings),))
        self.demands_seals = False  # until all who send requests are known to seal them

    def __repr__(self) -> str:
        return f"<SenderTrust, {'sealed' if self._has_key and self.demands_seals else ', '.join(sorted(self._header_users)) or 'anybody'}>"

    def check_header(self, envelope: Envelope) -> None:
        """Raises BadSignature for a header that is not believed: nothing that it says may count."""
        if envelope.seal is Seal.VALID:
            if envelope.reply_to:
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
        """Raises BadEnvelope, before anything is decoded, for a pickle that nobody or nobody trusted put his name to."""
        if not self._is_checked or envelope.header.origin == "http" or media_type(envelope.content_type) != PICKLE:
            return  # of HTTP a pickle is only bytes: its body is never opened as one
        if not envelope.user_id:
            raise BadEnvelope("a sealed pickle without the AMQP property user_id is not opened: set it to the sender's user, as handles do")
        if self._pickle_users and envelope.user_id not in self._pickle_users:
            raise BadEnvelope(
                f"a sealed pickle of RabbitMQ's user {envelope.user_id!r} is not opened: MQSERVE_TRUSTED_USERS of this replica names "
                f"{', '.join(sorted(self._pickle_users))}"
            )


def _own_user(settings: Settings) -> str:
    """Whose headers count without a key, unless others are named: all processes of a small instance share one user."""
    if user := user_of(settings.broker_url):
        return user
    raise BackendFailed(
        "without MQSERVE_SECRET_KEY replicas go by the RabbitMQ user of a message, and where processes log in by certificate none names "
        "its own: set MQSERVE_SECRET_KEY, the same for all processes"
    )
