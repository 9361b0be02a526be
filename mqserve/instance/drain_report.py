"""Reports what still drains, for a command that waits for the end of an instance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ..broker.errors import MQServeError
from ..connections import Connections
from ..controller.state.beats import ReplicaBeat, living, read_beats
from ..controller.state.documents import Observed
from ..controller.state.reading import read_observed

TELL_EVERY_S = 1.0

Tell = Callable[[str], None]


@asynccontextmanager
async def reporting(connections: Connections, tell: Tell | None) -> AsyncIterator[None]:
    """Calls `tell` with a line about what still drains inside the block, whenever that has changed, at most once a second."""
    if tell is None:
        yield
        return
    task = asyncio.create_task(_report_forever(connections, tell), name="report what drains")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _report_forever(connections: Connections, tell: Tell) -> None:
    last = ""
    await asyncio.sleep(TELL_EVERY_S)  # most instances end before that
    while True:
        try:
            line = await _line(connections)
        except MQServeError as error:
            line = f"cannot see what still drains: {error}"
        if line not in ("", last):
            tell(line)
            last = line
        await asyncio.sleep(TELL_EVERY_S)


async def _line(connections: Connections) -> str:
    """Returns the line; empty if nothing is left."""
    observed = read_observed(await connections.store.get(connections.keys.observed))
    beats = read_beats(await connections.store.fields(connections.keys.beats))
    replicas = [beat for beat in living(beats, ReplicaBeat, connections.store.now_ms()).values() if not beat.external]
    backends = {*observed.queues, *observed.retiring, *(beat.backend for beat in replicas)}
    if not backends:
        return ""
    waiting = await _waiting(connections, observed)
    running = sum(beat.running for beat in replicas)
    parts = (_count(len(backends), "backend"), f"{waiting} waiting", f"{running} running", _count(len(replicas), "replica"))
    return f"still draining: {', '.join(parts)}"


async def _waiting(connections: Connections, observed: Observed) -> str:
    try:
        depths = [
            await connections.queue.depth(name, generation, observed.shards_of(name, generation))
            for name, kept in observed.queues.items()
            for generation in kept
        ]
    except MQServeError:  # RabbitMQ is away, or this user lacks the right
        return "?"
    return str(sum(depth or 0 for depth in depths))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
