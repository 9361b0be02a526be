"""What both queues promise: the same tests on the one in memory and on RabbitMQ."""

import asyncio

import pytest
from msgspec.structs import replace

from mqserve.broker.dead_letters import Attempt, DeadLetter, Death, digest_of
from mqserve.broker.envelope import Envelope, Header, JobHead, RequestHead
from mqserve.broker.errors import NotRouted, Overloaded, QueueMismatch, TooLarge, UnknownBackend
from mqserve.broker.queue import Queue
from tests.broker.traffic import AckingHands, Hands, accepted, depth_is, publish, publish_job, text, until

pytestmark = pytest.mark.anyio


async def test_a_message_arrives_as_it_was_published(queue: Queue) -> None:
    header = Header(origin="http", inbox="in", deadline=1_700_000_000_123, meta=RequestHead(path="/π", params=(("x", "float", "3.14"),)))
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


DEATH = Death("it never parses", "Traceback …", (Attempt("b#1", 1_700_000_000_123, "it was killed"),), died_at_ms=1_700_000_001_000)


async def test_a_dead_letter_is_the_message_as_it_came_and_what_it_died_of(queue: Queue) -> None:
    header = Header(origin="http", inbox="in", deadline=1_700_000_000_123, meta=RequestHead(path="/π"))
    sent = Envelope("an id", b"\x00\xffbody", "text/x", header, reply_to="r", correlation_id="c", priority=2, expiration_ms=60_000)
    await dead(queue, sent)
    (letter,) = await read(queue, 1)
    assert letter.death == DEATH
    assert (letter.backend, letter.id, letter.name) == ("b", "an id", "an id")
    assert letter.envelope() == replace(sent, expiration_ms=0, persistent=True)


async def test_a_dead_letter_without_an_id_is_named_by_backend_and_body(queue: Queue) -> None:
    await dead(queue, Envelope("", b"body", "text/plain"))
    (letter,) = await read(queue, 1)
    assert (letter.id, letter.name) == ("", digest_of("b", b"body"))


async def test_a_death_that_tells_too_much_is_cut_to_what_a_message_carries(queue: Queue) -> None:
    attempts = tuple(Attempt(f"b#{number}", number, "it was killed") for number in range(1000))
    await dead(queue, text("poison"), of=Death("why " * 100_000, "frame\n" * 100_000 + "the error", attempts))
    (letter,) = await read(queue, 1)
    assert letter.death.reason.startswith("why why")
    assert letter.death.traceback.endswith("the error")
    assert letter.death.attempts[-1] == attempts[-1]
    assert letter.envelope() == text("poison", persistent=True)


async def test_dead_letters_that_are_not_removed_are_there_again(queue: Queue) -> None:
    await dead(queue, *map(text, "abcd"))
    async with queue.dead_letters("b") as letters:
        assert letters.waiting == 4
        async for letter in letters:
            if letter.body == b"c":
                await letters.remove(letter)
    assert sorted(letter.body for letter in await read(queue, 3)) == [b"a", b"b", b"d"]


async def test_dead_letters_in_hand_go_back_when_an_error_ends_the_reading(queue: Queue) -> None:
    await dead(queue, *map(text, "abc"))
    with pytest.raises(LookupError):
        async with queue.dead_letters("b") as letters:
            async for _ in letters:
                raise LookupError
    assert await read(queue, 3)


async def test_no_more_dead_letters_are_taken_than_asked(queue: Queue) -> None:
    await dead(queue, *map(text, "abc"))
    async with queue.dead_letters("b", at_most=2) as letters:
        assert letters.waiting == 3
        assert len([letter async for letter in letters]) == 2
    assert await read(queue, 3)


async def test_two_who_read_dead_letters_do_not_get_the_same(queue: Queue) -> None:
    await dead(queue, *map(text, "abcd"))
    async with queue.dead_letters("b", at_most=2) as mine, queue.dead_letters("b") as others:
        bodies = [letter.body async for letter in mine] + [letter.body async for letter in others]
    assert len(bodies) == len(set(bodies))
    assert await read(queue, 4)


async def test_what_dies_while_dead_letters_are_read_is_left_for_the_next_time(queue: Queue) -> None:
    await dead(queue, text("a"))
    seen = []
    async with queue.dead_letters("b") as letters:
        async for letter in letters:
            seen.append(letter.body)
            await letters.remove(letter)
            await dead(queue, text("a"))
    assert seen == [b"a"]
    assert await read(queue, 1)


async def test_dead_letters_in_hand_survive_the_deletion_of_their_backend(queue: Queue) -> None:
    await dead(queue, text("a"))
    async with queue.dead_letters("b") as letters:
        assert len([letter async for letter in letters]) == 1
        await queue.delete("b", 1, only_if_empty=False)
    assert await read(queue, 1)


async def test_dead_letters_of_an_unknown_backend_are_an_error_and_of_a_healthy_one_none(queue: Queue) -> None:
    with pytest.raises(UnknownBackend, match="'b'"):
        await read(queue, 0)
    await queue.declare("b", 1, None)
    assert await read(queue, 0) == []
    await queue.delete("b", 1, only_if_empty=False)
    with pytest.raises(UnknownBackend):
        await read(queue, 0)


