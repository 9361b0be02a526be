"""Whatever a handler raises, its request is answered and the next one is served: in both forms, by all kinds of handler."""

from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mqserve as serve
from tests.instances import new_name
from tests.odd_exceptions import BASES, ODDITIES, Frozen, FrozenSlots, odd_exception

TIMEOUT_S = 20
Request = Any

specs = st.fixed_dictionaries(
    {
        "base": st.sampled_from(sorted(BASES)),
        "oddities": st.lists(st.sampled_from(sorted(ODDITIES)), max_size=4, unique=True),
        "odd_class": st.booleans(),
    }
)


def fail_as(spec: Any) -> str:
    if isinstance(spec, dict):
        raise odd_exception(**spec)
    if spec == "frozen":
        raise Frozen("x-17")
    if spec == "frozen slots":
        raise FrozenSlots("x-17")
    return "fine"


def plain(request: Request) -> str:
    return fail_as(request.data)


async def later(request: Request) -> str:
    return fail_as(request.data)


@serve.accept_batch
def batch(requests: list[Request]) -> list[str]:
    return [fail_as(request.data) for request in requests]


@serve.accept_batch
async def batch_later(requests: list[Request]) -> list[str]:
    return [fail_as(request.data) for request in requests]


HANDLERS = {"plain": plain, "pooled": plain, "later": later, "batch": batch, "batch_later": batch_later}


class Deployed(NamedTuple):
    handle: serve.Handle
    url: str


@pytest.fixture(scope="module", params=sorted(HANDLERS))
def deployed(client: serve.Client, request: pytest.FixtureRequest) -> Deployed:
    name = new_name(request.param)
    client.create_backend(name, HANDLERS[request.param], config={"sync_threads": 2 if request.param == "pooled" else 1})
    client.create_endpoint(name, backend=name, route=f"/{name}", methods=["POST"])
    return Deployed(client.get_handle(name), f"{client.http_url()}/{name}")


def check_answered(deployed: Deployed, spec: Any) -> None:
    response = httpx.post(deployed.url, json=spec, timeout=TIMEOUT_S)
    assert response.status_code in (429, 500, 504) and len(response.content) < 10_000
    assert response.headers["content-type"] == "application/problem+json"
    ref = deployed.handle.remote(spec)
    try:
        ref.result(TIMEOUT_S)
        raised: type = type(None)
    except BaseException as error:
        raised = type(error)  # the exception itself is not to be looked at by anybody
    assert ref.done() and issubclass(raised, Exception)
    assert deployed.handle.remote("a good one").result(TIMEOUT_S) == "fine"


@given(spec=specs)
def test_any_exception_is_an_answer(deployed: Deployed, spec: dict[str, Any]) -> None:
    check_answered(deployed, spec)


@pytest.mark.parametrize("spec", ["frozen", "frozen slots"])
def test_an_exception_that_refuses_every_attribute_is_an_answer(deployed: Deployed, spec: str) -> None:
    check_answered(deployed, spec)


@pytest.mark.parametrize("oddity", sorted(ODDITIES))
@pytest.mark.parametrize("base", ["Exception", "Overloaded"])
def test_each_oddity_by_itself_is_an_answer(deployed: Deployed, base: str, oddity: str) -> None:
    check_answered(deployed, {"base": base, "oddities": [oddity], "odd_class": False})


@pytest.mark.parametrize("base", sorted(BASES))
def test_each_exception_by_itself_is_an_answer(deployed: Deployed, base: str) -> None:
    check_answered(deployed, {"base": base, "oddities": [], "odd_class": True})
