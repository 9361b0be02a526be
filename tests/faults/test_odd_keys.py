"""A key of the instance in which another program wrote something of its own: said, mended as far as members can, and no reason to stop."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import mqserve as serve
from tests.faults.crowd import Crowd
from tests.instances import Deploy, distributed_only, new_name, wait_until
from tests.ports import free_port

pytestmark = distributed_only


@pytest.fixture
def store(store_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(store_url) as store:
        yield store


def spoil(store: Any, key: str) -> str:
    """Another program's value, of a type that is none of ours there; what that is."""
    is_text = store.type(key) == b"string" or key.endswith(":ended")
    store.delete(key)
    if is_text:
        store.rpush(key, "another program's")
        return "list"
    store.set(key, "another program's")
    return "string"


MENDED = ("beats", "observed", "leader", "instance", "cancelled", "inbox")


@pytest.mark.parametrize("which", [*MENDED, "ended"])
def test_a_key_of_another_type_is_said_and_the_instance_goes_on(
    client: serve.Client, deploy: Deploy, joining: Any, store: Any, shared_namespace: str, which: str
) -> None:
    url = deploy.at(lambda request: os.getpid())
    key = f"mqserve:{shared_namespace}:{which}"
    if which == "inbox":
        key = (
            f"{key}:{next(field.decode()[6:] for field in store.hkeys(f'mqserve:{shared_namespace}:beats') if field.startswith(b'proxy:'))}"
        )
    with Crowd(url) as load:
        load.wait_for(20)
        odd = spoil(store, key)
        if which in MENDED:
            wait_until(lambda: store.type(key).decode() != odd)
        client.create_backend(name := new_name("b"), lambda request: None)
        client.delete_backend(name)
        load.wait_for(20)
        if which != "ended":  # which nobody reads but at the end
            wait_until(lambda: f"{key} was of another type" in joining.run("status").stdout)
    assert set(load.statuses) == {200} and len({answer.text for answer in load.responses}) == 1, load
    store.delete(*([key] if which == "ended" else []), "nothing")


def test_a_wish_of_another_type_is_said_the_last_good_one_goes_on_and_is_back_once_the_key_is_deleted(
    client: serve.Client, deploy: Deploy, joining: Any, store: Any, shared_namespace: str
) -> None:
    url = deploy.at(lambda request: os.getpid())
    key = f"mqserve:{shared_namespace}:desired"
    proxy = joining.start("proxy", "--port", str(free_port()))
    wait_until(lambda: " (external)" in joining.run("status").stdout)
    with Crowd(url) as load:
        load.wait_for(20)
        spoil(store, key)
        time.sleep(12)  # longer than a lease that is not renewed lasts
        shown = joining.run("status")
        assert shown.returncode == 0 and " leads" in shown.stdout, shown
        assert f"{key} in Redis is of another type" in proxy.output and "going on with the last good one" in proxy.output
        assert f"{key}: the desired state in the store is no string" in shown.stdout and f"redis-cli DEL {key}" in shown.stdout
        with pytest.raises(serve.MQServeError, match="the desired state in the store is no string"):
            client.create_backend(new_name("b"), lambda request: None)
        store.delete(key)
        wait_until(lambda: store.type(key) == b"string")
        client.create_backend(name := new_name("b"), lambda request: None)
        client.delete_backend(name)
        load.wait_for(20)
    assert set(load.statuses) == {200} and len({answer.text for answer in load.responses}) == 1, load


def test_code_of_another_type_keeps_no_other_backend_waiting(
    client: serve.Client, deploy: Deploy, store: Any, shared_namespace: str, tmp_path: Path
) -> None:
    before = set(store.keys(f"mqserve:{shared_namespace}:code:*"))
    deploy(lambda request: "spoilt")
    (key,) = set(store.keys(f"mqserve:{shared_namespace}:code:*")) - before
    spoil(store, key.decode())
    url = deploy.at(lambda request: "well")
    assert httpx.get(url).text == "well"
