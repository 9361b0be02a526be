"""Groups: many jobs that were sent together, found again and waited for by one id."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from ..broker.envelope import mint_id
from ..broker.errors import BadType, BadValue, MQServeError
from ..broker.job_groups import GroupFacts, member_id
from ..broker.jobs import JobState
from .gathering import Gathered
from .handle import AsyncHandle, Handle
from .jobs import Job

if TYPE_CHECKING:
    from .job_calls import JobCalls

_AT_ONCE = 200  # jobs that are encoded, sent and confirmed together


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """How many of a group's jobs are in which state at one moment."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    unknown: int
    """Those of which nothing is known: they were never sent, since sending the group failed, or their records are gone."""

    @property
    def done(self) -> int:
        """How many have ended, in whatever way."""
        return self.succeeded + self.failed + self.cancelled + self.expired


class Group:
    """Many jobs under one id; `serve.submit_many` and `serve.group` return one. `jobs` has them in the order of the items."""

    def __init__(self, group_id: str, facts: GroupFacts, calls: JobCalls, *, plain: bool = False) -> None:
        self.id = group_id
        self._facts = facts
        self._calls = calls
        self._plain = plain

    def __repr__(self) -> str:
        return f"<Group {self.id} of {len(self)}>"

    def __len__(self) -> int:
        return self._facts.total

    @cached_property
    def jobs(self) -> Sequence[Job]:
        """The members, as any job: for `serve.as_completed`, say."""
        ids = [member_id(self.id, number) for number in range(len(self))]
        return [self._calls.job(job_id, job_id, plain=self._plain, expires_ms=self._facts.expires_ms) for job_id in ids]

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def status(self) -> GroupStatus:
        """Returns the counts as they are now. It asks for each job, so for a large group ask seldom. Raises StoreUnavailable."""
        calls = self._calls.here()
        states = Counter(calls.wait(calls.states([job.id for job in self.jobs])))
        return GroupStatus(len(self), **{state.value: states[state] for state in JobState}, unknown=states[None])

    def done(self) -> bool:
        """Whether all have ended. See `status`."""
        return self.status().done == len(self)

    def results(self, timeout: float | None = None, *, return_exceptions: bool = False) -> list[Any]:
        """Waits for all, and returns their values in the order of the items. Raises the first error there is, unless errors are to stand in
        the places of their values, and TimeoutError after `timeout` seconds."""
        return Gathered(self.jobs, return_exceptions=return_exceptions).result(timeout)

    def __await__(self) -> Generator[Any, None, list[Any]]:
        """The same as `results`, in a coroutine."""
        return Gathered(self.jobs, return_exceptions=False).__await__()

    def cancel(self) -> int:
        """Cancels those that have no result yet, and returns how many these were."""
        calls = self._calls.here()
        return calls.wait(calls.cancel_all([job.id for job in self.jobs]))


class _Sending:
    """A group on its way: its facts first, then its jobs, some at a time."""

    def __init__(self, handle: Handle | AsyncHandle, items: Iterable[Any]) -> None:
        if not isinstance(items, Iterable):
            raise BadType(f"submit_many() takes the items, a list or anything else to iterate over, not {items!r}")
        self.calls = handle._home.sender.jobs
        self._handle = handle
        self._items = list(items)
        self._sent = 0
        order = handle._order(None, {})
        if order.options.idempotency_key:
            raise BadValue("an idempotency_key names one job, and submit_many() sends many: take a handle without it")
        facts = self.calls.group_of(len(self._items), order)
        self.group = Group(mint_id(), facts, self.calls, plain=order.plain)

    def all_now(self) -> Group:
        self.calls.wait(self._begin())
        for part in self._parts():
            self.calls.wait(part)
        return self.group

    async def all_soon(self) -> Group:
        await self.calls.wait_soon(self._begin())
        for part in self._parts():
            await self.calls.wait_soon(part)
        return self.group

    def _begin(self) -> Coroutine[Any, Any, None]:
        return self.calls.keep_group(self.group.id, self.group._facts)

    def _parts(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yields the work that sends the next jobs, encoded by now."""
        for start in range(0, len(self._items), _AT_ONCE):
            works: list[Coroutine[Any, Any, Job]] = []
            try:
                for number in range(start, min(start + _AT_ONCE, len(self._items))):
                    order = self._handle._order(self._items[number], {})
                    works.append(self.calls.submit(replace(order, id=member_id(self.group.id, number))))
            except BaseException as error:
                for work in works:
                    work.close()
                self._tell_on(error)
                raise
            yield self._all_of(works)

    async def _all_of(self, works: Sequence[Coroutine[Any, Any, Job]]) -> None:
        outcomes = await asyncio.gather(*works, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        self._sent += len(outcomes) - len(errors)
        if errors:
            self._tell_on(errors[0])
            raise errors[0]

    def _tell_on(self, error: BaseException) -> None:
        if isinstance(error, MQServeError):
            error.add_note(f"{self._sent} of the {len(self._items)} jobs of group {self.group.id} were sent")


@overload
def submit_many(handle: Handle, items: Iterable[Any]) -> Group: ...
@overload
def submit_many(handle: AsyncHandle, items: Iterable[Any]) -> Coroutine[Any, Any, Group]: ...
@overload
def submit_many(handle: Handle | AsyncHandle, items: Iterable[Any]) -> Group | Coroutine[Any, Any, Group]: ...


def submit_many(handle: Handle | AsyncHandle, items: Iterable[Any]) -> Group | Coroutine[Any, Any, Group]:
    """See `Client.submit_many`."""
    if not isinstance(handle, Handle | AsyncHandle):
        raise BadType(f"submit_many() takes a handle and the items to send, not {handle!r}: see serve.get_handle()")
    sending = _Sending(handle, items)
    if isinstance(handle, AsyncHandle):
        return sending.all_soon()
    return sending.all_now()
