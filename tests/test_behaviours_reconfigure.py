"""`reconfigure(user_config)`: at the start, at each change and only then, refused ones undone; and `check_health`. In both forms."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally


def seen_by_replicas(client: serve.Client, name: str, replicas: int) -> set[str]:
    """What so many replicas answer: {"tag=answer"}."""
    handle = client.get_handle(name)
    found: dict[str, Any] = {}

    def all_of_them() -> bool:
        found.update(dict(serve.get([handle.remote() for _ in range(4 * replicas)], timeout=30)))
        return len(found) == replicas

    wait_until(all_of_them)
    assert len(found) == replicas
    return {str(value) for value in found.values()}


class Threshold:
    """Slow enough for its siblings to get some of the requests."""

    def __init__(self) -> None:
        self.threshold: float | None = None

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.threshold = config["threshold"]

    def __call__(self, request: Any) -> list[Any]:
        time.sleep(0.01)
        return [serve.get_current_replica_tag(), self.threshold]


def noting(tally: Tally) -> type:
    """A class that notes each config it is told, and refuses what has a `bad` in it."""

    class Noting:
        told: Any = None

        def reconfigure(self, config: Any) -> None:
            tally.note(config)
            if "bad" in config:
                raise ValueError("this config is bad")
            self.told = config

        def __call__(self, request: Any) -> Any:
            return self.told

    return Noting


def test_the_user_config_is_told_before_the_first_request(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(Threshold, user_config={"threshold": 0.01})
    assert client.get_handle(name).remote().result(30)[1] == 0.01


def test_without_a_user_config_reconfigure_is_not_called(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    name = deploy(noting(tally))
    assert client.get_handle(name).remote().result(30) is None
    client.update_backend_config(name, {"max_concurrent_queries": 4})
    assert len(tally) == 0


def test_each_change_is_told_and_only_a_change(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    name = deploy(noting(tally), user_config={"a": 1})
    other = deploy(noting(Tally(tmp_path)), user_config={"b": 1})
    client.update_backend_config(name, {"user_config": {"a": 2}})
    client.update_backend_config(name, {"user_config": {"a": 2}})
    client.update_backend_config(name, {"max_concurrent_queries": 4})
    client.update_backend_config(other, {"user_config": {"b": 2}})
    client.update_backend_config(name, {"user_config": {"a": 1}})
    assert client.get_handle(name).remote().result(30) == {"a": 1}
    assert tally.lines == ["{'a': 1}", "{'a': 2}", "{'a': 1}"]


def test_a_falsy_user_config_is_told_too(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    name = deploy(noting(tally), user_config={})
    client.update_backend_config(name, {"user_config": []})
    assert tally.lines == ["{}", "[]"]


def test_two_replicas_have_it_a_third_gets_it_and_a_change_reaches_all_three(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(Threshold, num_replicas=2, user_config={"threshold": 1})
    assert seen_by_replicas(client, name, 2) == {"1"}
    client.update_backend_config(name, {"num_replicas": 3})
    assert seen_by_replicas(client, name, 3) == {"1"}
    client.update_backend_config(name, serve.BackendConfig(user_config={"threshold": 2}))
    assert seen_by_replicas(client, name, 3) == {"2"}, "update_backend_config returned before all of them had it"


def test_reconfigure_may_be_async(client: serve.Client, deploy: Deploy) -> None:
    class Slow:
        async def reconfigure(self, config: Any) -> None:
            await asyncio.sleep(0.05)
            self.config = config

        async def __call__(self, request: Any) -> Any:
            return self.config

    name = deploy(Slow, user_config="first")
    handle = client.get_handle(name)
    assert handle.remote().result(30) == "first"
    client.update_backend_config(name, {"user_config": "second"})
    assert handle.remote().result(30) == "second"


def test_a_change_of_config_keeps_the_replicas(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(Threshold, num_replicas=2, user_config={"threshold": 1})
    handle = client.get_handle(name)
    before = Counter(tag for tag, _ in serve.get([handle.remote() for _ in range(20)], timeout=30))
    client.update_backend_config(name, {"user_config": {"threshold": 2}})
    after = Counter(tag for tag, _ in serve.get([handle.remote() for _ in range(20)], timeout=30))
    assert set(after) <= set(before)


# Refusals.


def test_a_refused_config_is_reported_and_the_last_good_one_is_back(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    name = deploy(noting(tally), user_config="good")
    with pytest.raises(serve.BackendFailed, match="this config is bad"):
        client.update_backend_config(name, {"user_config": "bad"})
    assert client.get_handle(name).remote().result(30) == "good"
    assert client.get_backend_config(name).user_config == "good"
    client.update_backend_config(name, {"user_config": "better"})
    assert client.get_handle(name).remote().result(30) == "better"


def test_a_refused_config_takes_no_replica_out_of_service(client: serve.Client, deploy: Deploy) -> None:
    class Picky(Threshold):
        def reconfigure(self, config: dict[str, Any]) -> None:
            super().reconfigure(config)
            if config["threshold"] > 10:
                raise ValueError("too much")

    name = deploy(Picky, num_replicas=2, user_config={"threshold": 1})
    handle = client.get_handle(name)
    tags = {tag for tag, _ in serve.get([handle.remote() for _ in range(20)], timeout=30)}
    with pytest.raises(serve.BackendFailed, match="too much"):
        client.update_backend_config(name, {"user_config": {"threshold": 11}})
    assert seen_by_replicas(client, name, 2) == {"1"}
    assert {tag for tag, _ in serve.get([handle.remote() for _ in range(20)], timeout=30)} <= tags


def test_a_replica_that_refuses_its_last_good_config_as_well_is_replaced(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    made = Tally(tmp_path)

    class Fickle:
        def __init__(self) -> None:
            made.note("one")
            self.is_lost = False

        def reconfigure(self, config: str) -> None:
            self.is_lost = self.is_lost or config == "bad"
            if self.is_lost:
                raise ValueError(f"not {config}")
            self.config = config

        def __call__(self, request: Any) -> str:
            return "lost" if self.is_lost else self.config

    name = deploy(Fickle, user_config="good")
    with pytest.raises(serve.BackendFailed, match="not bad"):
        client.update_backend_config(name, {"user_config": "bad"})
    wait_until(lambda: len(made) == 2)
    wait_until(lambda: client.get_handle(name).remote().result(30) == "good")


def test_a_config_that_the_health_check_rejects_is_undone(client: serve.Client, deploy: Deploy) -> None:
    class Checked:
        def reconfigure(self, config: str) -> None:
            self.config = config

        def check_health(self) -> None:
            if self.config == "sick":
                raise RuntimeError("this config made me sick")

        def __call__(self, request: Any) -> str:
            return self.config

    name = deploy(Checked, user_config="well")
    with pytest.raises(serve.BackendFailed, match="made me sick"):
        client.update_backend_config(name, {"user_config": "sick"})
    assert client.get_handle(name).remote().result(30) == "well"


def test_a_config_refused_at_create_leaves_nothing_behind(client: serve.Client, tmp_path: Path) -> None:
    name = new_name("b")
    with pytest.raises(serve.BackendFailed, match="this config is bad"):
        client.create_backend(name, noting(Tally(tmp_path)), config={"user_config": "bad"})
    assert name not in client.list_backends()


def test_a_user_config_without_reconfigure_is_refused_at_create(client: serve.Client) -> None:
    class Plain:
        def __call__(self, request: Any) -> None:
            return None

    for target in (Plain, lambda request: None):
        with pytest.raises(ValueError, match="reconfigure"):
            client.create_backend(new_name("b"), target, config={"user_config": {"a": 1}})


def test_a_user_config_for_code_without_reconfigure_is_refused_later_too(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(lambda request: "as before")
    with pytest.raises(serve.MQServeError, match="reconfigure"):
        client.update_backend_config(name, {"user_config": {"a": 1}})
    assert client.get_handle(name).remote().result(30) == "as before"
    assert client.get_backend_config(name).user_config is None


def test_a_user_config_must_be_plain_data(client: serve.Client) -> None:
    with pytest.raises(ValueError, match="plain data"):
        client.create_backend(new_name("b"), Threshold, config={"user_config": {"threshold": object()}})


# Health.


def test_a_replica_whose_check_fails_is_replaced(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    sick = Gate(tmp_path)

    class Fragile:
        def check_health(self) -> None:
            if sick.names == [serve.get_current_replica_tag()]:
                raise RuntimeError("feeling sick")

        def __call__(self, request: Any) -> str:
            if request.data == "fall sick":
                sick.open()
                sick.pass_through(serve.get_current_replica_tag())
            return serve.get_current_replica_tag()

    handle = client.get_handle(deploy(Fragile, health_check_period_s=0.1))
    first = handle.remote("fall sick").result(30)
    assert wait_until(lambda: handle.remote().result(30) != first)


def test_an_async_check_is_awaited_and_a_hanging_one_fails(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    made = Tally(tmp_path)

    class Hanging:
        def __init__(self) -> None:
            made.note(serve.get_current_replica_tag())

        async def check_health(self) -> None:
            if made.lines[0] == serve.get_current_replica_tag():
                await asyncio.sleep(3600)

        async def __call__(self, request: Any) -> str:
            return serve.get_current_replica_tag()

    handle = client.get_handle(deploy(Hanging, health_check_period_s=0.1, health_check_timeout_s=0.2))
    assert wait_until(lambda: handle.remote().result(30) != made.lines[0])


def test_a_healthy_replica_is_kept_however_long_a_call_takes(deploy: Deploy, client: serve.Client, tmp_path: Path) -> None:
    checks = Tally(tmp_path)

    class Busy:
        def check_health(self) -> None:
            checks.note()

        def __call__(self, request: Any) -> str:
            if request.data:
                time.sleep(request.data)
            return serve.get_current_replica_tag()

    handle = client.get_handle(deploy(Busy, health_check_period_s=0.05, health_check_timeout_s=0.5))
    tag = handle.remote().result(30)
    assert handle.remote(2.5).result(30) == tag, "three checks waited for the call"
    before = len(checks)
    wait_until(lambda: len(checks) > before + 3)
    assert handle.remote().result(30) == tag


def test_neither_hook_is_to_be_called_from_outside(deploy: Deploy) -> None:
    url = deploy.at(Threshold, user_config={"threshold": 1})
    for hook in ("reconfigure", "check_health"):
        assert httpx.get(url, headers={"X-SERVE-CALL-METHOD": hook}).status_code == 404
