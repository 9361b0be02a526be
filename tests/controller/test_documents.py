"""Reading one desired document after another: only what changed is decoded, and the result is that of decoding all of it."""

import random

import msgspec
import pytest

from mqserve.broker.errors import BadEnvelope
from mqserve.controller.state.documents import Backend, Desired, Endpoint
from mqserve.controller.state.reading import read_desired


def endpoint(name: str, backend: str = "b") -> Endpoint:
    return Endpoint(name, f"/{name}", ("GET",), {backend: 1.0})


MANY = Desired(
    version=1, backends={"b": Backend("b", "c0de", "f")}, endpoints={f"e{number}": endpoint(f"e{number}") for number in range(1000)}
)


def changed(desired: Desired, new: Endpoint) -> Desired:
    return msgspec.structs.replace(desired, version=desired.version + 1, endpoints={**desired.endpoints, new.name: new})


def test_a_change_of_one_endpoint_takes_over_all_others() -> None:
    before = read_desired(MANY.to_bytes())
    after = read_desired(changed(MANY, Endpoint("e7", None, ("GET",), {"b": 1.0})).to_bytes())
    assert [name for name in after.endpoints if after.endpoints[name] is not before.endpoints[name]] == ["e7"]
    assert after.endpoints["e7"].route is None and after.backends["b"] is before.backends["b"]


def test_what_is_read_is_what_the_bytes_say_whatever_was_read_before() -> None:
    dice = random.Random(7)
    for _ in range(300):
        backends = {
            name: Backend(name, "c0de", "f", {"num_replicas": dice.randint(1, 2)}, version=dice.randint(1, 2)) for name in ("a", "b")
        }
        endpoints = {name: endpoint(name, dice.choice("ab")) for name in dice.sample("uvwxyz", dice.randint(0, 6))}
        desired = Desired(version=dice.randint(1, 9), instance=dice.choice("ij"), backends=backends, endpoints=endpoints)
        found = read_desired(desired.to_bytes())
        assert found == desired and list(found.endpoints) == list(endpoints)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"e7":{"name":"e7"', b'"e7":{"name":"e8"', "'e7' is called 'e8' inside"),
        (b'"e7":{', b'"x7":{', "'x7' is called 'e7' inside"),
        (b'"name":"b"', b'"name":"c"', "'b' is called 'c' inside"),
        (b'"backends":{"b":', b'"backends":{"c":', "which is no backend"),
        (b'"settings":{}', b'"settings":{"num_replicas":0}', "bad config"),
        (b'"/e7","methods"', b'"/e7","methodz"', "does not parse"),
        (b'"version":1', b'"version":-1', "does not parse"),
    ],
)
def test_a_document_that_went_wrong_is_refused_with_a_sentence(old: bytes, new: bytes, says: str) -> None:
    good = MANY.to_bytes()
    read_desired(good)
    assert old in good
    with pytest.raises(BadEnvelope, match=says):
        read_desired(good.replace(old, new, 1))
    assert read_desired(good) == MANY
