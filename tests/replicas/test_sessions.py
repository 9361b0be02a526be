"""The sessions of a replica on its I/O loop, as their links and jobs see it."""

import asyncio
from typing import Any

import pytest

from mqserve.broker.envelope import Envelope
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import Result
from mqserve.broker.sessions import Accept
from mqserve.broker.store_keys import StoreKeys
from mqserve.replicas.feed import Feed
from mqserve.replicas.hand_over import HandOver
from mqserve.replicas.sessions import Sessions
from mqserve.replicas.stages import Job, Stage

pytestmark = pytest.mark.anyio


class Talk:
    """An app's side of one session."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.link: Any = None
        self.is_begun = False


class Apps:
    """Stands for the worker's side: its apps accept when the test says so."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.touched: HandOver[Any] = HandOver(loop)
        self.told: HandOver[Any] = HandOver(loop)
        self.new_link: Any = None

    def __len__(self) -> int:
        return 0

    def accept(self, job: Job) -> None:
        talk = Talk(job)
        talk.link = self.new_link(talk, Accept(""))
        self.touched.touch(talk)


class Replica:
    def __init__(self) -> None:
        self.store, self.apps, self.settled = EmbeddedStore(), Apps(), list[Job]()
        keys = StoreKeys("tests")
        self.feed = Feed(self.store, keys.feed("b#1"))
        sockets: Any = self.apps
        self.sessions = Sessions(self.store, keys, self.feed, sockets, self._settle)

    def _settle(self, job: Job, result: Result) -> None:
        job.move(Stage.SETTLED)
        self.settled.append(job)


def running() -> Job:
    nothing: Any = None
    job = Job(Envelope("a" * 32, b"", ""), 1, nothing)
    job.move(Stage.ADMITTED)
    job.started = 1.0
    return job


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_session_that_ends_before_its_proxy_has_a_word_settles_its_handshake() -> None:
    replica, job = Replica(), running()
    replica.apps.accept(job)
    await turns()
    assert len(replica.sessions) == 1 and not replica.settled
    await replica.sessions.close(0)
    assert replica.settled == [job]
    replica.feed.close()


async def test_a_handshake_that_is_accepted_after_the_end_is_left_for_another_replica() -> None:
    replica, job = Replica(), running()
    await replica.sessions.close(0)
    replica.feed.close()
    replica.apps.accept(job)
    await turns()
    assert not replica.settled and job.with_worker  # the drain gives it back
    assert not len(replica.sessions) and "not read" in repr(replica.feed)
