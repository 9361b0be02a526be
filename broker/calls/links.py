"""The sessions of one process: each has a link, which sends what there is credit for, and puts what it hears in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from ..results import InboxEntry
from ..sessions import Accept, Close, CloseCode, Over, Part, Taken, Word, entry_of, parts_of, read_word
from ..store import Store
from ..streams import CREDIT_EVERY_S, IDLE_TIMEOUT_S, WINDOW_BYTES, WINDOW_FRAMES

SILENT_AFTER_S = 15.0  # a side that has not been heard for this long is dead, since credit is repeated every CREDIT_EVERY_S

_BROKEN = "a message between proxy and replica was lost: connect again"
_SILENT = "the other side of the session is not there any more: connect again"
_SLOW = "the other side took nothing for a minute after the close"


class Link:
    """One side of a session. `peer` is the list that takes what it sends. `told` is called, on the loop of the entries, when there is
    something to take or room to send, and `confirmed` once, with the first word of the other side; until then `greeting` is repeated.

    Sending and taking may be done in another thread, one at a time: what they count, only they write.
    """

    def __init__(self, id: str, peer: str, links: Links, told: Callable[[], None], *, greeting: Accept | None = None) -> None:
        self.id = id
        self.peer = peer
        self._links = links
        self._told = told
        self._greeting = greeting
        self.confirmed: Callable[[], None] = _nothing
        self.heard_at = time.monotonic()
        self.end: Close | None = None  # how it has ended; `take` returns this behind the messages that are there
        self.closing_since = 0.0  # monotonic, once our own close waits for credit; 0.0 before
        self._offered: deque[Part | Close] = deque()
        self._made = self._made_bytes = 0  # of what was offered
        self._sent = 0
        self._under_way: deque[int] = deque()  # the sizes of the parts that were sent, and not taken yet
        self._under_way_bytes = 0
        self._gone = self._gone_bytes = 0  # of what the other side has taken
        self._heard = self._heard_bytes = 0
        self._messages: deque[tuple[str | bytes, int, int]] = deque()  # each with the number of its last part, and the size of all up to it
        self._parts: list[bytes] = []  # of a message that goes on
        self._popped = self._popped_bytes = 0  # up to the last message that was taken
        self._credited = self._credited_bytes = 0  # what the other side was told

    def __repr__(self) -> str:
        return f"<Link {self.id}, {self._sent} sent, {self._heard} heard, {self.end}>"

    # For the app, or for the proxy's session: what it sends and takes.

    def offer(self, message: str | bytes) -> None:
        """Offers a message, however large. Wait for room before the next one."""
        for part in parts_of(message):
            self._offered.append(part)
            self._made += 1
            self._made_bytes += len(part.data)

    def offer_close(self, close: Close) -> None:
        """Nothing may be offered behind it."""
        self._offered.append(close)

    @property
    def has_room(self) -> bool:
        return self._made - self._gone < WINDOW_FRAMES and self._made_bytes - self._gone_bytes < WINDOW_BYTES

    def take(self) -> str | bytes | Close | None:
        """Returns the next message, or how the session has ended, or None while there is neither."""
        end = self.end  # first: messages that come before it may come now
        try:
            message, self._popped, self._popped_bytes = self._messages.popleft()
        except IndexError:
            return end
        return message

    @property
    def owes_credit(self) -> bool:
        """Whether so much was taken that the other side has to be told."""
        return self._is_much(self._popped, self._popped_bytes)

    def _is_much(self, seq: int, size: int) -> bool:
        return seq - self._credited >= WINDOW_FRAMES // 2 or size - self._credited_bytes >= WINDOW_BYTES // 2

    # On the loop of the entries.

    def greet(self) -> None:
        if self._greeting is not None:
            self._post(0, self._greeting)

    def flush(self) -> None:
        """Sends what there is credit for. One part is always allowed."""
        while self._offered and self in self._links:
            word = self._offered[0]
            size = len(word.data) if isinstance(word, Part) else 0
            if len(self._under_way) >= WINDOW_FRAMES or (self._under_way and self._under_way_bytes + size > WINDOW_BYTES):
                if not self.closing_since and isinstance(self._offered[-1], Close):
                    self.closing_since = time.monotonic()
                return
            self._offered.popleft()
            self._sent += 1
            self._under_way.append(size)
            self._under_way_bytes += size
            if isinstance(word, Close):
                self._finish(word)
            self._post(self._sent, word)

    def credit(self) -> None:
        """Tells the other side what was taken. Parts of a message that is not complete count as taken."""
        self._credited, self._credited_bytes = self._taken
        self._post(0, Taken(self._credited, self._sent, self._links.own))

    def credit_soon(self) -> None:
        """Does so at the end of this turn of the loop, if enough was taken."""
        if self._is_much(*self._taken):
            self._links.credit_soon(self)

    @property
    def _taken(self) -> tuple[int, int]:
        return (self._popped, self._popped_bytes) if self._messages else (self._heard, self._heard_bytes)

    def hear(self, seq: int, word: Word) -> None:
        self.heard_at = time.monotonic()
        if self._greeting is not None:
            self._greeting = None
            self.confirmed()
        match word:
            case Taken():
                self._hear_credit(word)
            case Part() | Close():
                self._hear_next(seq, word)
            case Over():
                self._finish(Close(self._links.lost_code if word.code == CloseCode.RESTART else word.code, word.reason))
            case Accept():
                self.credit()  # the first one was lost

    def _hear_credit(self, credit: Taken) -> None:
        if credit.sent > self._heard:
            return self.lose(self._links.lost_code, _BROKEN)
        while self._under_way and self._gone < credit.seq:
            size = self._under_way.popleft()
            self._under_way_bytes -= size
            self._gone_bytes += size
            self._gone += 1
        self.flush()
        if self.has_room:
            self._told()

    def _hear_next(self, seq: int, word: Part | Close) -> None:
        if seq != self._heard + 1:
            return self.lose(self._links.lost_code, _BROKEN)
        self._heard = seq
        if isinstance(word, Close):
            return self._finish(word)
        self._heard_bytes += len(word.data)
        if word.more:
            self._parts.append(word.data)
            return self.credit_soon()
        data = word.data
        if self._parts:
            data = b"".join([*self._parts, data])
            self._parts.clear()
        self._messages.append((data.decode(errors="replace") if word.text else data, seq, self._heard_bytes))
        self._told()

    def lose(self, code: int, reason: str = "", *, tell: bool = True) -> None:
        """Ends the session here and, unless that has died, at the other side, whatever is under way."""
        if self.end is not None:
            return
        self._finish(Close(code, reason))
        if tell:
            self._post(0, Over(CloseCode.RESTART if code == CloseCode.ABNORMAL else code, reason))

    def check(self, now: float) -> None:
        """Repeats the credit, which is the sign of life, or ends a session whose other side has died."""
        if now - self.heard_at > SILENT_AFTER_S:
            self.lose(self._links.lost_code, _SILENT)
        elif self.closing_since and now - self.closing_since > IDLE_TIMEOUT_S:
            self.lose(self._links.lost_code, _SLOW)
        elif self._greeting is not None:
            self.greet()
        else:
            self.credit()

    def _finish(self, end: Close) -> None:
        if self.end is None:
            self.end = end
            self._offered.clear()
            self._links.drop(self)
            self._told()
            self._told = self.confirmed = _nothing  # they refer to the owner of the link: break the cycle

    def _post(self, seq: int, word: Word) -> None:
        self._links.post(self.peer, entry_of(self.id, seq, word))


class Links:
    """The links of one process, on the loop that reads its list, `own`. One timer for all repeats their credit.

    `peers` is what the names of the other sides' lists begin with. `lost_code` is what a session ends with here if its other side has died.
    """

    def __init__(self, store: Store, own: str, peers: str, lost_code: CloseCode) -> None:
        self.own = own
        self.peers = peers
        self.lost_code = lost_code
        self.post = store.post
        self._links: dict[str, Link] = {}
        self._due: dict[Link, None] = {}  # those whose credit goes out at the end of this turn
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Links of {self.own}, {len(self)} sessions>"

    def __len__(self) -> int:
        return len(self._links)

    def __contains__(self, link: Link) -> bool:
        return self._links.get(link.id) is link

    def __iter__(self) -> Iterator[Link]:
        return iter(tuple(self._links.values()))

    def add(self, link: Link) -> None:
        self._links[link.id] = link
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CREDIT_EVERY_S, self._beat)

    def drop(self, link: Link) -> None:
        if link in self:
            del self._links[link.id]
            self._due.pop(link, None)
        if not self._links and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hear(self, entry: InboxEntry) -> None:
        """Passes on an entry. A peer that goes on with a session which is not here is told that it is over."""
        word = read_word(entry)
        if word is None:
            return
        if (link := self._links.get(entry.id)) is not None:
            return link.hear(entry.seq, word)
        sender = word.sender if isinstance(word, Taken) else word.feed if isinstance(word, Accept) else ""
        if sender.startswith(self.peers):
            self.post(sender, entry_of(entry.id, 0, Over(CloseCode.RESTART, _SILENT)))

    def credit_soon(self, link: Link) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._credit_the_due)
        self._due[link] = None

    def lose_all(self, code: int, reason: str) -> None:
        for link in self:
            link.lose(code, reason)

    def peer_died(self, peer: str, reason: str) -> None:
        for link in self:
            if link.peer == peer:
                link.lose(self.lost_code, reason, tell=False)

    def _credit_the_due(self) -> None:
        due, self._due = self._due, {}
        for link in due:
            if link in self:
                link.credit()

    def _beat(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(CREDIT_EVERY_S, self._beat)
        now = time.monotonic()
        for link in self:
            link.check(now)


def _nothing() -> None:
    """Nobody is told."""
