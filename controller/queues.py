"""The queues of the backends: declares the current generation, drains older ones, and deletes them once no replica holds their messages."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from ..broker.errors import BrokerUnavailable, MQServeError, QueueMismatch, StoreUnavailable
from ..broker.queue import Queue
from . import lease
from .job_ends import Leftovers
from .restarts import Restarts
from .state.beats import Beat, MemberState, NodeBeat, ReplicaBeat, living
from .state.documents import Backend, Desired, Observed

logger = logging.getLogger(__name__)
T = TypeVar("T")
Generations = dict[str, list[int]]  # by backend

DECLARE_AGAIN_S = 15.0  # a broker may come back empty
LOOKED_FOR = 3  # generations around the current one that are looked for: the last leader, or an earlier instance, may have made them
REFUSAL_S = 1.0  # time that replicas get to refuse what waits in a queue that is deleted
REPORTED_REFUSALS = 3  # in a row: queues that an earlier instance left behind cost one or two, which is no problem to report


class WhileLeading(Protocol):
    """Runs an operation that the broker cannot fence, for as long as its leader leads. Raises NotLeading."""

    async def __call__(self, act: Callable[[], Awaitable[T]]) -> T: ...


class Shards:
    """How many queues each generation has, where that is not 1."""

    def __init__(self, observed: Observed) -> None:
        self._counts = {name: dict(counts) for name, counts in observed.shards.items()}

    def __repr__(self) -> str:
        return f"<Shards {self._counts}>"

    def of(self, name: str, generation: int) -> int:
        return self._counts.get(name, {}).get(generation, 1)

    def note(self, name: str, generation: int, count: int) -> None:
        self._counts.setdefault(name, {})[generation] = count

    def of_all(self, *kept: Mapping[str, Sequence[int]]) -> dict[str, dict[int, int]]:
        """Returns the counts of these generations, for the observed document."""
        generations = {(name, generation) for place in kept for name, here in place.items() for generation in here}
        found = {
            name: {generation: count for generation, count in counts.items() if count != 1 and (name, generation) in generations}
            for name, counts in self._counts.items()
        }
        return {name: counts for name, counts in found.items() if counts}


class Queues:
    """A leader's memory of the queues between comparisons. `next_generation(name, generation)` increments the generation in the desired
    document if the current queue cannot be declared."""

    def __init__(
        self,
        queue: Queue,
        while_leading: WhileLeading,
        next_generation: Callable[[str, int], Awaitable[None]],
        leftovers: Leftovers | None = None,
    ) -> None:
        self._queue = queue
        self._leftovers = leftovers  # None where nobody can tell whose messages count
        self._while_leading = while_leading
        self._next_generation = next_generation
        self._declared: dict[tuple[str, int, int | None, int], float] = {}  # monotonic time of the declaration
        self._unbound: set[tuple[str, int]] = set()
        self._forced_since: dict[str, float] = {}  # backend that was deleted by force -> monotonic time of the deletion
        self._refusals: dict[str, Restarts] = defaultdict(Restarts)  # refused declarations, by backend
        self._left_behind: dict[str, set[int]] = {}  # backend -> generations, until the observed document has them or they are gone

    def __repr__(self) -> str:
        return f"<Queues, {len(self._declared)} declared>"

    async def keep(self, desired: Desired, observed: Observed, beats: Mapping[str, Beat], now_ms: int) -> Observed:
        """Declares current generations, moves old ones from `queues` to `retiring` once they are empty, and deletes those; at the end of an
        instance that keeps its queues only those that are empty."""
        queues = {name: list(generations) for name, generations in observed.queues.items()}
        retiring = {name: list(generations) for name, generations in observed.retiring.items()}
        shards = Shards(observed)
        self._find_left_behind(desired, observed)
        for name, backend in () if desired.closing else desired.backends.items():
            is_new = backend.generation not in queues.get(name, ())
            if await self._try_to_declare(name, backend, is_new=is_new):
                shards.note(name, backend.generation, backend.shards)
                if backend.generation in retiring.get(name, []):  # the backend was deleted and created again
                    retiring[name].remove(backend.generation)
                older = [*queues.get(name, ()), *await self._look_for_left_behind(name, shards)]
                queues[name] = [*(kept for kept in dict.fromkeys(older) if kept != backend.generation), backend.generation]
        for name in list(queues):
            current = desired.backends[name].generation if name in desired.backends and not desired.closing else 0
            for generation in [kept for kept in queues[name] if kept != current]:
                is_drained = await self._is_drained(name, generation, shards.of(name, generation), beats, now_ms)
                if is_drained or self._is_forced(name, desired):
                    queues[name].remove(generation)
                    retiring.setdefault(name, []).append(generation)
        for name in list(retiring):
            for generation in list(retiring[name]):
                if name in desired.forced or not _is_held(name, generation, beats, now_ms):
                    await self._retire(name, generation, desired, queues, retiring, shards)
        self._refusals = defaultdict(Restarts, {name: kept for name, kept in self._refusals.items() if name in desired.backends})
        refused = {name: kept.reason for name, kept in self._refusals.items() if kept.early_deaths >= REPORTED_REFUSALS}
        return msgspec.structs.replace(
            observed,
            problems=observed.problems | refused,
            queues={name: tuple(generations) for name, generations in queues.items() if generations},
            retiring={name: tuple(generations) for name, generations in retiring.items() if generations},
            shards=shards.of_all(queues, retiring),
        )

    async def _retire(
        self, name: str, generation: int, desired: Desired, queues: Generations, retiring: Generations, shards: Shards
    ) -> None:
        """Deletes a generation that nobody holds, or returns it to `queues` if messages wait in it that the backend is to run."""
        is_served_on = name in desired.backends and not desired.closing
        keep_content = is_served_on or (desired.closing and desired.keeps_queues)
        if not keep_content and not await self._end_jobs(name, generation):
            return
        delete = partial(self._queue.delete, name, generation, shards.of(name, generation))
        if await self._while_leading(partial(delete, only_if_empty=keep_content)):
            if keep_content and not is_served_on:
                await self._while_leading(partial(delete, only_if_empty=False))  # the backend, and its empty dead letters
            self._forget_declared(name, generation)
            self._unbound.discard((name, generation))
            self._left_behind.get(name, set()).discard(generation)
        elif is_served_on:  # a replica died and its messages were requeued
            left = await self._count_shards(name, generation)  # those behind one that got a message in this moment are deleted
            shards.note(name, generation, max(1, left))
            queues.setdefault(name, []).insert(0, generation)
        retiring[name].remove(generation)

    async def _end_jobs(self, name: str, generation: int) -> bool:
        """Whether no job is left that would be deleted with its queue, without an end."""
        return self._leftovers is None or await self._while_leading(partial(self._leftovers.end_some, name, generation))

    def _find_left_behind(self, desired: Desired, observed: Observed) -> None:
        """Notes generations that the document does not name: those of a leader that could not write, and those of an earlier instance,
        which may be later ones than a new backend's first."""
        self._left_behind = {
            name: self._left_behind.get(name, _generations_around(backend.generation))
            - {*observed.queues.get(name, ()), *observed.retiring.get(name, ())}
            for name, backend in desired.backends.items()
        }

    async def _look_for_left_behind(self, name: str, shards: Shards) -> list[int]:
        """Returns the generations of `_left_behind` that the broker has, and notes their queues; the others are forgotten."""
        for generation in sorted(self._left_behind[name]):
            if count := await self._count_shards(name, generation):
                shards.note(name, generation, count)
            else:
                self._left_behind[name].discard(generation)
        return sorted(self._left_behind[name])

    async def _count_shards(self, name: str, generation: int, known: int = 0) -> int:
        return await self._while_leading(partial(self._queue.count_shards, name, generation, known))

    async def _try_to_declare(self, name: str, backend: Backend, *, is_new: bool) -> bool:
        """Whether the current generation is declared. A refused declaration is retried after growing pauses, and does not keep other
        backends waiting."""
        refusals = self._refusals[name]
        if time.monotonic() < refusals.not_before:
            return False
        try:
            await self._declare(name, backend.generation, backend.config.max_queued_requests, backend.shards, is_new=is_new)
        except (BrokerUnavailable, StoreUnavailable, lease.NotLeading):
            raise
        except MQServeError as error:
            refusals.died_early(time.monotonic(), str(error))
            logger.warning("the queue of %s was refused, and is tried again: %s", name, error)
            if isinstance(error, QueueMismatch):
                # The queue is an earlier instance's, with other arguments: take a new generation, and drain the old one as usual.
                self._left_behind[name].add(backend.generation)
                await self._next_generation(name, backend.generation)
            return False
        refusals.got_ready()
        return True

    async def _declare(self, name: str, generation: int, max_length: int | None, shards: int, *, is_new: bool) -> None:
        key = (name, generation, max_length, shards)
        if time.monotonic() - self._declared.get(key, -math.inf) < DECLARE_AGAIN_S:
            return
        if is_new and await self._count_shards(name, generation, shards) > shards:
            raise QueueMismatch(f"generation {generation} of the queue of {name!r} exists with more shards")
        await self._while_leading(lambda: self._queue.declare(name, generation, max_length, shards))
        self._declared[key] = time.monotonic()
        self._unbound.discard((name, generation))

    def _forget_declared(self, name: str, generation: int) -> None:
        """Makes the queue be declared and bound again, since a backend may be created again under the same name."""
        self._declared = {known: at for known, at in self._declared.items() if known[:2] != (name, generation)}

    def _is_forced(self, name: str, desired: Desired) -> bool:
        """Whether what waits there goes, of a backend that was deleted by force. Its replicas refuse it first, if they can."""
        self._forced_since = {forced: self._forced_since.get(forced, time.monotonic()) for forced in desired.forced}
        return time.monotonic() > self._forced_since.get(name, math.inf) + REFUSAL_S

    async def _is_drained(self, name: str, generation: int, shards: int, beats: Mapping[str, Beat], now_ms: int) -> bool:
        """Whether the queues are unbound and empty. Without a ready replica they count as drained, since nobody would ever empty them."""
        if (name, generation) not in self._unbound:
            self._forget_declared(name, generation)
            await self._while_leading(lambda: self._queue.unbind(name, generation, shards))
            self._unbound.add((name, generation))
        if not await self._while_leading(lambda: self._queue.depth(name, generation, shards)):
            return True
        return not any(beat.state is MemberState.READY and beat.backend == name for beat in living(beats, ReplicaBeat, now_ms).values())


def _is_held(name: str, generation: int, beats: Mapping[str, Beat], now_ms: int) -> bool:
    """Whether a living replica holds messages of the queue. The last beat of a killed replica looks fresh for a while, so its node's
    report counts, too."""
    ended = {replica_id for node in living(beats, NodeBeat, now_ms).values() for replica_id in node.ended}
    alive = living(beats, ReplicaBeat, now_ms).values()
    return any(beat.backend == name and generation in beat.generations and beat.id not in ended for beat in alive)


def _generations_around(current: int) -> set[int]:
    later = current + 1 + LOOKED_FOR if current == 1 else current
    return {*range(max(1, current - LOOKED_FOR), later)} - {current}
