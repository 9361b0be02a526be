"""The two forms of queue and store; a test that asks for one of them runs once on each form."""

from collections.abc import AsyncIterator

import pytest

from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Queue
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.redis.store import open_redis
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.signing import Signer


@pytest.fixture(params=["embedded", "distributed"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def queue(form: str, request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Queue]:
    if form == "embedded":
        yield EmbeddedQueue()
        return
    async with open_rabbitmq(request.getfixturevalue("broker_url"), namespace, "test") as rabbitmq:
        yield rabbitmq


@pytest.fixture
async def store(form: str, request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Store]:
    if form == "embedded":
        yield EmbeddedStore(namespace)
        return
    async with open_redis(request.getfixturevalue("store_url"), namespace) as redis:
        yield redis


@pytest.fixture
def keys(namespace: str) -> StoreKeys:
    return StoreKeys(namespace)


@pytest.fixture
def signer(namespace: str) -> Signer:
    return Signer([b"k" * 32], namespace)
