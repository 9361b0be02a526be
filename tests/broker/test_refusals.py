"""A server's refusal as a sentence: who lacks what, and what shows the mend."""

import pytest

from mqserve.broker.rabbitmq.refusals import broker_refusal
from mqserve.broker.redis.refusals import store_refusal

URL = "amqp://proxy:hunter2@h/"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "ACCESS_REFUSED - access to queue 'n.backend.b' in vhost '/' refused for user 'proxy'",
            "a right of access to queue 'n.backend.b'",
        ),
        ("ACCESS_REFUSED - write access to exchange 'n.dead' in vhost 'v' refused for user 'proxy'", "write access to exchange 'n.dead'"),
        ("NOT_ALLOWED - access to vhost 'v' refused for user 'proxy'", "access to vhost 'v'"),
        ("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.", "the login of user 'proxy'"),
    ],
    ids=["3.10", "4.x", "another vhost", "login"],
)
def test_rabbitmqs_words_become_a_sentence(said: str, told: str) -> None:
    sentence = broker_refusal(Exception(said), URL)
    assert "'proxy'" in sentence and told in sentence
    assert "hunter2" not in sentence


def test_other_failures_are_not_called_refusals() -> None:
    for failure in (OSError("Connection refused"), TimeoutError(), Exception("NOT_FOUND - no queue 'x' in vhost '/'")):
        assert broker_refusal(failure, URL) == ""
        assert store_refusal(failure, "redis://h") == ""
    assert broker_refusal(None) == ""
