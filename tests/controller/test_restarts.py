"""When a dead replica may be replaced."""

import pytest

from mqserve.broker.errors import BackendFailed
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.client.effects import Seen
from mqserve.controller.changes import commit, create_backend
from mqserve.controller.lease import claim_instance
from mqserve.controller.restarts import AT_ONCE_LIMIT, AT_ONCE_WINDOW_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, Restarts
from mqserve.controller.state.beats import MemberState, NodeBeat, ReplicaBeat
from mqserve.controller.state.documents import Assignment, Backend, Observed, deaths_of
from mqserve.controller.state.reading import read_observed
from tests.controller.test_leading import HTTP, controllers, follows


def test_each_early_death_doubles_the_pause_up_to_a_limit() -> None:
    restarts = Restarts()
    pauses = []
    for _ in range(12):
        restarts.died_early(now=100.0, reason="no model")
        pauses.append(restarts.not_before - 100.0)
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert restarts.reason == "no model"


def test_a_replica_that_gets_ready_ends_the_pauses() -> None:
    restarts = Restarts()
    restarts.died_early(now=100.0, reason="no model")
    restarts.got_ready()
    assert restarts.reason == ""
    restarts.died_early(now=200.0, reason="no model")
    assert restarts.not_before == 200.0 + FIRST_PAUSE_S


def test_a_ready_replica_that_dies_is_replaced_at_once() -> None:
    restarts = Restarts()
    restarts.died_ready(now=100.0)
    assert restarts.not_before <= 100.0


def test_too_many_deaths_of_ready_replicas_are_slowed_down_with_a_reason() -> None:
    restarts = Restarts()
    for _ in range(AT_ONCE_LIMIT + 1):
        restarts.died_ready(now=100.0)
    assert restarts.not_before > 100.0 and "ready replicas died" in restarts.deaths
    assert not restarts.reason, "whoever waits for a change goes on waiting"


def test_deaths_long_ago_slow_nothing_down() -> None:
    restarts = Restarts()
    for _ in range(AT_ONCE_LIMIT):
        restarts.died_ready(now=100.0)
    restarts.died_ready(now=101.0 + AT_ONCE_WINDOW_S)
    assert restarts.not_before == 0.0


def test_a_backend_that_never_gets_ready_is_tried_for_ever() -> None:
    restarts = Restarts()
    for _ in range(2000):
        restarts.died_early(now=0.0, reason="no")
    assert restarts.not_before == LONGEST_PAUSE_S


def test_early_deaths_of_one_who_lived_since_are_forgotten() -> None:
    restarts = Restarts()
    for _ in range(5):
        restarts.died(now=100.0, reason="no store", lived_s=1)
    assert restarts.not_before == 100.0 + 16 * FIRST_PAUSE_S
    restarts.died(now=10_000.0, reason="killed", lived_s=9_000)
    assert restarts.not_before < 10_000.0, "at once"
    restarts.died(now=20_000.0, reason="no store", lived_s=1)
    assert restarts.not_before == 20_000.0 + FIRST_PAUSE_S


async def problems_after_deaths(number: int, *, takes: bool) -> dict[str, str]:
    """Returns what a leading controller says once so many replicas of the backend "b" are dead that had not said they were ready."""
    store, keys = EmbeddedStore(), StoreKeys("tests")
    held = await claim_instance(store, keys, "n", HTTP, detached=True)
    await commit(store, keys, held.id, create_backend(Backend("b", "sha", "b")))
    dead = {f"b#{index}": Assignment("b", "n", 1) for index in range(number)}
    await store.set(keys.observed, Observed(epoch=1, replicas=dead, queues={"b": (1,)}).to_bytes())
    now_ms = store.now_ms()
    beats = [ReplicaBeat(name, now_ms, state=MemberState.STARTING, node="n", backend="b", takes=takes) for name in dead]
    for beat in *beats, NodeBeat("n", now_ms + 60_000, ended=dict.fromkeys(dead, "exit code 1")):
        await store.put_field(keys.beats, beat.field, beat.to_bytes())
    async with controllers(store, keys) as running:
        running.start("first")
        await follows(store, keys, 1)
        return read_observed(await store.get(keys.observed)).problems


@pytest.mark.anyio
@pytest.mark.parametrize(("takes", "problem"), [(True, None), (False, "exit code 1")])
async def test_whoever_died_of_its_first_request_is_no_replica_that_cannot_start(takes: bool, problem: str | None) -> None:
    """It takes requests a moment before its beat says that it is ready."""
    assert (await problems_after_deaths(1, takes=takes)).get("b") == problem


@pytest.mark.anyio
async def test_a_change_goes_on_waiting_while_poison_kills_one_ready_replica_after_the_other() -> None:
    problems = await problems_after_deaths(AT_ONCE_LIMIT + 1, takes=True)
    assert "ready replicas died" in problems[deaths_of("b")]
    backend = Backend("b", "sha", "b")
    assert not Seen(Observed(seen=(1, 1), problems=problems), {}, 0).is_ready(backend, (1, 1), 0, [])
    with pytest.raises(BackendFailed, match="exit code 1"):
        Seen(Observed(seen=(1, 1), problems={"b": "exit code 1"}), {}, 0).is_ready(backend, (1, 1), 0, [])
