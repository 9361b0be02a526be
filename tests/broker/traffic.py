"""What the tests of queues do all day: publish and learn the fate, hold deliveries, wait for a condition."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from mqserve.broker.envelope import Envelope
from mqserve.broker.errors import BrokerUnavailable, MQServeError
from mqserve.broker.queue import Delivery, Queue

BUDGET_S = 15.0


async def until(holds: Callable[[], object | Awaitable[object]], budget_s: float = BUDGET_S) -> None:
    """Returns once `holds` does; fails with TimeoutError when it never does."""
    async with asyncio.timeout(budget_s):
        while True:
            seen = holds()
            if await seen if isinstance(seen, Awaitable) else seen:
                return
            await asyncio.sleep(0.005)


async def depth_is(queue: Queue, wanted: int | None, backend: str = "b", generation: int = 1) -> None:
    """Waits until the broker holds so many ready messages."""

    async def holds() -> bool:
        return await queue.depth(backend, generation) == wanted

    await until(holds)


def text(body: str, **fields: object) -> Envelope:
    return Envelope(id=f"id of {body}", body=body.encode(), content_type="text/plain", **fields)  # type: ignore[arg-type]


def publish(queue: Queue, envelope: Envelope, backend: str = "b") -> asyncio.Future[MQServeError | None]:
    """The message's fate: None once it is accepted. Told twice, it fails the test."""
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.publish(backend, envelope, fate.set_result)
    return fate


def publish_job(queue: Queue, envelope: Envelope, backend: str = "b") -> asyncio.Future[MQServeError | None]:
    """The same for a job."""
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.publish_job(backend, envelope, fate.set_result)
    return fate


async def accepted(queue: Queue, *envelopes: Envelope, backend: str = "b") -> None:
    """Publishes in order, and waits until all are accepted."""
    async with asyncio.timeout(BUDGET_S):
        fates = await asyncio.gather(*(publish(queue, envelope, backend) for envelope in envelopes))
    assert fates == [None] * len(envelopes)


async def accepted_at_last(queue: Queue, envelope: Envelope, backend: str = "b") -> None:
    """Publishes again until a broker that was away accepts."""
    async with asyncio.timeout(BUDGET_S):
        while isinstance(await publish(queue, envelope, backend), BrokerUnavailable):
            await asyncio.sleep(0.05)


class Hands:
    """Takes every delivery of a consumer and settles none by itself."""

    def __init__(self) -> None:
        self.held: list[Delivery] = []

    def __repr__(self) -> str:
        return f"<Hands {self.bodies}>"

    def __call__(self, delivery: Delivery) -> None:
        self.held.append(delivery)

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Delivery]:
        return iter(self.held)

    @property
    def bodies(self) -> list[str]:
        return [delivery.envelope().body.decode() for delivery in self.held]

    async def hold(self, count: int) -> None:
        await until(lambda: len(self) >= count)
        assert len(self) == count, f"{count} were expected: {self}"

    def ack_all(self) -> None:
        while self.held:
            self.held.pop(0).ack()


class AckingHands(Hands):
    """Acks every delivery at once, and remembers its body."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __call__(self, delivery: Delivery) -> None:
        self.seen.append(delivery.envelope().body.decode())
        delivery.ack()
