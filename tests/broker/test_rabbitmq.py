"""What only the queue on RabbitMQ goes through: losses, reconnects, strangers."""

import asyncio
import dataclasses
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pika
import pytest
from aiormq.exceptions import ChannelPreconditionFailed
from yarl import URL

from mqserve.broker.dead_letters import Death
from mqserve.broker.envelope import Envelope, Header, RequestHead, mint_id
from mqserve.broker.errors import BadEnvelope, BrokerUnavailable, MQServeError, QueueMismatch
from mqserve.broker.queue import Delivery, Queue
from mqserve.broker.queue_names import JOB_UNACKED_MS, backend_queue, dead_queue, requests_exchange
from mqserve.broker.rabbitmq.connection import Link
from mqserve.broker.rabbitmq.consumer import RabbitConsumption
from mqserve.broker.rabbitmq.queue import PROBE_SELDOM_EVERY_S, RabbitQueue, open_rabbitmq
from mqserve.broker.rabbitmq.topology import RabbitTopology
from mqserve.broker.settings import masked
from mqserve.broker.values.header_seals import HeaderSeals, Seal
from tests.broker.traffic import AckingHands, Hands, accepted, accepted_at_last, depth_is, publish, text, until
from tests.faults.wire import Wire
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ

pytestmark = pytest.mark.anyio


