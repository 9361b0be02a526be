"""Replicas of a quick plain handler hold requests ahead: none is blamed for a poison beside it, lost, or kept behind a slow call."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until

pytestmark = distributed_only

HELD = 64


def quick_but(gate: Gate) -> Callable[[Any], str]:
    """A handler of 7 µs, except for poison, which kills its replica at once, and what waits at the gate."""

    def handler(request: Any) -> str:
        if request.data == "poison":
            os._exit(1)
        if request.data == "slow":
            gate.pass_through()
        return f"{request.data}"

    return handler


def look_ahead(handle: serve.Handle) -> None:
    """Until replicas hold as many as they may: a round trip for each of these would take longer."""
    for _ in range(8):
        assert serve.get([handle.remote("bread") for _ in range(300)], timeout=60) == ["bread"] * 300


@pytest.mark.row(16)
@pytest.mark.parametrize("poisons", [10, pytest.param(50, marks=pytest.mark.long)])
def test_poisons_are_set_aside_and_none_of_the_innocents_beside_them(
    client: serve.Client, deploy: Deploy, gate: Gate, poisons: int
) -> None:
    """Each death takes up to 64 with it, again and again, and `max_attempts=1` forgives nobody a single mark."""
    name = deploy(quick_but(gate), num_replicas=2, max_attempts=1, request_timeout_s=600)
    handle = client.get_handle(name)
    look_ahead(handle)
    refs = {number: handle.remote("poison" if number % 21 == 20 else f"bread {number}") for number in range(21 * poisons)}
    for number, ref in refs.items():
        if number % 21 == 20:
            with pytest.raises(serve.RemoteError, match="Poison"):
                ref.result(600)
        else:
            assert ref.result(600) == f"bread {number}"


@pytest.mark.row(16)
@pytest.mark.long
def test_poisons_slow_calls_and_drains_together_lose_none_of_a_thousand_innocents(client: serve.Client, deploy: Deploy) -> None:
    """Run times of 7 µs and 1 s are mixed, and replicas go and come while their windows are full. `max_attempts=1` forgives no slow call a
    start mark that it has left behind."""

    def handler(request: Any) -> str:
        if request.data == "poison":
            os._exit(1)
        if request.data == "slow":
            time.sleep(1)
        return f"{request.data}"

    name = deploy(handler, num_replicas=2, max_attempts=1, request_timeout_s=600)
    handle = client.get_handle(name)
    look_ahead(handle)
    words = {number: "poison" if number % 21 == 20 else "slow" if number % 50 == 7 else f"bread {number}" for number in range(1050)}
    assert sum(word == "poison" for word in words.values()) == 50
    refs = {number: handle.remote(word) for number, word in words.items()}
    for replicas in (1, 2, 1, 2):
        client.update_backend_config(name, {"num_replicas": replicas})
    for number, ref in refs.items():
        if words[number] == "poison":
            with pytest.raises(serve.RemoteError, match="Poison"):
                ref.result(600)
        else:
            assert ref.result(600) == words[number]


@pytest.mark.row(19)
def test_none_waits_behind_a_slow_call_while_another_replica_is_idle(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gates = [Gate(tmp_path) for _ in range(5)]

    def handler(request: Any) -> str:
        if isinstance(request.data, int):
            gates[request.data].pass_through()
        return f"{request.data}"

    handle = client.get_handle(deploy(handler, num_replicas=2))
    for number, gate in enumerate(gates):
        look_ahead(handle)
        before = [handle.remote("bread") for _ in range(HELD)]
        slow = handle.remote(number)
        behind = [handle.remote("bread") for _ in range(4 * HELD)]
        assert serve.get([*before, *behind], timeout=20) == ["bread"] * 5 * HELD
        assert not slow.done()
        gate.open()
        assert slow.result(20) == str(number)


@pytest.mark.row(26)
def test_a_drain_with_a_full_window_loses_and_fails_none(client: serve.Client, deploy: Deploy, gate: Gate, members: Members) -> None:
    name = deploy(quick_but(gate), num_replicas=2)
    handle = client.get_handle(name)
    gate.open()
    for replicas in (1, 2, 1, 2):
        look_ahead(handle)
        refs = [handle.remote("slow" if number % 100 == 99 else f"{number}") for number in range(1000)]
        client.update_backend_config(name, {"num_replicas": replicas})
        refs += [handle.remote(f"{number}") for number in range(1000)]
        assert [answer for answer in serve.get(refs, timeout=60) if answer != "slow"] == [
            *(f"{number}" for number in range(1000) if number % 100 != 99),
            *(f"{number}" for number in range(1000)),
        ]
    wait_until(lambda: len(members.beats("replica", name)) == 2)
