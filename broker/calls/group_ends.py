"""The jobs of a group, all of them: how many have ended, which have not, and ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import UnknownJob
from ..job_groups import GroupFacts, GroupRecord, member_id
from .job_sending import EXPIRED_AFTER_MS, JobSender

T = TypeVar("T")

_AT_ONCE = 200


async def some_at_a_time(ask: Callable[[str], Awaitable[T]], keys: Sequence[str]) -> list[T]:
    """Asks about each of the keys, not about all of them at once."""
    found: list[T] = []
    for start in range(0, len(keys), _AT_ONCE):
        found += await asyncio.gather(*map(ask, keys[start : start + _AT_ONCE]))
    return found


async def group_now(jobs: JobSender, group_id: str) -> GroupRecord | None:
    """Returns the record of a group, after it has ended those of its jobs that were not begun in time, which nobody else may notice; None
    for a group that is not known (any more). Raises StoreUnavailable."""
    record = await jobs.store.jobs.group(group_id)
    if record is None or sum(record.ended.values()) == record.facts.total:
        return record
    if not 0 < record.facts.expires_ms < jobs.store.now_ms() - EXPIRED_AFTER_MS:
        return record
    await some_at_a_time(jobs.look, await members_left(jobs, group_id, record.facts))
    return await jobs.store.jobs.group(group_id)


async def members_left(jobs: JobSender, group_id: str, facts: GroupFacts) -> list[str]:
    """Returns the ids of those that have not ended. Raises StoreUnavailable."""
    ended = await jobs.store.jobs.group_ends(group_id)
    return [member_id(group_id, number) for number in range(facts.total) if number not in ended]


async def cancel_group(jobs: JobSender, group_id: str, facts: GroupFacts, is_told: Callable[[str], bool] = lambda _: False) -> int:
    """Cancels the jobs of a group, and returns how many had no result yet. Passes over those of which nothing is known: they were never
    sent, or are forgotten. `is_told` says of which ids replicas have heard that. Raises StoreUnavailable."""

    async def cancel(job_id: str) -> bool:
        try:
            return await jobs.cancel(job_id, is_told)
        except UnknownJob:
            return False

    return sum(await some_at_a_time(cancel, [member_id(group_id, number) for number in range(facts.total)]))
