"""A session's two links: every message once and in order, as much as there is credit for; and an end wherever one was lost."""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from mqserve.broker.calls.links import SILENT_AFTER_S, Link, Links
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import read_entry
from mqserve.broker.sessions import Accept, Close, CloseCode, Over, Part, Taken, Word, entry_of, parts_of, read_word
from mqserve.broker.streams import FRAME_BYTES, IDLE_TIMEOUT_S, WINDOW_BYTES, WINDOW_FRAMES

pytestmark = pytest.mark.anyio

ID = "a" * 32 + ".1"


class Post(EmbeddedStore):
    """A store whose lists are read when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.lists: dict[str, deque[bytes]] = {"proxy": deque(), "replica": deque()}

    def post(self, key: str, entry: bytes) -> None:
        self.lists[key].append(entry)


class Pair:
    """The links of a proxy and of a replica, with one session."""

    def __init__(self) -> None:
        self.store = Post()
        self.told: list[str] = []
        self.proxies = Links(self.store, "proxy", "replica", CloseCode.RESTART)
        self.replicas = Links(self.store, "replica", "proxy", CloseCode.ABNORMAL)
        self.proxy = Link(ID, "replica", self.proxies, lambda: self.told.append("proxy"))
        self.replica = Link(ID, "proxy", self.replicas, lambda: self.told.append("replica"), greeting=Accept("replica"))
        self.proxies.add(self.proxy)
        self.replicas.add(self.replica)

    def deliver(self, *, all_of: int = 1000, keep: Callable[[], bool] = lambda: True) -> None:
        """Lets both sides read, each what is there, until nothing is left; entries that `keep` refuses are lost."""
        for _ in range(all_of):
            if not any(self.store.lists.values()):
                return
            for key, links in (("proxy", self.proxies), ("replica", self.replicas)):
                entries, self.store.lists[key] = self.store.lists[key], deque()
                for raw in entries:
                    entry = read_entry(raw)
                    assert entry is not None
                    if keep():
                        links.hear(entry)

    def words(self, key: str) -> list[Any]:
        """What is on its way to this side."""
        entries = [read_entry(raw) for raw in self.store.lists[key]]
        return [read_word(entry) for entry in entries if entry is not None]


def said(link: Link, *messages: str | bytes) -> None:
    for message in messages:
        link.offer(message)
    link.flush()


def code_of(link: Link) -> int:
    """The code with which it has ended; 0 if it has not."""
    return 0 if link.end is None else link.end.code


def all_of(link: Link) -> list[str | bytes | Close]:
    found: list[str | bytes | Close] = []
    while (one := link.take()) is not None:
        found.append(one)
        if isinstance(one, Close):
            break
    return found


def test_words_come_back_from_their_bytes_as_they_were() -> None:
    words: list[Word] = [
        Accept("feed", "chat", ((b"a", b"b"),)),
        Part(b"x", True, True),
        Taken(3, 4, "feed"),
        Close(3000, "why"),
        Over(1012),
    ]
    for word in words:
        entry = read_entry(entry_of(ID, 7, word))
        assert entry is not None and (entry.id, entry.seq, read_word(entry)) == (ID, 7, word)


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES])
def test_a_message_is_cut_into_parts_of_which_the_last_says_so(size: int) -> None:
    parts = list(parts_of(b"x" * size))
    assert b"".join(part.data for part in parts) == b"x" * size and len(parts) == max(1, -(-size // FRAME_BYTES))
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]


async def test_messages_go_both_ways_in_order() -> None:
    pair = Pair()
    messages: list[str | bytes] = ["text", b"bytes", "", b"", "ü" * FRAME_BYTES]
    said(pair.replica, *messages)
    said(pair.proxy, *reversed(messages))
    pair.deliver()
    assert all_of(pair.proxy) == messages and all_of(pair.replica) == messages[::-1]


async def test_no_more_is_under_way_than_the_window_takes() -> None:
    pair = Pair()
    said(pair.replica, *map(str, range(WINDOW_FRAMES + 10)))
    assert len(pair.words("proxy")) == WINDOW_FRAMES and not pair.replica.has_room
    pair.deliver()
    assert len(all_of(pair.proxy)) == WINDOW_FRAMES
    pair.proxy.credit()
    pair.deliver()
    assert all_of(pair.proxy) == [str(number) for number in range(WINDOW_FRAMES, WINDOW_FRAMES + 10)] and pair.replica.has_room


async def test_a_message_larger_than_the_window_arrives_whole() -> None:
    pair = Pair()
    large = random.Random(1).randbytes(5 * WINDOW_BYTES)
    said(pair.replica, large, b"after")
    heard: list[str | bytes | Close] = []
    while b"after" not in heard:
        pair.deliver()
        await asyncio.sleep(0)  # credit goes out at the end of a turn
        heard += all_of(pair.proxy)
        pair.proxy.credit_soon()
    assert heard == [large, b"after"]


async def test_what_is_not_taken_gets_no_credit() -> None:
    pair = Pair()
    said(pair.replica, b"first", bytes(3 * WINDOW_BYTES))
    for _ in range(20):
        pair.deliver()
        await asyncio.sleep(0)
    assert not pair.replica.has_room  # the first one was not taken


async def test_a_lost_message_ends_both_sides() -> None:
    pair = Pair()
    said(pair.replica, "one", "two")
    pair.store.lists["proxy"].popleft()
    pair.deliver()
    assert code_of(pair.proxy) == CloseCode.RESTART
    assert code_of(pair.replica) == CloseCode.ABNORMAL
    assert not len(pair.proxies) and not len(pair.replicas) and set(pair.told) == {"proxy", "replica"}


async def test_the_loss_of_a_last_message_shows_with_the_next_credit() -> None:
    pair = Pair()
    said(pair.replica, "lost")
    pair.store.lists["proxy"].clear()
    pair.replica.credit()
    pair.deliver()
    assert code_of(pair.proxy) == CloseCode.RESTART and code_of(pair.replica) == CloseCode.ABNORMAL


async def test_a_number_that_comes_twice_ends_the_session() -> None:
    pair = Pair()
    said(pair.replica, "one")
    pair.store.lists["proxy"] *= 2
    pair.deliver()
    assert all_of(pair.proxy)[0] == "one" and code_of(pair.proxy) == CloseCode.RESTART


async def test_any_loss_at_all_ends_a_session_and_never_changes_what_is_heard() -> None:
    for seed in range(200):
        chance, pair = random.Random(seed), Pair()
        sent: list[str] = []
        heard: list[str | bytes | Close] = []
        for number in range(60):
            if pair.replica.end is None and pair.replica.has_room:
                sent.append(str(number))
                said(pair.replica, sent[-1])
            pair.deliver(all_of=1, keep=lambda chance=chance: chance.random() > 0.02)  # type: ignore[misc]
            heard += [one for one in all_of(pair.proxy) if not isinstance(one, Close)]
            if chance.random() < 0.2:
                pair.proxy.credit()
                pair.replica.credit()
        assert heard == sent[: len(heard)]
        assert len(heard) >= len(sent) - 1 or pair.proxy.end is not None or pair.store.lists["proxy"]


async def test_a_close_comes_behind_all_messages() -> None:
    pair = Pair()
    said(pair.replica, *map(str, range(2 * WINDOW_FRAMES)))
    pair.replica.offer_close(Close(3001, "done"))
    pair.replica.flush()
    assert not code_of(pair.replica) and pair.replica.closing_since
    heard: list[str | bytes | Close] = []
    while Close(3001, "done") not in heard:
        pair.deliver()
        heard += all_of(pair.proxy)
        pair.proxy.credit()
    assert heard[:-1] == [str(number) for number in range(2 * WINDOW_FRAMES)]
    assert not len(pair.proxies) and not len(pair.replicas)


async def test_the_acceptance_is_repeated_until_there_is_an_answer() -> None:
    pair = Pair()
    confirmed: list[int] = []
    pair.replica.confirmed = lambda: confirmed.append(1)
    pair.replica.greet()
    pair.store.lists["proxy"].clear()  # lost
    pair.replica.check(pair.replica.heard_at + 5)
    assert [type(word) for word in pair.words("proxy")] == [Accept] and not confirmed
    pair.deliver()
    pair.replica.check(pair.replica.heard_at + 5)
    assert confirmed == [1] and [type(word) for word in pair.words("proxy")] == [Taken]


async def test_a_close_waits_for_the_answer_to_the_acceptance() -> None:
    pair = Pair()
    settled: list[int] = []
    pair.replica.confirmed = lambda: settled.append(1)
    pair.replica.greet()
    pair.replica.offer_close(Close(3001, "done"))
    pair.replica.flush()
    pair.store.lists["proxy"].clear()  # lost
    assert pair.replica.end is None and not settled
    pair.replica.check(pair.replica.heard_at + 5)
    pair.deliver()
    assert settled == [1] and all_of(pair.proxy) == [Close(3001, "done")] and pair.replica.end == Close(3001, "done")


async def test_sessions_that_break_off_are_logged_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        pair = Pair()
        later = Link(f"{ID}2", "replica", pair.proxies, lambda: None)
        pair.proxies.add(later)
        for link in (pair.proxy, later):
            link.check(link.heard_at + SILENT_AFTER_S + 1)
    assert [record.message for record in caplog.records] == [
        "WebSocket sessions of proxy break off: the other side of the session is not there any more: connect again"
    ] * 3


async def test_who_is_not_heard_is_dead() -> None:
    pair = Pair()
    pair.proxy.check(pair.proxy.heard_at + SILENT_AFTER_S - 1)
    assert not code_of(pair.proxy)
    pair.proxy.check(pair.proxy.heard_at + SILENT_AFTER_S + 1)
    assert code_of(pair.proxy) == CloseCode.RESTART
    pair.replica.check(pair.replica.heard_at + SILENT_AFTER_S + 1)
    assert code_of(pair.replica) == CloseCode.ABNORMAL


async def test_a_close_whose_messages_nobody_takes_does_not_wait_for_ever() -> None:
    pair = Pair()
    said(pair.replica, *map(str, range(2 * WINDOW_FRAMES)))
    pair.replica.offer_close(Close())
    pair.replica.flush()
    pair.replica.heard_at = pair.replica.closing_since + IDLE_TIMEOUT_S
    pair.replica.check(pair.replica.closing_since + IDLE_TIMEOUT_S + 1)
    assert code_of(pair.replica) and not len(pair.replicas)


async def test_who_goes_on_with_a_session_that_is_not_there_is_told() -> None:
    pair = Pair()
    pair.proxies.drop(pair.proxy)
    pair.replica.credit()
    pair.deliver()
    assert code_of(pair.replica) == CloseCode.ABNORMAL


async def test_only_lists_of_ours_are_told_so() -> None:
    pair = Pair()
    pair.proxies.drop(pair.proxy)
    entry = read_entry(entry_of(ID, 0, Taken(0, 0, "another list")))
    assert entry is not None
    pair.proxies.hear(entry)
    assert "another list" not in pair.store.lists and not any(pair.store.lists.values())


async def test_the_sessions_of_a_dead_process_end_without_a_word_to_it() -> None:
    pair = Pair()
    pair.replicas.peer_died("another proxy", "died")
    assert not code_of(pair.replica)
    pair.replicas.peer_died("proxy", "died")
    assert pair.replica.end == Close(CloseCode.ABNORMAL, "died") and not pair.store.lists["proxy"]