async def test_a_broker_that_is_not_there_is_said_in_time_and_without_the_password(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.broker.rabbitmq.queue.CONNECT_BUDGET_S", 1.0)
    begun = time.monotonic()
    with pytest.raises(BrokerUnavailable) as refusal:
        async with open_rabbitmq(f"amqp://user:hunter2@127.0.0.1:{free_port()}/", namespace, "test"):
            pass
    assert time.monotonic() - begun < 10
    assert "hunter2" not in str(refusal.value)
    assert "user:***@127.0.0.1" in str(refusal.value)
    assert "MQSERVE_BROKER_URL" in str(refusal.value)


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    assert masked("amqp://somewhere:5672/vhost") == "amqp://somewhere:5672/vhost"


async def test_an_opened_queue_publishes_at_once(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "controller") as queue:
        await queue.declare("b", 1, None)
    async with open_rabbitmq(broker_url, namespace, "proxy") as queue:
        assert queue.down_s == 0
        assert await publish(queue, text("a")) is None


async def test_a_publish_pending_when_the_connection_is_lost_may_have_been_sent(broker_wire: Wire, broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        broker_wire.hold_answers()
        pending = [publish(queue, text(body)) for body in "ab"]
        async with open_rabbitmq(broker_url, namespace, "witness") as witness:
            await depth_is(witness, 2)
            broker_wire.reset()
            fates = await asyncio.gather(*pending)
        assert [isinstance(fate, BrokerUnavailable) and fate.maybe_sent for fate in fates] == [True, True]


async def test_a_publish_without_a_connection_was_not_sent(broker_wire: Wire, namespace: str) -> None:
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        broker_wire.reset()
        await until(lambda: queue.down_s > 0)
        fate = await publish(queue, text("a"))
        assert isinstance(fate, BrokerUnavailable)
        assert not fate.maybe_sent
        assert "MQSERVE_BROKER_URL" in str(fate)


async def test_a_lost_connection_has_been_away_since_its_loss_for_whoever_is_told_of_it(broker_wire: Wire, namespace: str) -> None:
    """For three seconds they publish again, from when it was lost on: what they are told at any moment of the loss must be the truth."""
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        told: list[tuple[MQServeError | None, bool]] = []

        def settled(error: MQServeError | None) -> None:
            told.append((error, queue.down_s <= time.monotonic() - lost_at))
            if len(told) < 20:  # by far more turns than the loss takes, and done before the connection is back
                asyncio.get_running_loop().call_soon(queue.publish, "b", text("in each turn"), settled)

        broker_wire.hold_answers()
        queue.publish("b", text("unconfirmed"), settled)
        await asyncio.sleep(0)  # it is written
        lost_at = time.monotonic()
        broker_wire.reset()
        await until(lambda: len(told) == 20)
        assert [type(error) for error, _ in told] == [BrokerUnavailable] * len(told)
        assert all(true for _, true in told)


async def test_a_consumer_comes_back_when_the_broker_closes_its_connections(
    broker_server: PrivateRabbitMQ, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        hands = Hands()
        await queue.consume("b", 1, 10, hands)
        await accepted(queue, text("held over the loss"))
        await hands.hold(1)
        await asyncio.to_thread(broker_server.ctl, "close_all_connections", "why they end")
        await until(lambda: len(hands) == 2)
        assert "why they end" in caplog.text  # the operator reads the reason
        lost, again = hands.held
        assert again.redelivered
        lost.ack()
        again.ack()
        await accepted_at_last(queue, text("after it"))
        await until(lambda: hands.bodies == ["held over the loss", "held over the loss", "after it"])


async def held_by_one(queue: Queue, body: str) -> tuple[Delivery, RabbitConsumption]:
    """A message in the hands of a new consumer."""
    hands = Hands()
    consumption = await queue.consume("b", 1, 10, hands)
    assert isinstance(consumption, RabbitConsumption)
    await accepted(queue, text(body))
    await until(lambda: len(hands) > 0)
    return hands.held[0], consumption


async def test_a_consumer_that_is_closed_at_any_moment_costs_no_connection(
    broker_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ ends a connection on which a channel is closed twice, or used after that."""
    monkeypatch.setattr("mqserve.broker.rabbitmq.consumer.ASK_EVERY_S", 0.001)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        for moment in range(200):
            delivery, consumption = await held_by_one(queue, f"{moment}")
            assert delivery.envelope().body == f"{moment}".encode()
            delivery.ack()
            if moment % 2:
                await consumption.cancel()
            await asyncio.sleep(moment % 20 / 1000)
            await consumption.close()
        await depth_is(queue, 0)
    assert "lost the connection" not in caplog.text


async def test_an_ack_while_its_consumer_is_being_closed_costs_no_connection(
    broker_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mqserve.broker.rabbitmq.consumer.ASK_EVERY_S", 0.0)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        for turns in range(80):
            delivery, consumption = await held_by_one(queue, f"{turns}")
            closing = asyncio.create_task(consumption.close())
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            delivery.ack()
            await closing
    assert "lost the connection" not in caplog.text


async def test_nothing_is_left_unacked_after_many_acks_out_of_order(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        hands = Hands()
        consumption = await queue.consume("b", 1, 500, hands)
        await accepted(queue, *(text(str(number)) for number in range(500)))
        await hands.hold(500)
        kept = hands.held.pop(100)
        for delivery in hands.held[::2] + hands.held[1::2]:
            delivery.ack()
        await consumption.cancel()
        kept.requeue()
        await depth_is(queue, 1)  # unacked ones would come back with the channel
        witness = Hands()
        await queue.consume("b", 1, 500, witness)
        await witness.hold(1)
        assert witness.bodies == ["100"]


async def test_a_consumer_of_a_queue_that_is_not_there_is_refused_and_leaves_nothing_behind(
    broker_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.rabbitmq.consumer.OPERATION_BUDGET_S", 1.0)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        with pytest.raises(BrokerUnavailable, match="did not let us consume"):
            await queue.consume("b", 1, 1, Hands())
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("consume ")]


async def test_a_stranger_needs_only_a_routing_key_a_content_type_and_a_body(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        hands = Hands()
        await queue.consume("b", 1, 1, hands)
        properties = pika.BasicProperties(content_type="application/json")
        await asyncio.to_thread(publish_as_a_stranger, broker_url, requests_exchange(namespace), properties)
        await hands.hold(1)
        assert hands.held[0].envelope() == Envelope("", b"{}", "application/json")


async def test_a_header_that_does_not_parse_is_a_bad_envelope_with_its_dead_letter(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        hands = Hands()
        await queue.consume("b", 1, 1, hands)
        user = URL(broker_url).user
        properties = pika.BasicProperties(headers={"mq": "text", "theirs": 1}, message_id="m", expiration="60000", user_id=user)
        await asyncio.to_thread(publish_as_a_stranger, broker_url, requests_exchange(namespace), properties)
        await hands.hold(1)
        with pytest.raises(BadEnvelope):
            hands.held[0].envelope()
        fate: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue.dead_letter("b", hands.held[0], Death("bad"), fate.set_result)
        assert await fate is None
        letter, body = await asyncio.to_thread(get_one, broker_url, dead_queue(namespace, "b"))
        assert body == b"{}"
        assert letter.message_id == "m"
        assert (letter.expiration, letter.user_id) == (None, None)
        expected = {"mq": "text", "theirs": 1, "mq-reason": "bad", "mq-backend": "b", "mq-user": user}
        assert letter.headers.items() >= expected.items()


async def test_a_seal_holds_through_the_queue_the_dead_letters_and_a_retry_and_nowhere_else(broker_url: str, namespace: str) -> None:
    seals = HeaderSeals([b"k" * 32], namespace)
    header = Header(origin="http", inbox="in", deadline=2**41, meta=RequestHead(path="/π", headers=((b"a", b"\xff"),)))
    sent = [Envelope(mint_id(), body, "application/json", header) for body in (b"", b"1", b"x" * 300)]
    async with open_rabbitmq(broker_url, namespace, "test", seals=seals) as queue:
        for backend in ("b", "other"):
            await queue.declare(backend, 1, None)
        hands, others = Hands(), Hands()
        await queue.consume("b", 1, 10, hands)
        await queue.consume("other", 1, 10, others)
        await accepted(queue, *sent)
        await hands.hold(3)
        assert [delivery.envelope().seal for delivery in hands.held] == [Seal.VALID] * 3
        fate: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue.dead_letter("b", hands.held[1], Death("bad"), fate.set_result)
        assert await fate is None
        hands.ack_all()
        async with queue.dead_letters("b") as letters:
            async for letter in letters:
                assert letter.envelope(seals.of("b")).seal is Seal.VALID
                for backend in ("b", "other"):
                    moved = dataclasses.replace(letter.renewed(7, seals.of("b")), backend=backend)
                    queue.republish(moved, lambda error: None)
        await hands.hold(1)
        await others.hold(1)
        retried = hands.held[0].envelope()
        assert (retried.seal, retried.header.inbox, retried.header.deadline, retried.header.again) == (Seal.VALID, "", 7, True)
        assert others.held[0].envelope().seal is Seal.BROKEN


async def test_a_reply_comes_to_the_callers_own_queue_with_its_status(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        inbox = f"{namespace}-replies"
        await asyncio.to_thread(declare_for_a_minute, broker_url, inbox)
        fate: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue.reply(Envelope("m", b"answer", "text/plain", correlation_id="c", status=422), inbox, fate.set_result)
        assert await fate is None
        reply, body = await asyncio.to_thread(get_one, broker_url, inbox)
        assert (body, reply.correlation_id, reply.content_type, reply.headers["mq-status"]) == (b"answer", "c", "text/plain", 422)


async def test_a_reply_to_a_queue_that_is_gone_is_no_error(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        fate: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue.reply(Envelope("m", b"", "text/plain"), f"{namespace}-gone", fate.set_result)
        assert await fate is None


async def test_an_expired_message_is_never_delivered(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        await accepted(queue, text("late", expiration_ms=1))
        await depth_is(queue, 0)
        await accepted(queue, text("in time", header=Header()))
        hands = AckingHands()
        await queue.consume("b", 1, 1, hands)
        await until(lambda: hands.seen)
        assert hands.seen == ["in time"]


def publish_as_a_stranger(url: str, exchange: str, properties: pika.BasicProperties) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().basic_publish(exchange, "b", b"{}", properties)


def declare_for_a_minute(url: str, queue: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_declare(queue, arguments={"x-expires": 60_000})


def get_one(url: str, queue: str) -> tuple[Any, bytes]:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        _, properties, body = connection.channel().basic_get(queue, auto_ack=True)
        return properties, body


async def test_queues_are_classic_whatever_the_virtual_host_makes_by_default(broker_server: PrivateRabbitMQ, namespace: str) -> None:
    """Quorum queues know no priorities, and some hosts of RabbitMQ make them unless they are told not to."""
    await asyncio.to_thread(broker_server.ctl, "add_vhost", namespace, "--default-queue-type", "quorum")
    await asyncio.to_thread(broker_server.ctl, "set_permissions", "-p", namespace, "guest", ".*", ".*", ".*")
    try:
        async with open_rabbitmq(f"{broker_server.url}{namespace}", namespace, "test") as queue:
            await queue.declare("b", 1, None)
            assert await publish(queue, text("a")) is None
    finally:
        await asyncio.to_thread(broker_server.ctl, "delete_vhost", namespace)


async def test_a_queue_that_was_declared_without_its_type_is_the_same(broker_url: str, namespace: str) -> None:
    arguments = {"x-max-priority": 4, "x-overflow": "reject-publish"}
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        connection.channel().queue_declare(backend_queue(namespace, "b", 1), durable=True, arguments=arguments)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        with pytest.raises(QueueMismatch):
            await queue.declare("b", 1, 10)


async def test_dead_letters_of_another_make_are_no_reason_for_a_new_generation(broker_url: str, namespace: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        connection.channel().queue_declare(dead_queue(namespace, "b"), durable=True)
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        with pytest.raises(MQServeError, match=r"not as we make it.*delete it") as refusal:
            await queue.declare("b", 1, None)
        assert not isinstance(refusal.value, QueueMismatch | BrokerUnavailable)


async def test_an_end_is_not_kept_waiting_by_a_broker_that_takes_nothing(broker_wire: Wire, namespace: str) -> None:
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        broker_wire.blackhole()
        fates = [publish(queue, Envelope("", b"x" * 1024 * 1024, "text/plain")) for _ in range(50)]  # more than any buffer on the way
        await asyncio.sleep(0.1)  # for the first of it to be on its way
        begun = time.monotonic()
    assert all(isinstance(fate, BrokerUnavailable) for fate in await asyncio.gather(*fates))
    await until(lambda: not [task for task in asyncio.all_tasks() if "Connection.__" in repr(task.get_coro())])
    assert time.monotonic() - begun < 20


async def test_a_connection_keeps_nothing_of_the_queues_that_came_and_went(broker_url: str, namespace: str) -> None:
    async def comes_and_goes(queue: Queue) -> None:
        await queue.declare("b", 1, None)
        await queue.depth("b", 1)
        await queue.unbind("b", 1)
        assert await queue.delete("b", 1, only_if_empty=False)

    def locks_and_futures() -> int:
        gc.collect()
        return sum(isinstance(kept, asyncio.Lock | asyncio.Future) for kept in gc.get_objects())

    async with open_rabbitmq(broker_url, namespace, "controller") as queue:
        await comes_and_goes(queue)
        before = locks_and_futures()
        for _ in range(10):
            await comes_and_goes(queue)
        await until(lambda: locks_and_futures() < before + 10)


async def test_who_seldom_publishes_seldom_asks_whether_the_broker_takes_messages(broker_url: str, namespace: str) -> None:
    """Each replica of a fleet would cost the broker a message a second otherwise."""
    async with (
        open_rabbitmq(broker_url, namespace, "proxy") as often,
        open_rabbitmq(broker_url, namespace, "replica", probe_every_s=PROBE_SELDOM_EVERY_S) as rarely,
    ):
        await often.declare("b", 1, None)
        assert await publish(often, text("a")) is None
        assert await publish(rarely, text("b")) is None  # each has published, so each asks by publishing
        sent, sent_rarely = published_by(often), published_by(rarely)
        await until(lambda: published_by(often) >= sent + 4)
        assert published_by(rarely) <= sent_rarely + 1


def published_by(queue: RabbitQueue) -> int:
    assert queue._channel is not None
    return queue._channel._next_tag


T = TypeVar("T")


class NewerChannel:
    """A channel to a RabbitMQ of 4.3.2 or later, as far as queues for jobs go: it refuses a timeout for a new classic queue, and compares
    it where the queue is there."""

    def __init__(self, queues: dict[str, dict[str, Any]], refused: list[str]) -> None:
        self._queues = queues
        self._refused = refused

    async def exchange_declare(self, *_: object, **__: object) -> None: ...

    async def queue_bind(self, *_: object, **__: object) -> None: ...

    async def queue_declare(self, name: str, *, durable: bool, arguments: dict[str, Any]) -> None:
        known, timeout = self._queues.get(name), "x-consumer-timeout"
        if known is None and timeout in arguments:
            self._refuse(f"invalid arg '{timeout}' for queue '{name}' in vhost '/' of queue type rabbit_classic_queue")
        if known is not None and known.get(timeout) != arguments.get(timeout):
            self._refuse(f"inequivalent arg '{timeout}' for queue '{name}' in vhost '/'")
        self._queues[name] = arguments

    def _refuse(self, why: str) -> None:
        self._refused.append(why)
        raise ChannelPreconditionFailed(f"PRECONDITION_FAILED - {why}")


class NewerTopology(RabbitTopology):
    """Declares on such a RabbitMQ."""

    def __init__(self) -> None:
        super().__init__(Link("amqp://nowhere", "test"), "n")
        self.queues: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []

    async def _on_own_channel(self, act: Callable[[Any], Awaitable[T]]) -> T:
        return await act(NewerChannel(self.queues, self.refused))


async def test_a_broker_that_refuses_a_timeout_for_classic_queues_gets_the_queue_for_jobs_without_one() -> None:
    topology = NewerTopology()
    for generation in (1, 2, 1, 2):
        await topology.declare("b", generation, None, 1)
    assert "x-consumer-timeout" not in topology.queues["n.jobs.b.1"] and topology.queues["n.jobs.b.2"]["x-max-priority"] == 4
    assert len(topology.refused) == 1, "it asks again and again"


async def test_a_queue_for_jobs_that_an_earlier_rabbitmq_made_with_a_timeout_is_kept() -> None:
    topology = NewerTopology()
    topology.queues["n.jobs.old.1"] = {"x-consumer-timeout": JOB_UNACKED_MS}
    for _ in range(2):
        for backend in ("new", "old"):
            await topology.declare(backend, 1, None, 1)
    assert "x-consumer-timeout" in topology.queues["n.jobs.old.1"] and "x-consumer-timeout" not in topology.queues["n.jobs.new.1"]
