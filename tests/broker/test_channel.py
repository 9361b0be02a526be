"""Joined writes and tracked confirms, against a channel of ours that keeps what is written; and aiormq's private names."""

import asyncio
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiormq
import pytest
from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp import commands, frame, header

from mqserve.broker.errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded
from mqserve.broker.rabbitmq.channel import JoinedChannel
from tests.broker.traffic import text

pytestmark = pytest.mark.anyio

PROPERTIES = text("any").to_amqp()


@pytest.mark.parametrize("handler", ["_on_deliver_frame", "_on_return_frame", "_on_confirm_frame"])
def test_aiormq_still_calls_the_handlers_that_we_replace(handler: str) -> None:
    assert inspect.iscoroutinefunction(getattr(Channel, handler))
    assert f"self.{handler}(frame)" in inspect.getsource(Channel._reader)


@pytest.mark.parametrize("name", ["_Channel__get_content_header", "_read_content", "is_closed", "closing"])
def test_aiormq_still_has_the_names_that_we_use(name: str) -> None:
    assert hasattr(Channel, name)


async def test_a_channel_of_aiormq_still_has_the_fields_that_we_use(broker_url: str) -> None:
    connection = await aiormq.connect(broker_url)
    channel = await connection.channel()
    assert isinstance(channel, Channel)
    assert isinstance(channel.number, int)
    assert isinstance(channel.max_content_size, int)
    assert isinstance(channel.write_queue, asyncio.Queue)
    assert isinstance(channel.closing, asyncio.Future)
    await connection.close()


async def test_publishes_of_one_turn_are_one_write() -> None:
    wire = Wire()
    channel = JoinedChannel(wire.channel)
    for body in (b"first", b"", b"x" * 250):
        channel.publish("exchange", "b", PROPERTIES, body, "", ignore)
    (written,) = await wire.writes()
    methods = [part for part in written if isinstance(part, commands.Basic.Publish)]
    heads = [part for part in written if isinstance(part, header.ContentHeader)]
    bodies = [part.value for part in written if hasattr(part, "value")]
    assert [method.routing_key for method in methods] == ["b"] * 3
    assert [head.body_size for head in heads] == [5, 0, 250]
    assert bodies == [b"first", b"x" * 100, b"x" * 100, b"x" * 50]


async def test_publishes_of_a_later_turn_are_another_write() -> None:
    wire = Wire()
    channel = JoinedChannel(wire.channel)
    channel.publish("exchange", "b", PROPERTIES, b"", "", ignore)
    assert len(await wire.writes()) == 1
    channel.publish("exchange", "b", PROPERTIES, b"", "", ignore)
    assert len(await wire.writes()) == 1


async def test_nothing_is_lost_while_the_wire_is_full() -> None:
    wire = Wire(room=1)
    channel = JoinedChannel(wire.channel)
    channel.publish("exchange", "first", PROPERTIES, b"", "", ignore)
    await asyncio.sleep(0)
    channel.publish("exchange", "second", PROPERTIES, b"", "", ignore)
    await asyncio.sleep(0)
    channel.publish("exchange", "third", PROPERTIES, b"", "", ignore)
    routed = [part.routing_key for _ in range(2) for part in await wire.next_write() if isinstance(part, commands.Basic.Publish)]
    assert routed == ["first", "second", "third"]


async def test_one_confirm_of_many_settles_all_up_to_its_tag() -> None:
    wire, fates = Wire(), Fates()
    channel = JoinedChannel(wire.channel)
    for name in "abcd":
        channel.publish("exchange", "b", PROPERTIES, b"", name, fates.of(name))
    await wire.hears(commands.Basic.Ack(delivery_tag=3, multiple=True))
    assert fates.told == {"a": None, "b": None, "c": None}
    await wire.hears(commands.Basic.Ack(delivery_tag=4, multiple=False))
    assert fates.told["d"] is None


