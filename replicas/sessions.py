"""The WebSocket sessions of a replica on its I/O loop: their links to the proxies, and the jobs that began them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from ..broker.calls.links import Link, Links
from ..broker.results import Result
from ..broker.sessions import Accept, CloseCode, new_session_id
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .feed import Feed
from .stages import Job
from .websockets import Conversation, Sockets

_ENDS = "the replica of this session ends: connect again"
_LAST_WORDS_S = 1.0  # for apps to end, once their clients are told that the replica ends


class Sessions:
    """A session is here from its acceptance to its end. `ack` is called with the job of one that its proxy has taken, or that ended before;
    no result is recorded."""

    def __init__(self, store: Store, keys: StoreKeys, feed: Feed, sockets: Sockets, ack: Callable[[Job, Result], None]) -> None:
        self._feed = feed
        self._sockets = sockets
        self._ack = ack
        self._is_closed = False
        self._links = Links(store, feed.key, keys.inbox(""), CloseCode.ABNORMAL)
        feed.on_session = self._links.hear
        sockets.touched.on_touched = self._on_touched
        sockets.new_link = self._new_link

    def __repr__(self) -> str:
        return f"<Sessions, {len(self._links)} open>"

    def __len__(self) -> int:
        """Sessions that are open, and apps that have not ended."""
        return max(len(self._links), len(self._sockets))

    def _new_link(self, talk: Conversation, accept: Accept) -> Link:
        """Called in the worker's thread."""
        envelope = talk.job.envelope
        greeting = replace(accept, feed=self._feed.key)
        return Link(new_session_id(envelope.id), envelope.header.inbox, self._links, partial(self._on_told, talk), greeting=greeting)

    def _on_touched(self, talk: Conversation) -> None:
        """Sends what the app has said. An app that accepts after `close` is not heard: its handshake goes to another replica."""
        if self._is_closed:
            return
        link = talk.link
        assert link is not None, "the app has accepted"
        if not talk.is_begun:
            talk.is_begun = True
            self._feed.need(self)
            return self._feed.when_read(partial(self._begin, talk, link))
        link.flush()
        if link.owes_credit:
            link.credit_soon()

    def _begin(self, talk: Conversation, link: Link) -> None:
        if self._is_closed:
            return
        if not talk.job.with_worker or talk.job.given_up is not None:
            return link.lose(CloseCode.ABNORMAL, "the handshake was given up before the app accepted it")
        link.confirmed = partial(self._settle, talk.job)
        self._feed.need(self)  # the sessions before it may have ended meanwhile
        self._links.add(link)
        link.greet()
        link.flush()

    def _on_told(self, talk: Conversation) -> None:
        if talk.link is not None and talk.link.end is not None:
            self._settle(talk.job)
            if not self._links:
                self._feed.leave(self)
        self._sockets.told.touch(talk)

    def _settle(self, job: Job) -> None:
        if job.with_worker:  # not yet
            job.run_s = time.monotonic() - job.started
            self._ack(job, Result())

    def proxies_died(self, inboxes: Sequence[str]) -> None:
        for inbox in inboxes if self._links else ():
            self._links.peer_died(inbox, "the proxy of this session has died")

    async def close(self, at_most_s: float = _LAST_WORDS_S) -> None:
        """Tells all clients to connect again, since the replica ends, and gives the apps a moment to end. No session begins
        any more."""
        self._is_closed = True
        self._links.lose_all(CloseCode.RESTART, _ENDS)
        until = time.monotonic() + at_most_s
        while len(self._sockets) and time.monotonic() < until:
            await asyncio.sleep(0.01)
