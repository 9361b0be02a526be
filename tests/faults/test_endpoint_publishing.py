"""Messages to endpoints while controllers die and RabbitMQ restarts: each one that was confirmed becomes a job, and two copies are one."""

import asyncio
import signal
from collections import defaultdict
from functools import partial

import pika
import pytest

from mqserve.broker.envelope import mint_id
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Delivery, Queue
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.redis.store import open_redis
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.changes import commit, create_backend, create_endpoint
from mqserve.controller.lease import read_instance
from mqserve.controller.state.documents import Backend, Endpoint
from mqserve.replicas.trust import SenderTrust
from tests.broker.test_later import count, forwarding
from tests.broker.traffic import Hands, until
from tests.faults.members import Members
from tests.instances import CommandLine, wait_until
from tests.servers import PrivateRabbitMQ

pytestmark = pytest.mark.anyio

BUDGET_S = 60.0
HALVES = Endpoint("e", None, (), {"a": 0.5, "b": 0.5})


def publish_many(url: str, namespace: str, count: int) -> list[str]:
    """Publishes to the endpoint `e`, and returns the ids of the messages, all of which RabbitMQ has confirmed."""
    keys = [mint_id() for _ in range(count)]
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for key in keys:
            properties = pika.BasicProperties(content_type="text/plain", message_id=key, delivery_mode=2, reply_to="answers")
            channel.basic_publish(f"{namespace}.endpoints", "e", b"body", properties, mandatory=True)
    return keys


class Arrivals:
    """Takes the jobs of both halves as replicas do, and notes where each came, and under which id it is kept."""

    def __init__(self, senders: SenderTrust | None = None) -> None:
        self._senders = senders
        self.backends: defaultdict[str, set[str]] = defaultdict(set)
        self.kept: set[str] = set()

    def __repr__(self) -> str:
        return f"<Arrivals, {len(self.backends)} so far>"

    async def consume(self, queue: Queue) -> None:
        for backend in HALVES.traffic:
            await queue.consume(backend, 1, 100, partial(self._take, backend), jobs=True)

    def _take(self, backend: str, delivery: Delivery) -> None:
        envelope = delivery.envelope()
        if self._senders is not None:
            self._senders.check_header(envelope)
        assert (envelope.reply_to, envelope.persistent, envelope.header.meta.endpoint) == ("answers", True, "e")
        self.backends[envelope.id].add(backend)
        self.kept.add(envelope.future_id(backend))
        delivery.ack()

    def check(self, keys: list[str]) -> None:
        assert set(self.backends) == set(keys)
        assert self.kept == {f"@e@{key}" for key in keys}
        assert all(len(backends) == 1 for backends in self.backends.values())
        assert {backend for backends in self.backends.values() for backend in backends} == {"a", "b"}


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_restart_of_rabbitmq_loses_no_message_to_an_endpoint(broker_server: PrivateRabbitMQ, namespace: str, how: str) -> None:
    store, arrivals = EmbeddedStore(namespace), Arrivals()
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        for backend in HALVES.traffic:
            await queue.declare(backend, 1, None)
        async with forwarding(queue, store, backends=("a", "b"), namespace=namespace):
            pass  # which makes the exchange, and takes nothing any more
        keys = await asyncio.to_thread(publish_many, broker_server.url, namespace, 300)
        await arrivals.consume(queue)
        await asyncio.to_thread(getattr(broker_server, how))
        await asyncio.to_thread(broker_server.start)
        await until(lambda: not queue.down_s, BUDGET_S)
        async with forwarding(queue, store, backends=("a", "b"), endpoints={"e": HALVES}, namespace=namespace):
            keys += await asyncio.to_thread(publish_many, broker_server.url, namespace, 300)
            await asyncio.to_thread(getattr(broker_server, how))
            await asyncio.to_thread(broker_server.start)
            await until(lambda: len(arrivals.backends) == len(keys), BUDGET_S)
    arrivals.check(keys)


async def test_a_backend_that_is_about_to_get_its_queue_does_not_hold_up_other_messages(broker_url: str, namespace: str) -> None:
    store, hands, late = EmbeddedStore(namespace), Hands(), Hands()
    endpoints = {"e": Endpoint("e", None, (), {"a": 1.0}), "late": Endpoint("late", None, (), {"b": 1.0})}
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("a", 1, None)
        await queue.consume("a", 1, 10, hands, jobs=True)
        async with forwarding(queue, store, backends=("a", "b"), endpoints=endpoints, namespace=namespace):
            await asyncio.to_thread(publish_one, broker_url, namespace, "late")
            await asyncio.to_thread(publish_one, broker_url, namespace, "e")
            await hands.hold(1)
            await queue.declare("b", 1, None)
            await queue.consume("b", 1, 10, late, jobs=True)
            await late.hold(1)
    envelope = late.held[0].envelope()
    assert (envelope.future_id("b"), envelope.reply_to, envelope.correlation_id) == ("@late@one", "answers", "c")


def publish_one(url: str, namespace: str, endpoint: str) -> None:
    properties = pika.BasicProperties(content_type="text/plain", message_id="one", reply_to="answers", correlation_id="c")
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().basic_publish(f"{namespace}.endpoints", endpoint, b"body", properties)


async def is_declared(queue: Queue, name: str) -> bool:
    return await count(queue, name) is not None


async def test_messages_wait_while_no_controller_is_there_and_the_death_of_the_leader_loses_none(
    distributed_shell: CommandLine, broker_url: str, store_url: str, namespace: str
) -> None:
    settings, members = Settings.read(distributed_shell.env), Members(store_url, namespace)
    arrivals = Arrivals(senders := SenderTrust(settings))
    senders.demands_seals = True
    first = distributed_shell.start("controller")
    await asyncio.to_thread(wait_until, lambda: members.leader()[0] == first.pid)
    async with (
        open_redis(store_url, namespace) as store,
        open_rabbitmq(broker_url, namespace, "test", seals=settings.header_seals) as queue,
    ):
        keys = StoreKeys(namespace)
        instance = (await read_instance(store, keys)).id
        for backend in HALVES.traffic:
            await commit(store, keys, instance, create_backend(Backend(backend, "", backend)))
        await commit(store, keys, instance, create_endpoint(HALVES))
        await until(lambda: members.observed().queues == {"a": (1,), "b": (1,)})
        await until(partial(is_declared, queue, f"{namespace}.dead.@endpoints"))  # the last of what the leader makes
        first.signal(signal.SIGKILL)
        sent = await asyncio.to_thread(publish_many, broker_url, namespace, 200)
        await arrivals.consume(queue)
        assert not arrivals.backends
        second = distributed_shell.start("controller")
        await until(lambda: len(arrivals.backends) > 20, BUDGET_S)
        third = distributed_shell.start("controller")
        sent += await asyncio.to_thread(publish_many, broker_url, namespace, 200)
        second.signal(signal.SIGKILL)
        sent += await asyncio.to_thread(publish_many, broker_url, namespace, 200)
        await until(lambda: len(arrivals.backends) == len(sent), BUDGET_S)
        assert members.leader()[0] == third.pid
        records = await asyncio.gather(*(store.jobs.read(f"@e@{key}") for key in sent))
    members.close()
    arrivals.check(sent)
    assert {record.facts.endpoint for record in records if record is not None} == {"e"}
