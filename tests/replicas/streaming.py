"""A replica with a worker of its own on an embedded queue and store, and a reader of its streams."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from mqserve.broker.envelope import Envelope, Header, RequestHead, mint_id
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.process.tasks import Tasks
from mqserve.broker.results import CHUNK_KIND, Result, read_entry
from mqserve.broker.settings import Settings
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.streams import Credit, Frame, Head
from mqserve.broker.values.codecs import decode_plain
from mqserve.broker.values.signing import Signer
from mqserve.controller.state.documents import Backend
from mqserve.replicas.context import ReplicaContext
from mqserve.replicas.execute import Execution
from mqserve.replicas.handler import make_handler
from mqserve.replicas.metrics import ReplicaMetrics
from mqserve.replicas.outgoing import Outgoing
from mqserve.replicas.request_loop import RequestLoop
from mqserve.replicas.stages import Job
from mqserve.replicas.worker import Worker
from tests.broker.traffic import publish, until

KEYS = StoreKeys("tests")
EVENTS = RequestHead(headers=((b"accept", b"text/event-stream"),), endpoint="e")


class Serving:
    """Serves `target` as backend `b`. Use as a context manager on a running loop."""

    def __init__(self, target: Any, queue: EmbeddedQueue, store: Store, *, replica_id: str = "b#1", **config: Any) -> None:
        self.queue, self.store = queue, store
        self._target, self._replica_id = target, replica_id
        self._backend = Backend("b", "", "b", config)
        self._tasks = Tasks()
        self.loop: RequestLoop
        self.worker: Worker

    async def __aenter__(self) -> "Serving":
        await self.queue.declare("b", 1, None)
        context = ReplicaContext("b", self._replica_id)
        self.worker = Worker(context, self._backend.config, lambda job, result: self.loop.on_done(job, result), self._before_suspects)
        handler = await self.worker.call(lambda: make_handler(self._target, []), constructs=True)
        self.worker.serve(Execution("b", handler, Signer([b"k" * 32], "tests")))
        self.loop = RequestLoop(
            Settings.read({}, namespace="tests"), self._backend, self.queue, self.store, self.worker, handler,
            ReplicaMetrics("b", self._replica_id), self._replica_id,
        )  # fmt: skip
        self.loop.want({1: 1})
        for work in (self.loop.keep_taking_forever(lambda: None), self.loop.listen(), self.loop.tune_forever()):
            self._tasks.start(work)
        await until(lambda: self.loop.generations == (1,))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tasks.cancel()
        self.worker.stop()
        await self.loop.abandon()

    async def _before_suspects(self, jobs: Sequence[Job]) -> None:
        await self.loop.before_suspects(jobs)

    async def is_settled(self) -> bool:
        """Whether nothing waits in the queue, and nothing is held."""
        return not await self.queue.depth("b", 1) and not self.loop.running

    @property
    def flows(self) -> list[Outgoing]:
        return [job.flow for job in self.loop._flows if job.flow is not None]


class Reader:
    """Asks backend `b`, and reads the answer. It gives credit for what it reads while `reads` is true."""

    def __init__(self, queue: EmbeddedQueue, store: Store, inbox: str = "reader") -> None:
        self.queue, self.store = queue, store
        self.inbox = KEYS.inbox(inbox)
        self.id = mint_id()
        self.head: Head | None = None
        self.frames: dict[int, Frame] = {}
        self.result: Result | None = None
        self.reads = True
        self._tasks = Tasks()
        self._tasks.start(store.read_inbox(self.inbox, self._on_notes, lambda: None))

    async def ask(self, body: bytes = b"", content_type: str = "text/plain", timeout_s: float = 60, **header: Any) -> "Reader":
        header = {"origin": "http", "inbox": self.inbox, "deadline": self.store.now_ms() + int(timeout_s * 1000), **header}
        self.envelope = Envelope(self.id, body, content_type, Header(**header), expiration_ms=int(timeout_s * 1000))
        assert await publish(self.queue, self.envelope) is None
        return self

    def _on_notes(self, notes: list[bytes]) -> None:
        for raw in notes:
            entry = read_entry(raw)
            if entry is None or entry.id != self.id:
                continue
            if entry.kind == CHUNK_KIND:
                frame = Frame.from_bytes(entry.payload)
                self.frames[entry.seq] = frame
                self.head = frame.head or self.head
            else:
                self.result = Result.from_bytes(entry.payload)
        if self.reads:
            asyncio.get_running_loop().call_soon(self.credit)

    def credit(self, seq: int = 0, *, left: bool = False) -> None:
        if self.head is not None:
            credit = Credit(1, self.id, self.inbox, seq or len(self.frames), self.size, left)
            self.store.post(KEYS.feed(self.head.replica), credit.to_bytes())

    @property
    def size(self) -> int:
        return sum(len(frame.data) for frame in self.frames.values())

    @property
    def body(self) -> bytes:
        return b"".join(self.frames[seq].data for seq in sorted(self.frames))

    @property
    def values(self) -> list[Any]:
        return [decode_plain(frame.data, frame.content_type) for _, frame in sorted(self.frames.items())]

    async def end(self) -> Result:
        await until(lambda: self.result is not None)
        assert self.result is not None
        return self.result

    def close(self) -> None:
        self._tasks.cancel()


async def within(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition holds before the time is over."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        await asyncio.sleep(0.005)
    return False