async def test_a_dead_letter_is_published_again_under_its_id_with_its_properties(queue: Queue) -> None:
    header = Header(origin="http", inbox="in", deadline=1, meta=RequestHead(path="/π"))
    sent = Envelope("an id", b"body", "text/x", header, reply_to="r", correlation_id="c", priority=2, expiration_ms=60_000)
    await dead(queue, sent)
    hands = await consumed(queue)
    async with queue.dead_letters("b") as letters:
        async for letter in letters:
            fate = asyncio.get_running_loop().create_future()
            queue.republish(letter.renewed(deadline_ms=77), fate.set_result)
            assert await fate is None
    await hands.hold(1)
    renewed = replace(header, inbox="", deadline=77, again=True)
    assert hands.held[0].envelope() == replace(sent, header=renewed, expiration_ms=0, persistent=True)
    assert await read(queue, 1), "it stays until it is removed"


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
    head = Header(meta=RequestHead(headers=((b"cookie", b"x" * 200_000),)))
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


async def dead(queue: Queue, *envelopes: Envelope, of: Death = DEATH) -> None:
    """Each goes to the dead letters of `b`, in order."""
    hands = Hands()
    await queue.declare("b", 1, None)
    consumption = await queue.consume("b", 1, 10, hands)
    for envelope in envelopes:
        await accepted(queue, envelope)
        await hands.hold(1)
        fate = asyncio.get_running_loop().create_future()
        queue.dead_letter("b", hands.held[0], of, fate.set_result)
        assert await fate is None
        hands.ack_all()
    await consumption.cancel()


async def read(queue: Queue, count: int) -> list[DeadLetter]:
    """All dead letters of `b`, which are so many, left where they are. What somebody lets go is back a moment later."""
    found: list[DeadLetter] = []

    async def all_there() -> bool:
        async with queue.dead_letters("b") as letters:
            found[:] = [letter async for letter in letters]
        return len(found) == count

    await until(all_there)
    return found


async def test_a_job_waits_in_a_queue_of_its_own_and_is_taken_by_who_asks_for_jobs(queue: Queue) -> None:
    hands, jobs = await consumed(queue), Hands()
    await accepted(queue, text("a wait"))
    assert await publish_job(queue, text("a job", priority=3)) is None
    await depth_is(queue, 1)
    assert await queue.count_jobs("b", 1) == 1
    await queue.consume("b", 1, 10, jobs, jobs=True)
    await jobs.hold(1)
    await hands.hold(1)
    assert (hands.bodies, jobs.bodies) == (["a wait"], ["a job"])
    assert jobs.held[0].envelope() == text("a job", priority=3, persistent=True)


async def test_jobs_have_no_part_in_the_limit_of_the_waits(queue: Queue) -> None:
    await queue.declare("b", 1, max_length=1)
    await accepted(queue, text("a wait"))
    assert [await publish_job(queue, text(f"job {number}")) for number in range(3)] == [None] * 3
    assert isinstance(await publish(queue, text("one too many")), Overloaded)


async def test_a_job_of_a_higher_priority_is_delivered_first(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    for job in (text("low"), text("middle", priority=2), text("high", priority=4)):
        assert await publish_job(queue, job) is None
    hands = AckingHands()
    await queue.consume("b", 1, 1, hands, jobs=True)
    await until(lambda: len(hands.seen) == 3)
    assert hands.seen == ["high", "middle", "low"]


async def test_a_job_for_an_unknown_backend_is_not_routed(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    assert isinstance(await publish_job(queue, text("lost"), backend="unknown"), NotRouted)


async def test_a_generation_is_deleted_only_when_no_job_waits_in_it_either(queue: Queue) -> None:
    await queue.declare("b", 1, None)
    assert await publish_job(queue, text("old")) is None
    await queue.unbind("b", 1)
    assert isinstance(await publish_job(queue, text("new")), NotRouted)
    assert not await queue.delete("b", 1, only_if_empty=True)
    assert (await queue.depth("b", 1), await queue.count_shards("b", 1)) == (1, 1)
    jobs = Hands()
    consumption = await queue.consume("b", 1, 10, jobs, jobs=True)
    await jobs.hold(1)
    jobs.ack_all()
    await consumption.cancel()
    await until(lambda: queue.delete("b", 1, only_if_empty=True))
    assert (await queue.depth("b", 1), await queue.count_jobs("b", 1), await queue.count_shards("b", 1)) == (None, None, 0)


async def test_a_dead_job_goes_back_to_the_jobs(queue: Queue) -> None:
    hands = Hands()
    await queue.declare("b", 1, None)
    consumption = await queue.consume("b", 1, 10, hands, jobs=True)
    sent = Envelope("an id", b"body", "text/x", Header(origin="handle", deadline=1, job=JobHead(created_ms=7, tries=5, not_before_ms=6)))
    assert await publish_job(queue, sent) is None
    await hands.hold(1)
    fate = asyncio.get_running_loop().create_future()
    queue.dead_letter("b", hands.held[0], DEATH, fate.set_result)
    assert await fate is None
    hands.ack_all()
    await consumption.cancel()
    async with queue.dead_letters("b") as letters:
        async for letter in letters:
            again = asyncio.get_running_loop().create_future()
            queue.republish(letter.renewed(deadline_ms=77), again.set_result)
            assert await again is None
            await letters.remove(letter)
    assert await queue.count_jobs("b", 1) == 1
    await queue.consume("b", 1, 10, hands, jobs=True)
    await hands.hold(1)
    renewed = Header(origin="handle", job=JobHead(created_ms=7), again=True)
    assert hands.held[0].envelope() == replace(sent, header=renewed, persistent=True), "it may begin at any time, and has all its tries"


async def test_what_has_expired_takes_nobodys_place(queue: Queue) -> None:
    await queue.declare("b", 1, max_length=1)
    await accepted(queue, text("soon late", expiration_ms=50))
    await until(lambda: _is_taken(queue, text("next")))


async def _is_taken(queue: Queue, envelope: Envelope) -> bool:
    return await publish(queue, envelope) is None
