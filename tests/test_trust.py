"""Whose `mq` headers a replica of the distributed form believes, and whose sealed pickles it would open."""

from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from mqserve.broker.envelope import NO_HEADER, Envelope, Header, JobHead, RequestHead
from mqserve.broker.errors import BackendFailed, BadEnvelope, BadSignature
from mqserve.broker.settings import Settings
from mqserve.broker.values.codecs import JSON, PICKLE
from mqserve.broker.values.header_seals import Seal
from mqserve.replicas.trust import SenderTrust

URLS = {"MQSERVE_BROKER_URL": "amqp://own@b", "MQSERVE_STORE_URL": "redis://s"}
KEY = {"MQSERVE_SECRET_KEY": "k" * 32}
OURS = Header(origin="handle", inbox="mqserve:mqserve:inbox:client-1")
CLAIMS = [
    Header(origin="http"),
    Header(origin="anything"),
    Header(inbox="mqserve:mqserve:inbox:client-1"),
    Header(ref="mqserve:mqserve:body:{x}"),
    Header(shadow=True),
    Header(once=True),
    Header(again=True),
    Header(meta=RequestHead(method="POST")),
    Header(meta=RequestHead(headers=((b"cookie", b"x"),))),
    Header(meta=RequestHead(client=("192.0.2.1", 1))),
    Header(meta=RequestHead(endpoint="other")),
    Header(job=JobHead(reply_to="theirs")),
]


def senders(env: Mapping[str, str] = {}, *, demands_seals: bool = False) -> SenderTrust:
    made = SenderTrust(Settings.read({**URLS, **env}))
    made.demands_seals = demands_seals
    return made


def message(header: Header = OURS, seal: Seal = Seal.NONE, user_id: str = "", **fields: Any) -> Envelope:
    return replace(Envelope("id", b"", JSON, header, seal=seal, user_id=user_id), **fields)


# Headers.


@pytest.mark.parametrize("demands_seals", [True, False])
@pytest.mark.parametrize("header", [NO_HEADER, Header(deadline=1), Header(deadline=1, meta=RequestHead(call="predict"))])
def test_what_every_publisher_may_say_counts_whatever_its_seal(header: Header, demands_seals: bool) -> None:
    for env in ({}, KEY):
        for seal in Seal:
            senders(env, demands_seals=demands_seals).check_header(message(header, seal))


@pytest.mark.parametrize("header", CLAIMS)
def test_anything_more_counts_only_with_a_seal_once_seals_are_demanded(header: Header) -> None:
    ours = senders(KEY, demands_seals=True)
    ours.check_header(message(header, Seal.VALID))
    for seal in (Seal.NONE, Seal.FOREIGN, Seal.BROKEN):
        with pytest.raises(BadSignature, match="says more than a direct publisher may"):
            ours.check_header(message(header, seal, user_id="own"))


def test_a_sealed_message_is_answered_only_where_its_seal_says() -> None:
    """As one that was published to an endpoint: the controller, which seals it, says in the header who asked."""
    sealed = message(Header(job=JobHead(reply_to="theirs")), Seal.VALID, reply_to="theirs")
    senders(KEY).check_header(sealed)
    for other in (replace(sealed, reply_to="mine"), message(OURS, Seal.VALID, reply_to="mine")):
        with pytest.raises(BadSignature, match="repeats it to have the answer"):
            senders(KEY).check_header(other)


@pytest.mark.parametrize("header", CLAIMS)
def test_until_seals_are_demanded_a_header_without_one_counts_and_one_with_a_bad_one_does_not(header: Header) -> None:
    updating = senders(KEY)
    updating.check_header(message(header))
    for seal in (Seal.FOREIGN, Seal.BROKEN):
        with pytest.raises(BadSignature):
            updating.check_header(message(header, seal))


@pytest.mark.parametrize("header", CLAIMS)
def test_without_a_key_a_header_counts_of_the_replicas_own_user(header: Header) -> None:
    for demands_seals in (True, False):
        keyless = senders(demands_seals=demands_seals)
        keyless.check_header(message(header, user_id="own"))
        for stranger in ("", "other"):
            with pytest.raises(BadSignature, match="MQSERVE_HEADER_USERS"):
                keyless.check_header(message(header, user_id=stranger))


def test_users_that_are_named_take_the_place_of_the_replicas_own() -> None:
    for env in ({}, KEY):
        named = senders({**env, "MQSERVE_HEADER_USERS": "proxy, client"})
        for user in ("proxy", "client"):
            named.check_header(message(user_id=user))
        for stranger in ("own", ""):
            with pytest.raises(BadSignature):
                named.check_header(message(user_id=stranger))


def test_a_trusted_user_is_no_seal() -> None:
    with pytest.raises(BadSignature, match="it has no seal"):
        senders({**KEY, "MQSERVE_HEADER_USERS": "proxy"}, demands_seals=True).check_header(message(user_id="proxy"))


def test_a_sealed_message_that_names_a_queue_to_answer_to_is_somebody_elses() -> None:
    with pytest.raises(BadSignature, match="repeats it"):
        senders(KEY).check_header(message(seal=Seal.VALID, reply_to="theirs"))


def test_no_refusal_tells_a_stranger_whose_headers_count() -> None:
    with pytest.raises(BadSignature) as refusal:
        senders({"MQSERVE_HEADER_USERS": "proxy"}).check_header(message(user_id="other"))
    assert "proxy" not in str(refusal.value)


def test_without_a_key_and_with_a_login_by_certificate_nobody_could_be_told_apart() -> None:
    with pytest.raises(BackendFailed, match="MQSERVE_SECRET_KEY"):
        senders({"MQSERVE_BROKER_URL": "amqps://b?auth=external"})
    senders({**KEY, "MQSERVE_BROKER_URL": "amqps://b?auth=external"})


# Pickles.


def pickled(user_id: str, content_type: str = PICKLE, origin: str = "handle") -> Envelope:
    return message(Header(origin=origin), Seal.VALID, user_id, content_type=content_type)


def test_a_pickle_needs_a_user() -> None:
    senders().check_pickle(pickled("anybody"))
    with pytest.raises(BadEnvelope, match="user_id"):
        senders().check_pickle(pickled(""))
    with pytest.raises(BadEnvelope, match="user_id"):
        senders().check_pickle(pickled("", f"{PICKLE.upper()}; charset=utf-8"))


def test_where_trusted_users_are_named_it_needs_one_of_them() -> None:
    named = senders({"MQSERVE_TRUSTED_USERS": "client, replica"})
    for trusted in ("client", "replica"):
        named.check_pickle(pickled(trusted))
    for stranger in ("proxy", ""):
        with pytest.raises(BadEnvelope):
            named.check_pickle(pickled(stranger))


def test_plain_data_is_anybodys() -> None:
    named = senders({"MQSERVE_TRUSTED_USERS": "client"})
    named.check_pickle(pickled("", JSON))
    named.check_pickle(pickled("proxy", origin="http"))  # whatever a web client calls it, it is never opened


def test_in_one_process_there_is_nobody_else() -> None:
    embedded = SenderTrust(Settings.read({}))
    embedded.check_header(message())
    embedded.check_pickle(pickled(""))
