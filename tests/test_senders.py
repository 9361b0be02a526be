"""Whose sealed pickles a replica of the distributed form would open; the seal itself is tested elsewhere."""

import pytest

from mqserve.broker.codecs import JSON, PICKLE
from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.errors import BadEnvelope
from mqserve.broker.settings import Settings
from mqserve.replicas.senders import Senders

URLS = {"MQSERVE_BROKER_URL": "amqp://b", "MQSERVE_STORE_URL": "redis://s"}


def message(user_id: str, content_type: str = PICKLE, origin: str = "handle") -> Envelope:
    return Envelope("", b"", content_type, Header(origin=origin), user_id=user_id)


def test_a_pickle_needs_a_user() -> None:
    senders = Senders(Settings.read(URLS))
    senders.check(message("anybody"))
    with pytest.raises(BadEnvelope, match="user_id"):
        senders.check(message(""))
    with pytest.raises(BadEnvelope, match="user_id"):
        senders.check(message("", f"{PICKLE.upper()}; charset=utf-8"))


def test_where_trusted_users_are_named_it_needs_one_of_them() -> None:
    senders = Senders(Settings.read({**URLS, "MQSERVE_TRUSTED_USERS": "client, replica"}))
    for trusted in ("client", "replica"):
        senders.check(message(trusted))
    for stranger in ("proxy", ""):
        with pytest.raises(BadEnvelope):
            senders.check(message(stranger))


def test_plain_data_is_anybodys() -> None:
    senders = Senders(Settings.read({**URLS, "MQSERVE_TRUSTED_USERS": "client"}))
    senders.check(message("", JSON))
    senders.check(message("proxy", origin="http"))  # whatever a web client calls it, it is never opened


def test_in_one_process_there_are_no_users() -> None:
    Senders(Settings.read({})).check(message(""))
