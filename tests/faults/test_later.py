"""Jobs that wait for their time while RabbitMQ restarts, and while the leading controller is killed: each comes, and none comes early. And
for how long RabbitMQ lets a replica hold one."""

import asyncio
import signal
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from mqserve.broker import queue_names
from mqserve.broker.envelope import Envelope
from mqserve.broker.errors import MQServeError
from mqserve.broker.later import addressed
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Delivery, Queue
from mqserve.broker.rabbitmq.queue import RabbitQueue, open_rabbitmq
from mqserve.broker.rabbitmq.waits import FRESH_S
from mqserve.broker.redis.store import open_redis
from mqserve.broker.settings import Settings
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.changes import commit, create_backend
from mqserve.controller.job_limits import job_limit_s
from mqserve.controller.lease import read_instance
from mqserve.controller.state.documents import Backend
from tests.broker.test_later import count, forwarding, job_due_in, publish_later
from tests.broker.traffic import Hands, publish, publish_job, text, until
from tests.faults.members import Members
from tests.instances import CommandLine, wait_until
from tests.servers import PrivateRabbitMQ

pytestmark = pytest.mark.anyio

BUDGET_S = 60.0


class Arrivals:
    """Takes the jobs of `b`, and notes by id when each came first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.at_ms: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Arrivals, {len(self.at_ms)} so far>"

    def __call__(self, delivery: Delivery) -> None:
        self.at_ms.setdefault(delivery.envelope().id, self._store.now_ms())
        delivery.ack()


async def sent(queue: Queue, store: Store, delays_s: list[float]) -> dict[str, int]:
    """Publishes a job for each delay; returns by id when it is due."""
    jobs = [job_due_in(store, delay_s) for delay_s in delays_s]
    assert set(await asyncio.gather(*map(publish_later, [queue] * len(jobs), jobs, delays_s))) == {None}
    return {job.id: job.header.job.not_before_ms for job in jobs if job.header.job is not None}


CLOCKS_MS = 50  # two processes do not read the store's time to the millisecond


def check_none_was_early(arrivals: Arrivals, due_ms: dict[str, int]) -> None:
    early = {job: (due_ms[job], at_ms) for job, at_ms in arrivals.at_ms.items() if at_ms < due_ms[job] - CLOCKS_MS}
    assert not early


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_restart_of_rabbitmq_loses_no_job_that_waits(broker_server: PrivateRabbitMQ, namespace: str, how: str) -> None:
    store = EmbeddedStore(namespace)
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        arrivals = Arrivals(store)
        await queue.consume("b", 1, 100, arrivals, jobs=True)
        async with forwarding(queue, store):
            due_ms = await sent(queue, store, [4.5 + 0.01 * number for number in range(300)])
            await asyncio.sleep(1)  # they are where they wait, and none comes back before 4 s
            await asyncio.to_thread(getattr(broker_server, how))
            await asyncio.to_thread(broker_server.start)
            await until(lambda: len(arrivals.at_ms) == len(due_ms), BUDGET_S)
    check_none_was_early(arrivals, due_ms)


async def test_a_crash_of_rabbitmq_loses_no_job_that_it_moves_just_then(broker_server: PrivateRabbitMQ, namespace: str) -> None:
    """What a classic queue has moved is lost now and then, if it is not on disk yet where it went. So it crashes three times."""
    store, waits = EmbeddedStore(namespace), queue_names.later_queue(namespace, 4)
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        assert isinstance(queue, RabbitQueue)
        await queue.declare("b", 1, None)
        await queue.later.declare()
        await queue._topology.declare_wait(waits, queue_names.later_exchange(namespace), 4)
        await asyncio.sleep(FRESH_S)
        for moment_s in (0.1, 0.15, 0.2):
            await crash_while_it_moves(broker_server, queue, store, moment_s)


async def crash_while_it_moves(broker_server: PrivateRabbitMQ, queue: RabbitQueue, store: Store, moment_s: float) -> None:
    jobs = [replace(job_due_in(store, 0), body=b"x" * 6000, persistent=True) for _ in range(3500)]
    assert set(await asyncio.gather(*(waiting_for_4_s(queue, job) for job in jobs))) == {None}
    await until(lambda: count(queue, queue_names.due_queue(queue._namespace)))
    await asyncio.sleep(moment_s)
    await asyncio.to_thread(broker_server.kill)
    await asyncio.to_thread(broker_server.start)
    arrivals = Arrivals(store)
    consumption = await queue.consume("b", 1, 500, arrivals, jobs=True)
    async with forwarding(queue, store):
        await until(lambda: arrivals.at_ms.keys() == {job.id for job in jobs}, BUDGET_S)
    await consumption.cancel()


def waiting_for_4_s(queue: RabbitQueue, job: Envelope) -> asyncio.Future[MQServeError | None]:
    """Publishes it as the leading controller does, but together with many others."""
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    exchange = queue_names.later_exchange(queue._namespace)
    queue._publish(exchange, "4", addressed(job, "b").to_amqp(), job.body, job.id, fate.set_result)
    return fate


async def test_the_death_of_the_leading_controller_loses_no_job_that_waits(
    distributed_shell: CommandLine, store_url: str, namespace: str
) -> None:
    settings, members = Settings.read(distributed_shell.env), Members(store_url, namespace)
    first = distributed_shell.start("controller")
    await asyncio.to_thread(wait_until, lambda: members.leader()[0] == first.pid)
    second = distributed_shell.start("controller")
    async with (
        open_redis(store_url, namespace) as store,
        open_rabbitmq(settings.broker_url, namespace, "test", seals=settings.header_seals) as queue,
    ):
        keys = StoreKeys(namespace)
        instance = (await read_instance(store, keys)).id
        await commit(store, keys, instance, create_backend(Backend("b", "", "b")))
        await until(lambda: members.observed().queues == {"b": (1,)})
        await until(lambda: queue_is_there(queue, queue_names.due_queue(namespace)))
        arrivals = Arrivals(store)
        await queue.consume("b", 1, 100, arrivals, jobs=True)
        due_ms = await sent(queue, store, [0.05 * number for number in range(300)])
        await until(lambda: len(arrivals.at_ms) > 30)
        first.signal(signal.SIGKILL)
        due_ms |= await sent(queue, store, [0.5] * 50)
        await until(lambda: len(arrivals.at_ms) == len(due_ms), BUDGET_S)
        assert members.leader()[0] == second.pid
    members.close()
    check_none_was_early(arrivals, due_ms)


async def queue_is_there(queue: Queue, name: str) -> bool:
    return await count(queue, name) is not None


@pytest.fixture
def impatient(broker_server: PrivateRabbitMQ) -> Iterator[str]:
    """The URL of a RabbitMQ that takes a message back from its consumer after 3 s, by its configuration."""
    settings = {"consumer_timeout": (3000, 1_800_000), "channel_tick_interval": (1000, 60_000)}
    for setting, (value_ms, _) in settings.items():
        broker_server.eval(f"application:set_env(rabbit, {setting}, {value_ms})")
    yield broker_server.url
    for setting, (_, default_ms) in settings.items():
        broker_server.eval(f"application:set_env(rabbit, {setting}, {default_ms})")


async def test_a_replica_may_hold_a_job_for_longer_than_rabbitmqs_configuration_says_from_3_12_on(impatient: str, namespace: str) -> None:
    async with open_rabbitmq(impatient, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        waits, jobs = Hands(), Hands()
        await queue.consume("b", 1, 10, waits)
        await queue.consume("b", 1, 10, jobs, jobs=True)
        assert await publish(queue, text("a wait")) is None
        assert await publish_job(queue, text("a job")) is None
        await until(lambda: len(waits) > 1, BUDGET_S)
        assert waits.held[-1].redelivered
        if not job_limit_s(queue.broker_version, 3.0):
            await asyncio.sleep(5)  # time enough to take it back, too
            assert len(jobs) == 1
        else:
            await until(lambda: len(jobs) > 1, BUDGET_S)
