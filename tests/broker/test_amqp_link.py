"""A link to RabbitMQ: what it leaves behind, and what its connections do in both event loops."""

import asyncio
import gc
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest

from mqserve.broker.envelope import Envelope
from mqserve.broker.errors import BrokerUnavailable
from mqserve.broker.process.loops import IoLoop
from mqserve.broker.rabbitmq.connection import Link
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from tests.broker.traffic import AckingHands, accepted, publish, text, until
from tests.faults.wire import Wire
from tests.ports import free_port


def test_connections_dialled_in_vain_may_be_collected_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        link = Link(f"amqp://guest:guest@127.0.0.1:{free_port()}/", "link of the tests")
        with suppress(BrokerUnavailable):
            await link.up(2)  # several dials
        await link.close()
        del link
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await asyncio.to_thread(gc.collect)
        assert not caught, caught[0].message

    monkeypatch.setattr(logging.getLogger("aiormq"), "disabled", True)  # pytest keeps its records, and with them the connections
    monkeypatch.setattr(logging.getLogger("aiormq.connection"), "disabled", True)
    gc.collect()
    gc.disable()  # or they may be collected here
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, IoLoop])
def test_what_a_full_transport_held_back_arrives_whole_once_the_broker_reads_again(
    new_loop: Callable[[], asyncio.AbstractEventLoop], broker_wire: Wire, namespace: str
) -> None:
    async def main() -> None:
        async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
            await queue.declare("b", 1, None)
            hands = AckingHands()
            await queue.consume("b", 1, 100, hands)
            connection = queue._publishing.connection
            assert connection is not None
            broker_wire.blackhole()
            bodies = [f"{number}{'x' * 1_000_000}" for number in range(30)]
            fates = [publish(queue, Envelope("", body.encode(), "text/plain")) for body in bodies]
            await until(lambda: connection.hot.is_paused)
            broker_wire.mend()
            assert await asyncio.gather(*fates) == [None] * len(bodies)
            await until(lambda: len(hands.seen) == len(bodies))
            assert hands.seen == bodies
            assert not connection.hot.is_paused

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


@pytest.mark.long
@pytest.mark.anyio
async def test_a_connection_is_not_taken_for_dead_while_only_hot_frames_arrive(
    broker_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ sends no heartbeats to a connection on which it sends anything else."""
    monkeypatch.setattr("mqserve.broker.rabbitmq.connection.HEARTBEAT_S", 1)
    aiormq_gives_up_after_s = (1 + 1) * 3
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        hands = AckingHands()
        await queue.consume("b", 1, 100, hands)
        links = queue._publishing, queue._consuming
        connections = [link.connection for link in links]
        begun, sent = time.monotonic(), 0
        while time.monotonic() < begun + aiormq_gives_up_after_s + 3:
            await accepted(queue, text(f"number {sent}"))
            sent += 1
        await until(lambda: len(hands.seen) == sent)
        assert [link.connection for link in links] == connections


@pytest.mark.anyio
@pytest.mark.parametrize("moment_s", [0.1, 0.3, 0.5, 0.7])
async def test_a_consumer_that_is_closed_while_the_broker_refuses_it_leaves_no_error_unread(
    broker_wire: Wire, namespace: str, moment_s: float
) -> None:
    """It asks for a channel, for its prefetch and for the queue, each of which takes 0.2 s."""
    unread: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        await queue.consume("b", 1, 1, AckingHands())  # so that it is connected
        broker_wire.delay(0.1)
        refused = asyncio.create_task(queue.consume("nobody", 1, 1, AckingHands()))
        await asyncio.sleep(moment_s)
        refused.cancel()
    await asyncio.gather(refused, return_exceptions=True)
    gc.collect()
    assert not unread
