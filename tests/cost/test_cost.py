"""What a request costs, in CPU time of our processes, against one of bare Starlette in the same minute: nobody makes it dearer unnoticed.

CPU time, since other tests run at the same time. A limit is about one and a half of what was measured when it was set, on an otherwise
idle machine: the loss of a shortcut of the hot path is beyond it. An error of the measurement is usually gone in another round, so one
good round of several is enough. `MQSERVE_TEST_CHECKOUT=<the folder of another checkout>` measures that one's mqserve.
"""

from collections.abc import Iterator

import pytest

from tests.cost.subjects import Subject, bare_starlette, instance
from tests.instances import SECRET_KEY, new_namespace

REQUESTS = 6000  # a quarter of a second of CPU time: /proc counts in hundredths
WARM_UP = 2000
ROUNDS = 6

LIMITS = {
    ("embedded", "coroutine"): {"program": 2.5},
    ("embedded", "plain"): {"program": 2.4},
    ("embedded", "handle"): {"program": 4.8},
    ("distributed", "coroutine"): {"proxy": 2.3, "replica": 2.8},
    ("distributed", "plain"): {"proxy": 2.3, "replica": 2.2},
    ("distributed", "handle"): {"program": 4.6, "replica": 2.8},
}


@pytest.fixture(scope="module")
def bare() -> Iterator[Subject]:
    with bare_starlette() as subject:
        subject.send("noop", WARM_UP)
        yield subject


@pytest.fixture(scope="module")
def ours(form: str, request: pytest.FixtureRequest) -> Iterator[Subject]:
    variables = {"MQSERVE_SECRET_KEY": SECRET_KEY, "MQSERVE_NAMESPACE": new_namespace("cost")}
    if form == "distributed":
        variables |= {f"MQSERVE_{name.upper()}": request.getfixturevalue(name) for name in ("broker_url", "store_url")}
    with instance(variables) as subject:
        yield subject


@pytest.mark.parametrize("scenario", ["coroutine", "plain", "handle"])
def test_a_request_costs_no_more_than_so_many_of_bare_starlette(form: str, scenario: str, bare: Subject, ours: Subject) -> None:
    limits = LIMITS[form, scenario]
    ours.send(scenario, WARM_UP)
    said: list[str] = []
    for _ in range(ROUNDS):
        base_us, costs_us = bare.cpu_us("noop", REQUESTS)["program"], ours.cpu_us(scenario, REQUESTS)
        ratios = {role: costs_us[role] / base_us for role in limits}
        told_us = {role: round(cost_us) for role, cost_us in costs_us.items()}
        said.append(f"{', '.join(f'{role} {ratio:.2f}' for role, ratio in ratios.items())}: {told_us} µs, and Starlette {base_us:.0f}")
        if all(ratios[role] <= limit for role, limit in limits.items()):
            return
    pytest.fail("\n".join([f"the limits are {limits}", *said]))
