"""A broker that takes nothing is noticed by our own budget, whatever keeps it, and noticed again when it does."""

import asyncio
import time

import pytest

from mqserve.broker.calls.call import Ticket
from mqserve.broker.calls.sending import REPUBLISH_BUDGET_S, RequestSender
from mqserve.broker.envelope import Envelope, RequestHead, mint_id
from mqserve.broker.errors import BrokerUnavailable, MQServeError
from mqserve.broker.rabbitmq.queue import PROBE_EVERY_S, PROBE_SELDOM_EVERY_S, RabbitQueue, open_rabbitmq
from mqserve.broker.redis.store import open_redis
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import Hands, until
from tests.faults.wire import Wire
from tests.instances import NOISE_S
from tests.servers import PrivateRabbitMQ, PrivateRedis

pytestmark = [pytest.mark.anyio]


async def published(queue: RabbitQueue) -> MQServeError | None:
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.publish("b", Envelope("", b"x", "text/plain"), fate.set_result)
    return await fate


@pytest.mark.row(6)
@pytest.mark.parametrize("probe_every_s", [PROBE_EVERY_S, PROBE_SELDOM_EVERY_S])
async def test_a_frozen_broker_is_down_within_five_seconds_and_up_again_by_itself(
    broker_server: PrivateRabbitMQ, namespace: str, probe_every_s: float
) -> None:
    """Of who asks rarely: where something waits for a confirm."""
    async with open_rabbitmq(broker_server.url, namespace, "test", probe_every_s=probe_every_s) as queue:
        await queue.declare("b", 1, None)
        assert await published(queue) is None
        broker_server.freeze()
        frozen = time.monotonic()
        under_way = asyncio.create_task(published(queue))
        await until(lambda: queue.down_s > 0)
        assert time.monotonic() - frozen < 5 + NOISE_S
        error = await under_way
        assert isinstance(error, BrokerUnavailable) and error.maybe_sent
        error = await published(queue)  # at once: nothing is sent
        assert isinstance(error, BrokerUnavailable) and not error.maybe_sent
        broker_server.thaw()
        await until(lambda: queue.down_s == 0)
        assert await published(queue) is None


@pytest.mark.row(24)
async def test_a_broker_with_a_memory_alarm_is_down_until_the_alarm_is_over(broker_server: PrivateRabbitMQ, namespace: str) -> None:
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        assert await published(queue) is None
        watermark = "0.4"
        try:
            await asyncio.to_thread(broker_server.ctl, "set_vm_memory_high_watermark", "0.0000001")
            await until(lambda: queue.down_s > 0)
            for _ in range(30):  # it stays so, though connections can be opened
                await asyncio.sleep(0.1)
                assert queue.down_s > 0
        finally:
            await asyncio.to_thread(broker_server.ctl, "set_vm_memory_high_watermark", watermark)
        await until(lambda: queue.down_s == 0)
        assert await published(queue) is None


@pytest.mark.row(24)
async def test_consumers_go_on_while_an_alarm_keeps_publishers_out(broker_server: PrivateRabbitMQ, namespace: str) -> None:
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        for _ in range(20):
            assert await published(queue) is None
        await asyncio.to_thread(broker_server.ctl, "set_vm_memory_high_watermark", "0.0000001")
        try:
            await until(lambda: queue.down_s > 0)
            taken: list[bytes] = []
            await queue.consume("b", 1, 5, lambda delivery: (taken.append(delivery.envelope().body), delivery.ack())[0])  # type: ignore[func-returns-value]
            await until(lambda: len(taken) == 20)
            assert queue.down_s > 0
        finally:
            await asyncio.to_thread(broker_server.ctl, "set_vm_memory_high_watermark", "0.4")


async def test_a_request_to_a_broker_that_has_been_away_for_a_while_fails_at_once(
    broker_server: PrivateRabbitMQ, store_server: PrivateRedis, namespace: str
) -> None:
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue, open_redis(store_server.url, namespace) as store:
        sender = RequestSender(queue, store, StoreKeys(namespace), "test")
        broker_server.kill()
        await until(lambda: queue.down_s > 3)
        before = time.monotonic()
        ticket = Ticket(mint_id())
        sender.send(ticket, "b", b"", "text/plain", RequestHead(), origin="http", timeout_s=60)
        with pytest.raises(BrokerUnavailable):
            await ticket.future
        assert time.monotonic() - before < 10, "its own time is 60 s"


async def test_a_request_that_is_lost_with_its_connection_is_published_again_however_old_that_was(
    broker_wire: Wire, store_url: str, namespace: str
) -> None:
    opened = time.monotonic()
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue, open_redis(store_url, namespace) as store:
        await queue.declare("b", 1, None)
        hands = Hands()
        await queue.consume("b", 1, 10, hands)
        sender = RequestSender(queue, store, StoreKeys(namespace), "test")
        await until(lambda: time.monotonic() - opened > REPUBLISH_BUDGET_S)
        broker_wire.blackhole()
        sender.send(Ticket(mint_id()), "b", b"sent", "text/plain", RequestHead(), origin="http", timeout_s=60)
        await asyncio.sleep(0)  # it is written, and arrives nowhere
        broker_wire.reset()
        broker_wire.mend()
        await hands.hold(1)
        assert hands.bodies == ["sent"]
