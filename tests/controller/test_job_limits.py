"""How long a job may run on the broker that there is."""

import pytest

from mqserve.broker.errors import BadValue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.redis.refusals import almost_full
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.changes import commit, create_backend, update_backend_config
from mqserve.controller.job_limits import job_limit_s, job_problems
from mqserve.controller.lease import claim_instance
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.documents import Backend, Desired, Observed
from tests.controller.test_leading import HTTP

KEYS = StoreKeys("tests")
DAY_S = 24 * 3600


@pytest.mark.parametrize(
    ("version", "limit_s"), [("3.10.8", 1500), ("3.11.0", 1500), ("3.12.0", 0), ("3.13.1-rc.2", 0), ("4.3.0", 0), ("", 0), ("odd", 0)]
)
def test_a_rabbitmq_before_3_12_limits_the_run_of_a_job_by_its_configuration(version: str, limit_s: int) -> None:
    assert job_limit_s(version, 1800) == limit_s


def test_the_default_is_lowered_to_the_limit_and_what_was_asked_for_is_a_problem() -> None:
    desired = Desired(backends={name: Backend(name, "", name, settings) for name, settings in BACKENDS.items()})
    assert [backend.config.longest_job_s(1500) for backend in desired.backends.values()] == [1500, 60, 1500]
    assert desired.backends["default"].config.longest_job_s(0) == 3600
    problems = job_problems(desired, 1500)
    assert list(problems) == ["long"] and "MQSERVE_CONSUMER_TIMEOUT_S" in problems["long"]
    assert job_problems(desired, 0) == {}


BACKENDS = {"default": {}, "short": {"job_timeout_s": 60}, "long": {"job_timeout_s": 7200}}


@pytest.mark.anyio
async def test_a_deployment_that_asks_for_more_is_refused_and_one_of_another_backend_is_not() -> None:
    store = EmbeddedStore("tests")
    held = await claim_instance(store, KEYS, "", HTTP, detached=True)
    await commit(store, KEYS, held.id, create_backend(Backend("early", "", "early", {"job_timeout_s": DAY_S})))
    await store.set(KEYS.observed, Observed(job_limit_s=1500).to_bytes())
    with pytest.raises(BadValue, match=r"consumer_timeout in rabbitmq\.conf"):
        await commit(store, KEYS, held.id, create_backend(Backend("b", "", "b", {"job_timeout_s": 1501})))
    committed = await commit(store, KEYS, held.id, create_backend(Backend("b", "", "b", {"job_timeout_s": 1500})))
    assert set(committed.backends) == {"early", "b"}
    with pytest.raises(BadValue, match="job_timeout_s is 7200"):
        await commit(store, KEYS, held.id, update_backend_config("b", {"job_timeout_s": 7200}))


@pytest.mark.parametrize(
    ("settings", "is_async", "held"),
    [
        ({}, True, 50),
        ({}, False, 1),
        ({"sync_threads": 8}, False, 4),
        ({"max_batch_size": 32}, False, 32),
        ({"max_concurrent_queries": 1}, True, 1),
        ({"job_slots": 7}, False, 7),
    ],
)
def test_jobs_take_half_of_what_a_replica_runs_unless_it_is_told(settings: dict[str, int], is_async: bool, held: int) -> None:
    assert BackendConfig.model_validate(settings).held_jobs(is_async) == held


@pytest.mark.parametrize("wrong", [{"job_slots": 0}, {"job_timeout_s": 8 * DAY_S}, {"result_ttl_s": 0}, {"result_ttl_s": 31 * DAY_S}])
def test_settings_of_jobs_have_limits(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BackendConfig.model_validate(wrong)


@pytest.mark.parametrize("text", ["0", "-1", "an hour", "inf", "nan"])
def test_the_consumer_timeout_that_is_told_has_to_be_a_time(text: str) -> None:
    with pytest.raises(BadValue, match="MQSERVE_CONSUMER_TIMEOUT_S"):
        Settings.read({"MQSERVE_CONSUMER_TIMEOUT_S": text})


def test_the_consumer_timeout_reaches_children() -> None:
    urls = {"MQSERVE_BROKER_URL": "amqp://localhost", "MQSERVE_STORE_URL": "redis://localhost"}
    told = Settings.read({**urls, "MQSERVE_CONSUMER_TIMEOUT_S": "86700"})
    assert told.to_env()["MQSERVE_CONSUMER_TIMEOUT_S"] == "86700"
    assert "MQSERVE_CONSUMER_TIMEOUT_S" not in Settings.read(urls).to_env()


@pytest.mark.parametrize(
    ("used", "was_full", "is_full"), [(79, False, False), (80, False, True), (76, True, True), (74, True, False), (76, False, False)]
)
def test_a_store_is_almost_full_from_80_percent_until_it_is_below_75(used: int, was_full: bool, is_full: bool) -> None:
    assert bool(almost_full({"maxmemory": 100, "used_memory": used}, was_full=was_full)) == is_full
    assert not almost_full({"maxmemory": 0, "used_memory": used}, was_full=was_full)
