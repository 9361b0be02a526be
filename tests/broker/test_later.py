"""Jobs that wait for their time: when they come, where they go, and whose they have to be."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import aiormq
import pytest
from msgspec.structs import replace

from mqserve.broker.envelope import Envelope, Header, JobHead, mint_id
from mqserve.broker.errors import MQServeError
from mqserve.broker.jobs import JobState
from mqserve.broker.later import WAITS_S, addressed, longest_wait_s
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Delivery, Queue
from mqserve.broker.rabbitmq.queue import RabbitQueue, open_rabbitmq
from mqserve.broker.rabbitmq.waits import FRESH_S
from mqserve.broker.results import Result
from mqserve.broker.settings import Settings
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.due import DueJobs
from mqserve.controller.endpoint_jobs import EndpointJobs
from mqserve.controller.state.documents import Backend, Desired, Endpoint
from mqserve.replicas.trust import SenderTrust
from tests.broker.traffic import Hands, until

pytestmark = pytest.mark.anyio

KEY = "a key of more than thirty-two bytes"
LATE_MS = 2000  # at most, on a machine that does other things, too
T = TypeVar("T")


@pytest.mark.parametrize(
    ("left_ms", "wait_s"), [(1, 1), (999, 1), (1999, 1), (2000, 2), (3999, 2), (4000, 4), (10**15, 2**20), (2**20 * 1000, 2**20)]
)
def test_a_job_waits_next_for_the_longest_power_of_two_that_fits(left_ms: int, wait_s: int) -> None:
    assert longest_wait_s(left_ms) == wait_s and wait_s in WAITS_S


@pytest.mark.parametrize("delay_s", [0.0, 1.0, 3.0])
async def test_a_job_comes_when_its_time_has_come_and_not_before(queue: Queue, store: Store, keys: StoreKeys, delay_s: float) -> None:
    arrived_ms: list[int] = []
    await queue.declare("b", 1, None)
    hands = Hands()

    def take(delivery: Delivery) -> None:
        arrived_ms.append(store.now_ms())
        hands(delivery)

    await queue.consume("b", 1, 10, take, jobs=True)
    async with forwarding(queue, store):
        job = job_due_in(store, delay_s)
        assert await publish_later(queue, job, delay_s) is None
        await hands.hold(1)
    due_ms = job.header.job.not_before_ms if job.header.job else 0
    assert due_ms <= arrived_ms[0] < due_ms + LATE_MS
    assert hands.held[0].envelope() == replace(job, persistent=True)


async def test_a_job_stays_while_nobody_looks_after_it_and_comes_afterwards(queue: Queue, store: Store) -> None:
    await queue.declare("b", 1, None)
    async with forwarding(queue, store):
        pass
    assert await publish_later(queue, job_due_in(store, 0), 0) is None
    await asyncio.sleep(0.2)  # it might come in this time, and must not
    assert await queue.count_jobs("b", 1) == 0
    async with forwarding(queue, store):
        await until(lambda: queue.count_jobs("b", 1))


async def test_a_thousand_jobs_come_once_each(queue: Queue, store: Store) -> None:
    await queue.declare("b", 1, None)
    hands = Hands()
    await queue.consume("b", 1, 2000, hands, jobs=True)
    async with forwarding(queue, store):
        jobs = [job_due_in(store, 1) for _ in range(1000)]
        assert set(await asyncio.gather(*(publish_later(queue, job, 1) for job in jobs))) == {None}
        await until(lambda: len(hands) >= 1000)
    assert {delivery.envelope().id for delivery in hands} == {job.id for job in jobs}


async def test_a_job_whose_backend_is_gone_fails_and_is_a_dead_letter(queue: Queue, store: Store, keys: StoreKeys) -> None:
    async with forwarding(queue, store, backends=()):
        job = job_due_in(store, 0)
        assert await publish_later(queue, job, 0) is None
        await until(lambda: is_dead(queue))
    async with queue.dead_letters("b") as letters:
        (letter,) = [letter async for letter in letters]
    assert letter.is_job and letter.envelope() == replace(job, persistent=True) and "was deleted" in letter.death.reason
    result = Result.from_bytes(await store.get(keys.future(job.id)) or b"")
    assert (result.status, result.error and result.error.type) == (503, "mqserve.BackendGone")
    record = await store.jobs.read(job.id)
    assert record is not None and record.state is JobState.FAILED


async def test_a_job_of_a_backend_that_is_about_to_get_its_queue_waits_for_that(queue: Queue, store: Store) -> None:
    async with forwarding(queue, store):
        assert await publish_later(queue, job_due_in(store, 0), 0) is None
        await asyncio.sleep(0.2)  # it is tried in vain
        await queue.declare("b", 1, None)
        await until(lambda: queue.count_jobs("b", 1))
    assert not await queue.count_dead("b")


# Whose they are, on RabbitMQ.


async def test_a_sealed_job_comes_with_its_seal_and_one_that_is_sent_elsewhere_is_refused(broker_url: str, namespace: str) -> None:
    settings = Settings.read(
        {"MQSERVE_BROKER_URL": broker_url, "MQSERVE_STORE_URL": "redis://none", "MQSERVE_SECRET_KEY": KEY, "MQSERVE_NAMESPACE": namespace}
    )
    store = EmbeddedStore(namespace)
    senders = SenderTrust(settings)
    async with open_rabbitmq(broker_url, namespace, "test", seals=settings.header_seals) as queue:
        for backend in ("b", "other"):
            await queue.declare(backend, 1, None)
        hands = Hands()
        await queue.consume("b", 1, 10, hands, jobs=True)
        async with forwarding(queue, store, senders=senders, sealed=True):
            job = job_due_in(store, 1)
            assert await publish_later(queue, job, 1) is None
            await hands.hold(1)
            taken = hands.held[0].envelope()
            senders.check_header(taken)
            assert (taken.user_id, taken.header) == ("guest", job.header)
            await forged(queue, settings, job, "other")
            await until(lambda: is_dead(queue, "other"))
        assert await queue.count_jobs("other", 1) == 0


async def forged(queue: Queue, settings: Settings, job: Envelope, to: str) -> None:
    """Publishes a job that was sealed for `b` as one for another backend."""
    assert isinstance(queue, RabbitQueue)
    packed = addressed(replace(job, id=mint_id()), to).to_amqp("", settings.header_seals.of("b"))
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue._publish(f"{settings.namespace}.later", "due", packed, job.body, "", fate.set_result)
    assert await fate is None


async def test_a_message_without_a_target_is_dropped_and_keeps_no_other_one_up(broker_url: str, namespace: str) -> None:
    store = EmbeddedStore(namespace)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        async with forwarding(queue, store):
            fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
            queue._publish(f"{namespace}.later", "due", Envelope("x", b"", "text/plain").to_amqp(), b"", "x", fate.set_result)
            assert await fate is None
            assert await publish_later(queue, job_due_in(store, 0), 0) is None
            await until(lambda: queue.count_jobs("b", 1))


async def test_the_queues_go_at_the_end_unless_a_job_waits_in_them(
    broker_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.rabbitmq.waits.FRESH_S", 0)
    store = EmbeddedStore(namespace)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        async with forwarding(queue, store) as due:
            assert await publish_later(queue, job_due_in(store, 2.5), 2.5) is None
            await until(lambda: count(queue, f"{namespace}.later.2"))
            await due.tidy()
            assert await count(queue, f"{namespace}.due") is not None
        async with forwarding(queue, store) as due:
            await until(lambda: queue.count_jobs("b", 1))
            await due.tidy()
        assert [await count(queue, f"{namespace}.{name}") for name in ("due", "later.1", "later.2")] == [None] * 3


async def test_a_queue_in_which_jobs_wait_takes_them_once_it_is_older_than_a_crash_could_undo(broker_url: str, namespace: str) -> None:
    store = EmbeddedStore(namespace)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        async with forwarding(queue, store):
            made = time.monotonic()
            assert await publish_later(queue, job_due_in(store, 14), 14) is None
            await until(lambda: count(queue, f"{namespace}.later.8"))
            assert time.monotonic() - made >= FRESH_S
            assert await publish_later(queue, job_due_in(store, 9), 9) is None
            await until(lambda: held_in(queue, f"{namespace}.later.8", 2), FRESH_S)


async def held_in(queue: Queue, name: str, wanted: int) -> bool:
    return await count(queue, name) == wanted


async def test_a_queue_of_another_kind_is_not_used_for_jobs_that_wait(broker_url: str, namespace: str) -> None:
    """Such as a classic one, which would lose what it moves while RabbitMQ crashes."""
    store = EmbeddedStore(namespace)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        async with forwarding(queue, store):
            connection = await aiormq.connect(broker_url)
            try:
                channel = await connection.channel()
                await channel.queue_declare(f"{namespace}.later.1", durable=True)
                await channel.queue_bind(f"{namespace}.later.1", f"{namespace}.later", "1")
                assert await publish_later(queue, job_due_in(store, 1.9), 1.9) is None
                await until(lambda: queue.count_jobs("b", 1))
                assert await count(queue, f"{namespace}.later.1") == 0
            finally:
                await connection.close()


async def count(queue: Queue, name: str) -> int | None:
    assert isinstance(queue, RabbitQueue)
    return await queue._topology._count(name)


class Trusting:
    """Trusts every sender."""

    demands_seals = False

    def check_header(self, envelope: Envelope) -> None: ...

    def check_pickle(self, envelope: Envelope) -> None: ...


@asynccontextmanager
async def forwarding(
    queue: Queue,
    store: Store,
    *,
    backends: tuple[str, ...] = ("b", "other"),
    endpoints: Mapping[str, Endpoint] = {},
    senders: SenderTrust | None = None,
    sealed: bool = False,
    namespace: str = "test",
) -> AsyncIterator[DueJobs]:
    """As a leading controller looks after the jobs that wait, and those to endpoints."""

    async def leading(act: Callable[[], Awaitable[T]]) -> T:
        return await act()

    due = DueJobs(queue.later, EndpointJobs(namespace, queue, store, StoreKeys(namespace)), senders or Trusting(), store, leading)
    desired = Desired(backends={name: Backend(name, "", name) for name in backends}, endpoints=dict(endpoints))
    await due.go_on(desired, sealed=sealed)
    try:
        yield due
    finally:
        await due.stop()


def job_due_in(store: Store, delay_s: float) -> Envelope:
    now_ms = store.now_ms()
    head = JobHead(created_ms=now_ms, not_before_ms=now_ms + int(delay_s * 1000))
    return Envelope(mint_id(), b"body", "text/plain", Header(origin="handle", job=head), priority=1)


def publish_later(queue: Queue, job: Envelope, delay_s: float) -> asyncio.Future[MQServeError | None]:
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.publish_later("b", job, delay_s, fate.set_result)
    return fate


async def is_dead(queue: Queue, backend: str = "b") -> bool:
    return bool(await queue.count_dead(backend))
