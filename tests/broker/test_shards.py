"""A backend with several queues on RabbitMQ: what goes where, what each takes, and what a sender does with those that refuse."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pika
import pytest

from mqserve.broker.calls.call import Ticket
from mqserve.broker.calls.sending import RequestSender
from mqserve.broker.envelope import Envelope, RequestHead, mint_id
from mqserve.broker.errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded, QueueMismatch
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Queue
from mqserve.broker.queue_names import backend_queue
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.shards import FIRST, RoundRobin, other_shards, shares
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import Hands, text, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def rabbitmq(broker_url: str, namespace: str) -> AsyncIterator[Queue]:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        yield queue


@pytest.mark.parametrize(("total", "shards", "each"), [(7, 3, [3, 2, 2]), (64, 1, [64]), (3, 3, [1, 1, 1]), (1, 3, [1, 1, 1])])
def test_a_limit_is_divided_so_that_each_queue_has_some_of_it(total: int, shards: int, each: list[int]) -> None:
    assert shares(total, shards) == each


def test_requests_go_round_the_queues() -> None:
    robin = RoundRobin()
    robin.keep({"b": 3, "single": 1})
    assert Counter(robin.take("b")[0] for _ in range(30)) == {0: 10, 1: 10, 2: 10}
    assert all(sorted(robin.take("b")) == [0, 1, 2] for _ in range(3))
    assert robin.take("single") == robin.take("unknown") == FIRST
    robin.keep({"b": 1})
    assert not robin.is_needed and robin.take("b") == FIRST


def test_a_full_queue_is_followed_by_the_next_and_a_missing_one_by_the_first() -> None:
    full, missing = Overloaded("full"), NotRouted("missing")
    assert other_shards((2, 0, 1), full) == (0, 1) and other_shards((1,), full) == ()
    assert other_shards((2, 0, 1), missing) == FIRST and other_shards(FIRST, missing) == ()
    assert other_shards((2, 0, 1), MQServeError("another")) == ()


async def test_a_replica_takes_from_all_queues_and_the_depth_is_their_sum(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    await spread(rabbitmq, "abc")
    assert await rabbitmq.depth("b", 1, 3) == 3
    assert [await rabbitmq.depth("b", 1, shards) for shards in (1, 2)] == [1, 2]
    hands = Hands()
    await rabbitmq.consume("b", 1, 10, hands, 3)
    await hands.hold(3)
    assert sorted(hands.bodies) == ["a", "b", "c"]


async def test_the_prefetch_limits_what_is_held_of_all_queues_together(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    await spread(rabbitmq, "abcdefghijkl")
    hands = Hands()
    consumption = await rabbitmq.consume("b", 1, 5, hands, 3)
    await ready(rabbitmq, 7)
    await hands.hold(5)
    hands.ack_all()
    await hands.hold(5)
    await ready(rabbitmq, 2)
    consumption.set_prefetch(3)  # one of each queue from now on, beside what is held
    hands.ack_all()
    await hands.hold(1)
    await ready(rabbitmq, 1)
    await consumption.cancel()


@pytest.mark.parametrize("shard", [0, 2])
async def test_a_queue_that_was_deleted_keeps_no_other_from_being_consumed_and_comes_back_by_itself(
    rabbitmq: Queue, broker_url: str, namespace: str, shard: int
) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    await asyncio.to_thread(delete_queue, broker_url, backend_queue(namespace, "b", 1, shard))
    hands = Hands()
    consumption = await rabbitmq.consume("b", 1, 6, hands, 3)
    others = [other for other in range(3) if other != shard]
    assert [await publish(rabbitmq, text(str(other)), other) for other in others] == [None, None]
    await hands.hold(2)
    hands.ack_all()
    await rabbitmq.declare("b", 1, None, 3)
    assert await publish(rabbitmq, text("back"), shard) is None
    await hands.hold(1)
    assert hands.bodies[-1] == "back"
    hands.ack_all()
    await consumption.cancel()
    await spread(rabbitmq, "abc")
    await ready(rabbitmq, 3)


async def test_a_consumer_that_is_cancelled_while_it_begins_takes_nothing_afterwards(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    await (await rabbitmq.consume("b", 1, 6, Hands(), 3)).cancel()  # one of the three consumes; the others may not yet
    await spread(rabbitmq, "abc")
    await ready(rabbitmq, 3)


async def test_with_none_of_its_queues_a_backend_is_not_consumed_and_nothing_is_left_behind(
    rabbitmq: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.rabbitmq.consumer.OPERATION_BUDGET_S", 1.0)
    with pytest.raises(BrokerUnavailable, match="did not let us consume"):
        await rabbitmq.consume("b", 1, 6, Hands(), 3)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("consume ")]


async def test_each_queue_takes_its_share_of_the_limit(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, 4, 3)
    fates = [[await publish(rabbitmq, text("x"), shard) for _ in range(3)] for shard in range(3)]
    assert [[type(fate) for fate in each].count(type(None)) for each in fates] == [2, 1, 1]


async def test_an_unbound_generation_gets_nothing_more_in_any_queue(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    await rabbitmq.unbind("b", 1, 3)
    assert [type(await publish(rabbitmq, text("x"), shard)) for shard in range(3)] == [NotRouted] * 3


async def test_no_queue_is_deleted_while_one_of_them_is_not_empty(rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    assert await publish(rabbitmq, text("kept"), 1) is None
    assert not await rabbitmq.delete("b", 1, 3, only_if_empty=True)
    assert await rabbitmq.count_shards("b", 1) == 3
    assert await rabbitmq.depth("b", 1, 3) == 1
    assert await rabbitmq.delete("b", 1, 3, only_if_empty=False)
    assert await rabbitmq.count_shards("b", 1) == 0


async def test_the_queues_of_a_generation_are_counted_on_the_broker(rabbitmq: Queue) -> None:
    assert await rabbitmq.count_shards("b", 1) == 0
    await rabbitmq.declare("b", 1, None, 3)
    assert await rabbitmq.count_shards("b", 1) == await rabbitmq.count_shards("b", 1, known=1) == 3
    await rabbitmq.declare("b", 1, None, 3)
    with pytest.raises(QueueMismatch):
        await rabbitmq.declare("b", 1, 9, 3)


async def test_in_memory_there_is_one_queue_however_many_are_asked_for() -> None:
    queue = EmbeddedQueue()
    await queue.declare("b", 1, 3, 3)
    await spread(queue, "abc")
    assert isinstance(await publish(queue, text("d"), 2), Overloaded)
    assert (await queue.depth("b", 1, 3), await queue.count_shards("b", 1)) == (3, 1)


async def test_a_request_that_a_full_queue_refuses_goes_to_the_next(sender: RequestSender, rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, 4, 3)
    sender.follow({"b": 3})
    tickets = [send(sender) for _ in range(9)]
    await until(lambda: sum(ticket.future.done() for ticket in tickets) == 5)
    refusals = [ticket.future.exception() for ticket in tickets if ticket.future.done()]
    assert all(isinstance(refusal, Overloaded) and refusal.retry_after_s for refusal in refusals)
    assert [await rabbitmq.depth("b", 1, shards) for shards in (1, 2, 3)] == [2, 3, 4], "all are full"


async def test_a_request_for_a_queue_that_is_not_there_goes_to_the_first(sender: RequestSender, rabbitmq: Queue) -> None:
    """As between the change of their number and its making."""
    await rabbitmq.declare("b", 1, None)
    sender.follow({"b": 5})
    tickets = [send(sender) for _ in range(10)]
    await ready(rabbitmq, 10, shards=1)
    assert not any(ticket.future.done() for ticket in tickets)
    with pytest.raises(NotRouted):
        await send(sender, "unknown").future


async def test_copies_are_spread_too(sender: RequestSender, rabbitmq: Queue) -> None:
    await rabbitmq.declare("b", 1, None, 3)
    sender.follow({"b": 3})
    for _ in range(6):
        sender.send_shadow("b", b"", "text/plain", RequestHead(), origin="http", timeout_s=60)
    await ready(rabbitmq, 6)
    assert [await rabbitmq.depth("b", 1, shards) for shards in (1, 2, 3)] == [2, 4, 6]


@pytest.fixture
async def sender(rabbitmq: Queue) -> AsyncIterator[RequestSender]:
    sender = RequestSender(rabbitmq, EmbeddedStore(), StoreKeys("tests"), "test")
    reading = asyncio.create_task(sender.run())
    yield sender
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


def send(sender: RequestSender, backend: str = "b") -> Ticket:
    ticket = Ticket(mint_id())
    sender.send(ticket, backend, b"", "text/plain", RequestHead(), origin="http", timeout_s=60)
    return ticket


async def publish(queue: Queue, envelope: Envelope, shard: int) -> MQServeError | None:
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.publish("b", envelope, fate.set_result, shard)
    return await fate


def delete_queue(url: str, queue: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_delete(queue)


async def spread(queue: Queue, bodies: str) -> None:
    """Publishes them to three queues in turn."""
    assert [await publish(queue, text(body), number % 3) for number, body in enumerate(bodies)] == [None] * len(bodies)


async def ready(queue: Queue, wanted: int, shards: int = 3) -> None:
    """Waits until so many messages are ready in the queues of the first generation."""

    async def are() -> bool:
        return await queue.depth("b", 1, shards) == wanted

    await until(are)
