"""Changes of the desired document: what each makes of plain values, what it refuses, and how they are committed."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mqserve.broker.errors import BadType, BadValue, InstanceError, StoreUnavailable
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller import lease
from mqserve.controller.changes import (
    commit,
    create_backend,
    create_endpoint,
    delete_backend,
    delete_endpoint,
    parse_config,
    register_convertor,
    update_backend,
    update_backend_config,
)
from mqserve.controller.endpoint_parsing import parse_endpoint
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.documents import Backend, CodeKind, Desired, Endpoint
from mqserve.controller.state.reading import read_desired

A = Backend("a", "sha", "module:a")
E = Endpoint("e", "/e", ("GET",), {"a": 1.0})
KEYS = StoreKeys("tests")


def test_a_backend_and_its_endpoint_are_added() -> None:
    desired = create_endpoint(E)(create_backend(A)(Desired()))
    assert (desired.backends, desired.endpoints) == ({"a": A}, {"e": E})


def test_an_endpoint_goes_and_its_backend_stays() -> None:
    desired = delete_endpoint("e")(Desired(backends={"a": A}, endpoints={"e": E}))
    assert (desired.backends, desired.endpoints) == ({"a": A}, {})


def test_deleting_what_is_not_there_changes_nothing() -> None:
    assert delete_backend("b")(delete_endpoint("x")(Desired(backends={"a": A}))) == Desired(backends={"a": A})


def test_new_code_has_the_version_of_the_document_that_brings_it() -> None:
    backend = update_backend("a", "sha2", "module:b", CodeKind.HANDLER, None)(Desired(version=7, backends={"a": A})).backends["a"]
    assert (backend.code, backend.code_name, backend.version, backend.generation) == ("sha2", "module:b", 8, 1)


def test_a_name_that_is_used_again_has_a_version_that_nobody_had() -> None:
    assert create_backend(A)(Desired(version=7)).backends["a"].version == 8


def test_a_configuration_change_merges() -> None:
    desired = update_backend_config("a", {"num_replicas": 3})(Desired(backends={"a": A}))
    desired = update_backend_config("a", BackendConfig(sync_threads=2))(desired)
    config = desired.backends["a"].config
    assert (config.num_replicas, config.sync_threads, desired.backends["a"].generation) == (3, 2, 1)


def test_what_a_queue_freezes_makes_a_new_generation_only_when_it_changes() -> None:
    desired = update_backend_config("a", {"max_queued_requests": 5})(Desired(backends={"a": A}))
    assert desired.backends["a"].generation == 2
    assert update_backend_config("a", {"max_queued_requests": 5})(desired).backends["a"].generation == 2


def test_a_convertor_is_added() -> None:
    assert register_convertor("hex", "sha")(Desired()).convertors == {"hex": "sha"}


TAKEN = Desired(backends={"a": A}, endpoints={"e": E})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: create_backend(A), "there is a backend 'a' already"),
        (lambda: create_endpoint(E), "there is an endpoint 'e' already"),
        (lambda: create_endpoint(Endpoint("f", "/e", ("GET",), {"a": 1.0})), "route '/e' belongs to endpoint 'e'"),
        (lambda: create_endpoint(Endpoint("f", "/f", ("GET",), {"x": 1.0})), r"there is no backend 'x' \(known: a\): create it"),
        (lambda: update_backend("x", "sha", "x", CodeKind.HANDLER, None), "there is no backend 'x'"),
        (lambda: update_backend_config("x", {}), "there is no backend 'x'"),
        (lambda: update_backend_config("a", {"num_replicas": 0}), "num_replicas"),
        (lambda: delete_backend("a"), "backend 'a' is used by endpoint 'e'"),
        (lambda: create_backend(Backend("a b", "sha", "a")), "'a b' is no name for a backend"),
        (lambda: create_endpoint(Endpoint("", "/x", ("GET",), {"a": 1.0})), "'' is no name for an endpoint"),
    ],
)
def test_a_change_that_cannot_be_is_refused_with_a_sentence(change: Callable[[], Callable[[Desired], Desired]], says: str) -> None:
    with pytest.raises(BadValue, match=says):
        change()(TAKEN)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((None, "/e", ["GET"]), BadType, "needs the name of its backend"),
        (("a", "e", ["GET"]), BadType, "must be None or a str that starts with '/'"),
        (("a", 7, ["GET"]), BadType, "must be None or a str"),
        (("a", "/e", "GET"), BadType, "must be a list of names"),
        (("a", "/e", []), BadType, "must be a list of names"),
        (("a", "/-/mine", ["GET"]), BadValue, "belongs to the system"),
        (("a", "/{a:integer}", ["GET"]), BadValue, "convertors are float.* int, path"),
        (("a", "/{a}/{a}", ["GET"]), BadValue, "name each parameter once"),
    ],
)
def test_a_bad_endpoint_is_refused_with_a_sentence(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_endpoint("e", *arguments)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ([], BadType, "config must be a dict or a BackendConfig, not list"),
        ({"num_replica": 1}, BadValue, "there is no setting 'num_replica'; there are num_replicas"),
        ({"num_replicas": "many"}, BadValue, "num_replicas: .*not 'many'"),
        ({"request_timeout_s": 3600}, BadValue, "request_timeout_s: .*not 3600"),
    ],
)
def test_a_bad_configuration_is_refused_by_its_field(config: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_config(config)


# Committing.


async def store_with(desired: Desired) -> EmbeddedStore:
    store = EmbeddedStore()
    await store.set(KEYS.desired, desired.to_bytes())
    return store


def test_a_commit_is_the_next_version() -> None:
    async def main() -> None:
        store = await store_with(Desired(instance="i", version=7))
        committed = await commit(store, KEYS, "i", create_backend(A))
        assert (committed.version, set(committed.backends)) == (8, {"a"})
        assert read_desired(await store.get(KEYS.desired)) == committed

    asyncio.run(main())


def test_clients_that_commit_at_once_lose_nothing_of_each_other() -> None:
    async def main() -> None:
        store = await store_with(Desired(instance="i"))
        names = [f"b{number}" for number in range(20)]
        await asyncio.gather(*(commit(store, KEYS, "i", create_backend(Backend(name, "sha", name))) for name in names))
        stored = read_desired(await store.get(KEYS.desired))
        assert (set(stored.backends), stored.version) == (set(names), 20)

    asyncio.run(main())


class ForgetfulStore(EmbeddedStore):
    """Makes the first change and then cannot say so: a connection lost before the answer."""

    lost = False

    async def replace(self, key: str, old: bytes | None, new: bytes | None, **how: Any) -> bool:
        done = await super().replace(key, old, new, **how)
        if not self.lost:
            self.lost = True
            raise StoreUnavailable("the connection was lost")
        return done


def test_a_retry_recognises_its_own_change() -> None:
    async def main() -> None:
        store = ForgetfulStore()
        await store.set(KEYS.desired, Desired(instance="i").to_bytes())
        committed = await commit(store, KEYS, "i", create_backend(A))
        assert (committed.version, set(committed.backends)) == (1, {"a"})

    asyncio.run(main())


@pytest.mark.parametrize("stored", [None, Desired(instance="another")])
def test_a_client_of_an_instance_that_is_gone_is_told_so(stored: Desired | None) -> None:
    async def main() -> None:
        store = EmbeddedStore() if stored is None else await store_with(stored)
        if stored is None:
            await lease.forget(store, KEYS, "i")
        with pytest.raises(InstanceError, match="has been shut down"):
            await commit(store, KEYS, "i", create_backend(A))

    asyncio.run(main())


def test_a_change_of_an_instance_that_is_being_shut_down_is_refused() -> None:
    async def main() -> None:
        store = await store_with(Desired(instance="i", closing=True))
        with pytest.raises(InstanceError, match="is being shut down: start it again once it is down"):
            await commit(store, KEYS, "i", create_backend(A))

    asyncio.run(main())


def test_a_change_waits_for_documents_that_a_leader_writes_back() -> None:
    async def main() -> None:
        store = EmbeddedStore()
        committing = asyncio.create_task(commit(store, KEYS, "i", create_backend(A)))
        await asyncio.sleep(0)
        await store.replace(KEYS.desired, None, Desired(instance="i", epoch=2, version=7).to_bytes())
        committed = await committing
        assert (committed.epoch, committed.version, set(committed.backends)) == (2, 8, {"a"})

    asyncio.run(main())