async def test_a_refusal_is_an_overload_and_only_for_its_tag() -> None:
    wire, fates = Wire(), Fates()
    channel = JoinedChannel(wire.channel)
    for name in "ab":
        channel.publish("exchange", "b", PROPERTIES, b"", name, fates.of(name))
    await wire.hears(commands.Basic.Nack(delivery_tag=2))
    assert isinstance(fates.told["b"], Overloaded)
    assert "a" not in fates.told


async def test_a_returned_message_is_not_routed_even_when_its_confirm_covers_others() -> None:
    wire, fates = Wire(), Fates()
    channel = JoinedChannel(wire.channel)
    for name in ("known", "unknown", "unknown too"):
        channel.publish("exchange", name, PROPERTIES, b"", "", fates.of(name))
    await wire.hears(commands.Basic.Return(312, "NO_ROUTE", "exchange", "unknown"))
    await wire.hears(commands.Basic.Return(312, "NO_ROUTE", "exchange", "unknown too"))
    await wire.hears(commands.Basic.Ack(delivery_tag=3, multiple=True))
    assert fates.told["known"] is None
    assert isinstance(fates.told["unknown"], NotRouted)
    assert isinstance(fates.told["unknown too"], NotRouted)


async def test_what_is_unconfirmed_at_the_loss_may_have_been_sent() -> None:
    wire, fates = Wire(), Fates()
    channel = JoinedChannel(wire.channel)
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
    channel = JoinedChannel(wire.channel, lambda *delivery: None)
    await wire.delivers(1, 2, 3, 4, 5)
    for tag in finished:
        channel.ack(tag)
    (written,) = await wire.writes()
    assert [(part.delivery_tag, part.multiple) for part in written] == acks
    assert channel.held == 5 - len(finished)


async def test_an_ack_of_many_covers_no_requeued_message() -> None:
    wire = Wire()
    channel = JoinedChannel(wire.channel, lambda *delivery: None)
    await wire.delivers(1, 2, 3)
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
    channel = JoinedChannel(wire.channel, lambda *delivery: None)
    await wire.delivers(1)
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


@dataclass
class Content:
    body: bytes
    properties: commands.Basic.Properties


class FakeChannel:
    """As much of aiormq's channel as ours uses: bodies are cut at 100 bytes, and every content is empty."""

    number = 7
    max_content_size = 100

    def __init__(self, room: int) -> None:
        self.write_queue: asyncio.Queue[ChannelFrame] = asyncio.Queue(room)
        self.closing = asyncio.get_running_loop().create_future()
        self._on_deliver_frame: Any = None
        self._on_return_frame: Any = None
        self._on_confirm_frame: Any = None

    @property
    def is_closed(self) -> bool:
        return self.closing.done()

    async def _Channel__get_content_header(self) -> Content:
        return Content(b"", commands.Basic.Properties())

    async def _read_content(self, method: object, content: Content) -> Content:
        return content


class Wire:
    """Both ends of the fake: what the broker says, and what it is told."""

    def __init__(self, room: int = 100) -> None:
        self.channel: Any = FakeChannel(room)

    async def hears(self, said: Any) -> None:
        if isinstance(said, commands.Basic.Return):
            await self.channel._on_return_frame(said)
        elif isinstance(said, commands.Basic.Deliver):
            await self.channel._on_deliver_frame(said)
        else:
            await self.channel._on_confirm_frame(said)

    async def delivers(self, *tags: int) -> None:
        for tag in tags:
            await self.hears(commands.Basic.Deliver("consumer", tag, False, "exchange", "b"))

    async def writes(self) -> list[list[Any]]:
        """The writes that are due after this turn, each as its frames."""
        await asyncio.sleep(0)
        return [list(parts_of(self.channel.write_queue.get_nowait().payload)) for _ in range(self.channel.write_queue.qsize())]

    async def next_write(self) -> list[Any]:
        return list(parts_of((await self.channel.write_queue.get()).payload))


def parts_of(payload: bytes) -> Iterator[Any]:
    while payload:
        size, number, part = frame.unmarshal(payload)
        assert number == FakeChannel.number
        payload = payload[size:]
        yield part
