"""In the embedded form code does not travel: what runs is the program's own function or class, and values keep their classes."""

import dataclasses
import enum
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import mqserve as serve
from tests.instances import Deploy, started

LOCK = threading.Lock()
CALLS: list[Any] = []


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Order:
    pieces: int
    color: Color = Color.RED


class Model:
    mode = "default"

    def __init__(self, greeting: list[str]) -> None:
        self.greeting = greeting

    def __call__(self, request: serve.ServeRequest) -> Any:
        self.greeting.append("used")
        Model.mode = request.data or Model.mode
        return Model.mode, len(self.greeting)


@pytest.fixture(scope="module")
def deploy() -> Iterator[Deploy]:
    with started(location=None) as client:
        yield Deploy(client)


def ask(deploy: Deploy, name: str, value: Any = None) -> Any:
    return deploy.client.get_handle(name).remote(value).result(timeout=20)


def test_the_functions_globals_are_the_programs_also_those_that_do_not_pickle(deploy: Deploy) -> None:
    def handler(request: serve.ServeRequest) -> Any:
        with LOCK:
            CALLS.append(request.data)
            return len(CALLS)

    before = len(CALLS)
    assert ask(deploy, deploy(handler), "one") == before + 1
    assert CALLS[-1] == "one"


def test_a_class_is_constructed_by_each_replica_and_stays_the_programs_own(deploy: Deploy) -> None:
    call, greeting = Model.__call__, ["hello"]
    name = deploy(Model, greeting)
    assert ask(deploy, name, "set by a request") == ("set by a request", 2)
    assert (Model.__call__, Model.mode, greeting) == (call, "set by a request", ["hello"])
    deploy.client.update_backend_config(name, {"num_replicas": 2})
    assert Model.mode == "set by a request"


def test_values_arrive_with_the_classes_of_the_program_and_leave_them_alone(deploy: Deploy) -> None:
    @dataclasses.dataclass
    class Local:
        content: int
        seen = 0

    def handler(request: serve.ServeRequest) -> Any:
        order, local = request.data
        type(local).seen += 1
        return order == Order(2), order.color is Color.RED, type(local) is Local, local

    name = deploy(handler)
    assert ask(deploy, name, (Order(2), Local(3))) == (True, True, True, Local(3))
    assert ask(deploy, name, (Order(2), Local(3)))[2]
    assert Local.seen == 2


def test_a_required_field_stays_required(deploy: Deploy) -> None:
    def handler(request: serve.ServeRequest) -> Any:
        return [field.name for field in dataclasses.fields(Order) if field.default is dataclasses.MISSING]

    assert ask(deploy, deploy(handler)) == ["pieces"]
