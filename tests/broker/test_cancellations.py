"""What a replica hears of requests that nobody wants any more."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from mqserve.broker.calls.cancellations import KEPT, Cancellations, notice_of_proxy, notice_of_request
from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store import Store
from mqserve.broker.store_keys import RESULT_TTL_S, StoreKeys
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio

MINTED = "0" * 32


@pytest.fixture
async def heard(store: Store, keys: StoreKeys) -> AsyncIterator[Cancellations]:
    cancellations = Cancellations(store, keys, lambda _: None)
    listening = asyncio.create_task(cancellations.listen())
    yield cancellations
    listening.cancel()
    await asyncio.wait([listening])


def request(origin: str = "http", inbox: str = "") -> Envelope:
    return Envelope(MINTED, b"", "text/plain", Header(origin=origin, inbox=inbox))


async def test_a_cancelled_request_is_named(store: Store, keys: StoreKeys, heard: Cancellations) -> None:
    assert not heard
    await store.append_log(keys.cancelled, notice_of_request(MINTED))
    await until(lambda: heard.names(request(), MINTED))
    assert not heard.names(request(), "1" * 32)


async def test_what_was_said_before_the_replica_came_is_heard(store: Store, keys: StoreKeys) -> None:
    await store.append_log(keys.cancelled, notice_of_request(MINTED))
    late = Cancellations(store, keys, lambda _: None)
    listening = asyncio.create_task(late.listen())
    await until(lambda: late.names(request(), MINTED))
    listening.cancel()
    await asyncio.wait([listening])


async def test_with_a_proxy_go_its_clients_and_not_what_others_may_read(store: Store, keys: StoreKeys, heard: Cancellations) -> None:
    dead, alive = keys.inbox("dead"), keys.inbox("alive")
    await store.append_log(keys.cancelled, notice_of_proxy(dead))
    await until(lambda: heard.names(request(inbox=dead), MINTED))
    assert not heard.names(request(inbox=alive), MINTED)
    assert not heard.names(request("handle", dead), MINTED)


@pytest.mark.parametrize("word", [b"", b"garbage", b"\xc1", b"\x93\x02\xa7request\xa1x", b"\x93\x01\xa5other\xa1x"])
async def test_words_of_other_kinds_and_versions_are_left_out(store: Store, keys: StoreKeys, heard: Cancellations, word: bytes) -> None:
    await store.append_log(keys.cancelled, word, notice_of_request(MINTED))
    await until(lambda: heard.names(request(), MINTED))
    assert not heard.names(request(), "x")


async def test_the_oldest_are_forgotten_first(store: Store, keys: StoreKeys, heard: Cancellations) -> None:
    for start in range(0, KEPT + 1, 5000):
        await store.append_log(keys.cancelled, *(notice_of_request(str(number)) for number in range(start, min(start + 5000, KEPT + 1))))
        await until(lambda start=start: heard.names(request(), str(min(start + 4999, KEPT))))  # type: ignore[misc]
    assert not heard.names(request(), "0") and heard.names(request(), "1")


async def test_a_callers_own_id_can_be_used_again_once_its_result_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("mqserve.broker.calls.cancellations.time", SimpleNamespace(monotonic=lambda: clock.now))
    store, keys = EmbeddedStore(), StoreKeys("tests")
    heard = Cancellations(store, keys, lambda _: None)
    listening = asyncio.create_task(heard.listen())
    await store.append_log(keys.cancelled, notice_of_request("b/order-17"), notice_of_request(MINTED))
    await until(lambda: heard.has("b/order-17") and heard.has(MINTED))
    clock.now += RESULT_TTL_S + 1
    assert not heard.has("b/order-17") and heard.has(MINTED)
    listening.cancel()
    await asyncio.wait([listening])
