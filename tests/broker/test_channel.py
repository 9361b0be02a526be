"""Joined writes, tracked confirms, and the order of what is written, on a transport of ours that keeps what is written."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from aiormq.abc import ChannelFrame
from pamqp import commands, frame, header
from pamqp.commands import Basic

from mqserve.broker.errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded
from mqserve.broker.rabbitmq.channel import JoinedChannel
from mqserve.broker.rabbitmq.hot_frames import HotProtocol
from tests.broker.traffic import text, until

pytestmark = pytest.mark.anyio

PROPERTIES = text("any").to_amqp()


async def test_publishes_of_one_turn_are_one_write() -> None:
    wire = Wire()
    channel = wire.joined()
    for body in (b"first", b"", b"x" * 250):
        channel.publish("exchange", "b", PROPERTIES, body, "", ignore)
    (written,) = await wire.writes()
    methods = [part for part in written if isinstance(part, Basic.Publish)]
    heads = [part for part in written if isinstance(part, header.ContentHeader)]
    bodies = [part.value for part in written if hasattr(part, "value")]
    assert [method.routing_key for method in methods] == ["b"] * 3
    assert [head.body_size for head in heads] == [5, 0, 250]
    assert bodies == [b"first", b"x" * 100, b"x" * 100, b"x" * 50]


async def test_publishes_of_a_later_turn_are_another_write() -> None:
    wire = Wire()
    channel = wire.joined()
    channel.publish("exchange", "b", PROPERTIES, b"", "", ignore)
    assert len(await wire.writes()) == 1
    channel.publish("exchange", "b", PROPERTIES, b"", "", ignore)
    assert len(await wire.writes()) == 1


async def test_nothing_is_written_while_the_transport_is_full_and_all_of_it_later() -> None:
    wire = Wire()
    channel = wire.joined(lambda *delivery: None)
    wire.delivers(1)
    wire.hot.pause_writing()
    for name in ("first", "second"):
        channel.publish("exchange", name, PROPERTIES, b"", "", ignore)
        assert await wire.writes() == []
    channel.ack(1)
    assert await wire.writes() == []
    assert channel.held == 1
    wire.hot.resume_writing()
    (written,) = await wire.writes()
    assert [part.routing_key for part in written if isinstance(part, Basic.Publish)] == ["first", "second"]
    assert isinstance(written[-1], Basic.Ack)
    assert channel.held == 0


async def test_much_is_written_only_as_far_as_the_transport_takes_it_and_messages_stay_whole() -> None:
    wire = Wire(pauses_at=100_000)
    channel = wire.joined()
    for name in ("first", "second", "third"):
        channel.publish("exchange", name, PROPERTIES, b"x" * 150_000, "", ignore)
    (written,) = await wire.writes()
    assert [part.routing_key for part in written if isinstance(part, Basic.Publish)] == ["first"]
    assert sum(len(part.value) for part in written if hasattr(part, "value")) == 150_000
    for name in ("second", "third"):
        wire.hot.resume_writing()
        (written,) = await wire.writes()
        assert [part.routing_key for part in written if isinstance(part, Basic.Publish)] == [name]


async def test_what_aiormq_has_still_to_write_is_not_overtaken() -> None:
    wire = Wire()
    channel = wire.joined()
    wire.channel.write_queue.put_nowait(ChannelFrame(payload=b"of aiormq", should_close=False))
    for name in ("first", "second"):
        channel.publish("exchange", name, PROPERTIES, b"", "", ignore)
        assert await wire.writes() == []
    queued = [wire.channel.write_queue.get_nowait().payload for _ in range(3)]
    assert queued[0] == b"of aiormq"
    assert [next(parts_of(payload)).routing_key for payload in queued[1:]] == ["first", "second"]
    channel.publish("exchange", "third", PROPERTIES, b"", "", ignore)
    assert [written[0].routing_key for written in await wire.writes()] == ["third"]


async def test_nothing_is_lost_while_aiormqs_queue_is_full() -> None:
    wire = Wire(room=1)
    channel = wire.joined()
    wire.channel.write_queue.put_nowait(ChannelFrame(payload=b"of aiormq", should_close=False))
    channel.publish("exchange", "first", PROPERTIES, b"", "", ignore)
    await asyncio.sleep(0)
    channel.publish("exchange", "second", PROPERTIES, b"", "", ignore)
    await asyncio.sleep(0)
    assert wire.channel.write_queue.get_nowait().payload == b"of aiormq"
    await until(lambda: wire.transport.written)
    (written,) = await wire.writes()
    assert [part.routing_key for part in written if isinstance(part, Basic.Publish)] == ["first", "second"]


@pytest.mark.parametrize("method", [commands.Channel.Close(404, "NOT_FOUND", 0, 0), commands.Channel.CloseOk()])
async def test_nothing_is_written_on_a_channel_that_the_broker_has_closed(method: Any) -> None:
    """Before aiormq knows of it: RabbitMQ would end the connection."""
    wire = Wire()
    channel = wire.joined(lambda *delivery: None)
    wire.delivers(1)
    channel.ack(1)
    wire.hears(method)
    assert channel.is_open
    assert await wire.writes() == []


async def test_closing_sends_what_is_due_even_to_a_full_transport_and_nothing_after() -> None:
    wire, seen = Wire(), []
    channel = wire.joined(lambda *delivery: seen.append(delivery))
    wire.delivers(1, 2, 3)
    wire.hot.pause_writing()
    channel.ack(1)
    channel.requeue(2)
    await channel.close()
    nack, ack = parts_of(wire.channel.write_queue.get_nowait().payload)
    assert (nack.delivery_tag, ack.delivery_tag) == (2, 1)
    wire.hot.resume_writing()
    channel.ack(3)
    wire.delivers(4)
    assert await wire.writes() == []
    assert len(seen) == 3


async def test_one_confirm_of_many_settles_all_up_to_its_tag() -> None:
    wire, fates = Wire(), Fates()
    channel = wire.joined()
    for name in "abcd":
        channel.publish("exchange", "b", PROPERTIES, b"", name, fates.of(name))
    wire.hears(Basic.Ack(delivery_tag=3, multiple=True))
    assert fates.told == {"a": None, "b": None, "c": None}
    wire.hears(Basic.Ack(delivery_tag=4, multiple=False))
    assert fates.told["d"] is None


async def test_a_refusal_is_an_overload_and_only_for_its_tag() -> None:
    wire, fates = Wire(), Fates()
    channel = wire.joined()
    for name in "ab":
        channel.publish("exchange", "b", PROPERTIES, b"", name, fates.of(name))
    wire.hears(Basic.Nack(delivery_tag=2))
    assert isinstance(fates.told["b"], Overloaded)
    assert "a" not in fates.told


async def test_a_returned_message_is_not_routed_even_when_its_confirm_covers_others() -> None:
    wire, fates = Wire(), Fates()
    channel = wire.joined()
    for name in ("known", "unknown", "unknown too"):
        channel.publish("exchange", name, PROPERTIES, b"", "", fates.of(name))
    wire.hears(Basic.Return(312, "NO_ROUTE", "exchange", "unknown"))
    wire.hears(Basic.Return(312, "NO_ROUTE", "exchange", "unknown too"))
    wire.hears(Basic.Ack(delivery_tag=3, multiple=True))
    assert fates.told["known"] is None
    assert isinstance(fates.told["unknown"], NotRouted)
    assert isinstance(fates.told["unknown too"], NotRouted)


async def test_what_is_unconfirmed_at_the_loss_may_have_been_sent() -> None:
    wire, fates = Wire(), Fates()
    channel = wire.joined()
    channel.publish("exchange", "b", PROPERTIES, b"", "", fates.of("a"))
    wire.channel.closing.set_result(None)
    await channel.wait_closed()
    await asyncio.sleep(0)
    error = fates.told["a"]
    assert isinstance(error, BrokerUnavailable) and error.maybe_sent
    channel.publish("exchange", "b", PROPERTIES, b"", "", fates.of("b"))
    error = fates.told["b"]
    assert isinstance(error, BrokerUnavailable) and not error.maybe_sent


@pytest.mark.parametrize(
    ("finished", "acks"),
    [
        ([1, 2, 3], [(3, True)]),
        ([3, 1, 2], [(3, True)]),
        ([1, 2, 4, 5], [(2, True), (4, False), (5, False)]),
        ([2, 3], [(2, False), (3, False)]),
        ([5, 4, 3, 2, 1], [(5, True)]),
    ],
)
async def test_acks_of_one_turn_are_joined_and_never_pass_an_unfinished_one(finished: list[int], acks: list[tuple[int, bool]]) -> None:
    wire = Wire()
    channel = wire.joined(lambda *delivery: None)
    wire.delivers(1, 2, 3, 4, 5)
    for tag in finished:
        channel.ack(tag)
    (written,) = await wire.writes()
    assert [(part.delivery_tag, part.multiple) for part in written] == acks
    assert channel.held == 5 - len(finished)


async def test_an_ack_of_many_covers_no_requeued_message() -> None:
    wire = Wire()
    channel = wire.joined(lambda *delivery: None)
    wire.delivers(1, 2, 3)
    channel.ack(1)
    channel.ack(3)
    channel.requeue(2)
    (written,) = await wire.writes()
    nack, ack = written
    assert (nack.name, nack.delivery_tag, nack.requeue) == ("Basic.Nack", 2, True)
    assert (ack.name, ack.delivery_tag, ack.multiple) == ("Basic.Ack", 3, True)
    assert channel.held == 0


async def test_a_second_ack_of_a_message_is_not_sent() -> None:
    wire = Wire()
    channel = wire.joined(lambda *delivery: None)
    wire.delivers(1)
    channel.ack(1)
    assert len(await wire.writes()) == 1
    channel.ack(1)
    channel.requeue(1)
    assert await wire.writes() == []


def ignore(error: MQServeError | None) -> None:
    pass


class Fates:
    """What each message was told; telling one twice fails the test."""

    def __init__(self) -> None:
        self.told: dict[str, MQServeError | None] = {}

    def of(self, name: str) -> Any:
        def settled(error: MQServeError | None) -> None:
            assert name not in self.told
            self.told[name] = error

        return settled


class FakeChannel:
    """As much of aiormq's channel as ours uses: bodies are cut at 100 bytes."""

    number = 7
    max_content_size = 100

    def __init__(self, room: int) -> None:
        self.write_queue: asyncio.Queue[ChannelFrame] = asyncio.Queue(room)
        self.closing = asyncio.get_running_loop().create_future()

    @property
    def is_closed(self) -> bool:
        return self.closing.done()

    async def close(self) -> None:
        pass


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and pauses the writing after so many bytes."""

    def __init__(self, protocol: HotProtocol, pauses_at: int) -> None:
        super().__init__()
        self._protocol = protocol
        self._pauses_at = pauses_at
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        if len(data) >= self._pauses_at:
            self._protocol.pause_writing()


class Wire:
    """Both ends: what the broker says, and what it is told."""

    def __init__(self, room: int = 100, pauses_at: int = 2**31) -> None:
        self.channel: Any = FakeChannel(room)
        self._reader = asyncio.StreamReader()
        self.hot = HotProtocol(self._reader)
        self.transport = FakeTransport(self.hot, pauses_at)
        self.hot.connection_made(self.transport)

    def joined(self, on_delivery: Any = None) -> JoinedChannel:
        return JoinedChannel(self.channel, self.hot, on_delivery)

    def hears(self, said: Any) -> None:
        raw = frame.marshal(said, FakeChannel.number)
        if isinstance(said, Basic.Return | Basic.Deliver):
            raw += frame.marshal(header.ContentHeader(body_size=0), FakeChannel.number)
        self.hot.data_received(raw)

    def delivers(self, *tags: int) -> None:
        for tag in tags:
            self.hears(Basic.Deliver("consumer", tag, False, "exchange", "b"))

    async def writes(self) -> list[list[Any]]:
        """The writes that are due after this turn, each as its frames."""
        await asyncio.sleep(0)
        written, self.transport.written = self.transport.written, []
        return [list(parts_of(payload)) for payload in written]


def parts_of(payload: bytes) -> Iterator[Any]:
    while payload:
        size, number, part = frame.unmarshal(payload)
        assert number == FakeChannel.number
        payload = payload[size:]
        yield part
