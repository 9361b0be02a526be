"""What both queues promise: the same tests on the one in memory and on RabbitMQ."""

import asyncio
from collections.abc import Callable

import pika
import pytest

from mqserve.broker.embedded_queue import EmbeddedQueue
from mqserve.broker.envelope import Envelope, Header, Meta
from mqserve.broker.errors import NotRouted, Overloaded, QueueMismatch, TooLarge
from mqserve.broker.queue import Queue
from mqserve.broker.queue_names import dead_queue
from tests.broker.traffic import AckingHands, Hands, accepted, depth_is, publish, text, until

pytestmark = pytest.mark.anyio

ReadDeadLetter = Callable[[], tuple[bytes, str]]


async def test_a_message_arrives_as_it_was_published(queue: Queue) -> None:
    header = Header(origin="http", inbox="in", deadline=1_700_000_000_123, meta=Meta(path="/π", params=(("x", "float", "3.14"),)))
    sent = Envelope("an id", b"\x00\xffbody", "application/x-thing", header, priority=2, expiration_ms=60_000)
    hands = await consumed(queue)
    await accepted(queue, sent)
    await hands.hold(1)
    assert hands.held[0].envelope() == sent
    assert not hands.held[0].redelivered


@pytest.mark.parametrize("size", [0, 1, 300_000, 5_000_000])
async def test_a_body_of_any_size_arrives_intact(queue: Queue, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    hands = await consumed(queue)
    await accepted(queue, Envelope("big", body, "application/octet-stream"))
    await hands.hold(1)
    assert hands.held[0].envelope().body == body


async def test_a_message_for_an_unknown_backend_is_not_routed(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    assert isinstance(await publish(queue, text("lost"), backend="unknown"), NotRouted)


async def test_messages_without_an_id_learn_their_own_fate(queue: Queue) -> None:
    nameless = Envelope("", b"", "text/plain")
    await queue.declare("b", 1, None)
    backends = ["b", "unknown"] * 20
    fates = await asyncio.gather(*(publish(queue, nameless, backend) for backend in backends))
    assert [fate is None for fate in fates] == [backend == "b" for backend in backends]


async def test_a_full_queue_refuses_and_keeps_what_it_accepted(queue: Queue) -> None:
    await queue.declare("b", 1, max_length=3)
    fates = await asyncio.gather(*(publish(queue, text(str(number))) for number in range(5)))
    assert [type(fate) for fate in fates] == [type(None)] * 3 + [Overloaded] * 2
    hands = Hands()
    await queue.consume("b", 1, 10, hands)
    await hands.hold(3)
    assert hands.bodies == ["0", "1", "2"]


async def test_no_more_than_the_prefetch_is_unsettled(queue: Queue) -> None:
    hands = await consumed(queue, prefetch=2)
    await accepted(queue, *map(text, "abcde"))
    await depth_is(queue, 3)
    await hands.hold(2)
    hands.held[0].ack()
    await depth_is(queue, 2)
    await hands.hold(3)


async def test_a_wider_prefetch_takes_effect_at_once(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    hands = Hands()
    consumption = await queue.consume("b", 1, 1, hands)
    await accepted(queue, *map(text, "abcde"))
    await hands.hold(1)
    consumption.set_prefetch(3)
    await until(lambda: len(hands) >= 3)


async def test_a_narrower_prefetch_takes_effect_while_messages_flow(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    await accepted(queue, *(text(str(number)) for number in range(200)))
    hands = Hands()
    consumption = await queue.consume("b", 1, 5, hands)
    await hands.hold(5)
    consumption.set_prefetch(2)
    acked = 0

    async def holds_two_after_acking_all() -> bool:
        nonlocal acked
        acked += len(hands)
        hands.ack_all()
        await until(lambda: len(hands))
        return await queue.depth("b", 1) == 200 - acked - 2 and len(hands) == 2

    await until(holds_two_after_acking_all)
    assert acked < 50


async def test_an_acked_message_is_gone(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    hands = Hands()
    consumption = await queue.consume("b", 1, 10, hands)
    await accepted(queue, text("a"), text("b"))
    await hands.hold(2)
    hands.ack_all()
    await consumption.cancel()
    assert await queue.delete("b", 1, only_if_empty=True)


async def test_a_requeued_message_comes_again_and_says_so(queue: Queue) -> None:
    hands = await consumed(queue, prefetch=1)
    await accepted(queue, text("a"))
    await hands.hold(1)
    hands.held.pop().requeue()
    await hands.hold(1)
    assert hands.held[0].redelivered
    assert hands.bodies == ["a"]


async def test_a_higher_priority_is_delivered_first(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    await accepted(queue, text("low"), text("middle", priority=2), text("high", priority=4), text("low too"))
    hands = AckingHands()
    await queue.consume("b", 1, 1, hands)
    await until(lambda: len(hands.seen) == 4)
    assert hands.seen == ["high", "middle", "low", "low too"]


async def test_two_consumers_share_the_messages(queue: Queue) -> None:
    one, other = await consumed(queue, prefetch=2), await consumed(queue, prefetch=2)
    await accepted(queue, *map(text, "abcd"))
    await one.hold(2)
    await other.hold(2)
    assert sorted(one.bodies + other.bodies) == ["a", "b", "c", "d"]


async def test_a_cancelled_consumer_gets_nothing_more_and_settles_what_it_holds(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    hands = Hands()
    consumption = await queue.consume("b", 1, 2, hands)
    await accepted(queue, text("a"), text("b"))
    await hands.hold(2)
    await consumption.cancel()
    await consumption.cancel()
    await accepted(queue, text("c"))
    acked, requeued = hands.held
    acked.ack()
    requeued.requeue()
    await depth_is(queue, 2)
    await hands.hold(2)
    successor = await consumed(queue)
    await successor.hold(2)
    assert sorted(successor.bodies) == ["b", "c"]


async def test_a_dead_letter_keeps_its_body_and_its_reason(queue: Queue, read_dead_letter: ReadDeadLetter) -> None:
    hands = await consumed(queue)
    await accepted(queue, text("poison"))
    await hands.hold(1)
    fate = asyncio.get_running_loop().create_future()
    queue.dead_letter("b", hands.held[0], "it never parses", fate.set_result)
    assert await fate is None
    assert await asyncio.to_thread(read_dead_letter) == (b"poison", "it never parses")


async def test_a_new_generation_takes_over_and_the_old_one_drains(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    await accepted(queue, text("old"))
    await queue.declare("b", 2, 100)
    await queue.unbind("b", 1)
    await queue.unbind("b", 1)
    await accepted(queue, text("new"))
    await depth_is(queue, 1, generation=2)
    assert not await queue.delete("b", 1, only_if_empty=True)
    hands = Hands()
    consumption = await queue.consume("b", 1, 10, hands)
    await hands.hold(1)
    assert hands.bodies == ["old"]
    hands.ack_all()
    await consumption.cancel()
    await until(lambda: queue.delete("b", 1, only_if_empty=True))
    assert await queue.depth("b", 1) is None


async def test_a_queue_in_use_is_not_deleted(queue: Queue) -> None:
    await consumed(queue)
    assert not await queue.delete("b", 1, only_if_empty=True)
    assert await queue.delete("b", 1, only_if_empty=False)


async def test_deleting_a_queue_that_is_not_there_is_no_error(queue: Queue) -> None:
    assert await queue.delete("b", 1, only_if_empty=True)
    await queue.unbind("b", 1)


async def test_declaring_again_changes_nothing(queue: Queue) -> None:
    await queue.declare("b", 1, 5)
    await accepted(queue, text("a"))
    await queue.declare("b", 1, 5)
    assert await queue.depth("b", 1) == 1


async def test_declaring_with_other_arguments_is_a_mismatch(queue: Queue) -> None:
    await queue.declare("b", 1, 5)
    with pytest.raises(QueueMismatch, match="generation 1"):
        await queue.declare("b", 1, 6)
    await accepted(queue, text("a"))


async def test_the_depth_counts_what_waits_and_not_what_is_held(queue: Queue) -> None:
    assert await queue.depth("b", 1) is None
    await queue.declare("b", 1, None)
    assert await queue.depth("b", 1) == 0
    await accepted(queue, *map(text, "abc"))
    assert await queue.depth("b", 1) == 3
    await queue.consume("b", 1, 2, Hands())
    await depth_is(queue, 1)


async def test_a_head_of_200_kb_is_refused_before_anything_is_sent(queue: Queue) -> None:
    hands = await consumed(queue)
    head = Header(meta=Meta(headers=((b"cookie", b"x" * 200_000),)))
    with pytest.raises(TooLarge) as refusal:
        publish(queue, Envelope("huge", b"", "text/plain", head))
    assert refusal.value.status == 431
    await accepted(queue, text("next"))
    await hands.hold(1)
    assert hands.bodies == ["next"]


async def consumed(queue: Queue, prefetch: int = 10) -> Hands:
    """Hands that take what arrives for `b`."""
    hands = Hands()
    await queue.declare("b", 1, None)
    await queue.consume("b", 1, prefetch, hands)
    return hands


@pytest.fixture
def read_dead_letter(form: str, queue: Queue, namespace: str, request: pytest.FixtureRequest) -> ReadDeadLetter:
    """The oldest dead letter of `b`: its body and reason, from RabbitMQ as an operator would read it."""

    def embedded() -> tuple[bytes, str]:
        assert isinstance(queue, EmbeddedQueue)
        letter = queue.dead_letters["b"].popleft()
        return letter.envelope.body, letter.reason

    def distributed() -> tuple[bytes, str]:
        with pika.BlockingConnection(pika.URLParameters(request.getfixturevalue("broker_url"))) as connection:
            _, properties, body = connection.channel().basic_get(dead_queue(namespace, "b"), auto_ack=True)
            return body, properties.headers["mq-reason"]

    return embedded if form == "embedded" else distributed
