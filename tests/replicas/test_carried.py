"""A job whose header says that it carries results of others: its handler gets their values, as a handle's call would give them."""

from typing import Any

import pytest

from mqserve.broker.envelope import Envelope, Header, JobHead
from mqserve.broker.errors import BadEnvelope
from mqserve.broker.results import Result
from mqserve.broker.settings import Settings
from mqserve.broker.values.carried import CARRIED, CarriedResult, carry_all, carry_one
from mqserve.broker.values.codecs import JSON, decode_value, encode_value
from mqserve.broker.values.signing import SealScope, Signer
from mqserve.replicas.execute import Execution
from mqserve.replicas.handler import make_handler
from mqserve.replicas.stages import KeptJob
from mqserve.replicas.trust import SenderTrust

ID = "0" * 32
SIGNER = Signer([b"k" * 32], "tests")


def told(request: Any) -> Any:
    return [repr(request.data), dict(request.query_params)]


def answer_to(body: bytes, origin: str, *, carried: bool = True) -> Any:
    execution = Execution("b", make_handler(told, []), SIGNER)
    envelope = Envelope(ID, body, CARRIED, Header(origin=origin, job=JobHead(carried=carried)))
    answer = execution.run(execution.handler.method(""), KeptJob(envelope, 1, None))  # type: ignore[arg-type]
    assert isinstance(answer, Result)
    assert answer.error is None, answer.error
    return decode_value(answer.body, answer.content_type, SIGNER, SealScope("result", "b", ID))


def result_of(value: Any) -> CarriedResult:
    return CarriedResult(*encode_value(value, SIGNER, SealScope("result", "a", "before")), "a", "before")


def test_a_handler_gets_the_value_of_the_job_before_it_even_if_that_is_a_pickle() -> None:
    assert answer_to(carry_one(result_of((1, 2))), "handle") == ["(1, 2)", {}]


def test_a_handler_gets_the_list_of_the_values_of_a_group() -> None:
    assert answer_to(carry_all([result_of(1), result_of("b")]), "handle") == ["[1, 'b']", {}]


def test_a_web_clients_job_goes_on_with_what_a_handle_would_have_got() -> None:
    assert answer_to(carry_one(CarriedResult(JSON, b'{"a": 1}', "a", "before")), "http") == ["{'a': 1}", {}]


def test_the_content_type_alone_makes_nothing_of_a_web_clients_body() -> None:
    body = carry_one(result_of(1))
    assert answer_to(body, "http", carried=False) == [repr(body), {}]


def test_a_job_that_may_carry_pickles_needs_a_sender_whose_pickles_are_opened() -> None:
    settings = {"MQSERVE_BROKER_URL": "amqp://b", "MQSERVE_STORE_URL": "redis://s", "MQSERVE_SECRET_KEY": "k" * 32}
    trust = SenderTrust(Settings.read({**settings, "MQSERVE_TRUSTED_USERS": "controllers"}))
    job = Envelope(ID, carry_one(result_of(1)), CARRIED, Header(origin="handle", job=JobHead(carried=True)), user_id="controllers")
    trust.check_pickle(job)
    with pytest.raises(BadEnvelope, match="MQSERVE_TRUSTED_USERS"):
        trust.check_pickle(Envelope(job.id, job.body, job.content_type, job.header, user_id="others"))
