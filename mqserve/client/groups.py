"""Groups: many jobs that were sent together, found again and waited for by one id."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from ..broker.calls.chord_calls import ChordCall
from ..broker.envelope import Member, mint_id
from ..broker.errors import BadType, BadValue, MQServeError, UnknownJob
from ..broker.job_groups import GroupFacts, chord_id, member_id
from .gathering import Gathered
from .handle import AsyncHandle, Handle
from .jobs import Job

if TYPE_CHECKING:
    from .job_calls import JobCalls, Order

_AT_ONCE = 200  # jobs that are encoded, sent and confirmed together


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """How many of a group's jobs have ended in which way, at one moment."""

    total: int
    pending: int
    """Those that have not ended: they wait, they run, or they were never sent, since sending the group failed."""
    succeeded: int
    failed: int
    cancelled: int
    expired: int

    @property
    def done(self) -> int:
        """How many have ended, in whatever way."""
        return self.succeeded + self.failed + self.cancelled + self.expired


class Group:
    """Many jobs under one id; `serve.submit_many` and `serve.group` return one. `jobs` has them in the order of the items, `then` is
    the job that gets all their results, if there is one."""

    def __init__(self, group_id: str, facts: GroupFacts, calls: JobCalls, *, plain: bool = False, then_plain: bool = False) -> None:
        self.id = group_id
        self.then: Job | None = calls.job(facts.then, facts.then, plain=then_plain) if facts.then else None
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
        """Returns the counts as they are now. The store counts, so that costs the same for a group of any size. Raises UnknownJob if
        nothing is known of the group (any more), and StoreUnavailable."""
        calls = self._calls.here()
        ended = calls.wait(calls.group(self.id)).ended
        return GroupStatus(len(self), len(self) - sum(ended.values()), **{state.value: count for state, count in ended.items()})

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
        return calls.wait(calls.cancel_group(self.id, self._facts))


class _Sending:
    """A group on its way: its facts first, then its jobs, some at a time."""

    def __init__(self, handle: Handle | AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None) -> None:
        if not isinstance(items, Iterable):
            raise BadType(f"submit_many() takes the items, a list or anything else to iterate over, not {items!r}")
        self.calls = handle._home.sender.jobs
        self._handle = handle
        self._items = list(items)
        self._sent = 0
        group_id, order = mint_id(), _order_of(handle)
        self._last = None if then is None else replace(_order_of(then), id=chord_id(group_id))
        self._call: ChordCall | None = None
        if self._last is not None:
            self._call = self.calls.chord_call(self._last) if self._items else None
        facts = self.calls.group_of(len(self._items), order, self._last.id if self._last is not None else "")
        self.group = Group(group_id, facts, self.calls, plain=order.plain, then_plain=self._last is not None and self._last.plain)

    def all_now(self) -> Group:
        try:
            for work in self._works():
                self.calls.wait(work)
        except BaseException as error:
            if self._call is not None:
                self.calls.wait(self._fail_chord(self._call, error))
            raise
        return self.group

    async def all_soon(self) -> Group:
        try:
            for work in self._works():
                await self.calls.wait_soon(work)
        except BaseException as error:
            if self._call is not None:
                await asyncio.shield(self.calls.wait_soon(self._fail_chord(self._call, error)))
            raise
        return self.group

    def _works(self) -> Iterator[Coroutine[Any, Any, Any]]:
        yield self._begin()
        yield from self._parts()
        if self._last is not None and not self._items:  # all of them have ended
            yield self.calls.submit(replace(self._last, data=[]))

    async def _fail_chord(self, call: ChordCall, error: BaseException) -> None:
        """The group will never be complete. What was sent of it goes on."""
        why = f"{self._sent} of the {len(self._items)} jobs of its group were sent, and then: {type(error).__name__}: {error}"
        try:
            await self.calls.fail_chord(call.id, why)
        except UnknownJob:
            pass  # it failed before that had a record
        except MQServeError as failed:
            error.add_note(f"job {call.id}, which was to get the results, waits for ever, since its end could not be recorded: {failed}")

    def _begin(self) -> Coroutine[Any, Any, None]:
        return self.calls.keep_group(self.group.id, self.group._facts, self._call)

    def _parts(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yields the work that sends the next jobs, encoded by now."""
        for start in range(0, len(self._items), _AT_ONCE):
            works: list[Coroutine[Any, Any, Job]] = []
            try:
                for number in range(start, min(start + _AT_ONCE, len(self._items))):
                    order = self._handle._order(self._items[number], {})
                    order = replace(order, id=member_id(self.group.id, number), member=Member(self.group.id, number))
                    works.append(self.calls.submit(order))
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


def _order_of(handle: Handle | AsyncHandle) -> Order:
    """Returns the call of a handle with its options, and no argument yet."""
    order = handle._order(None, {})
    if order.options.idempotency_key:
        raise BadValue("an idempotency_key names one job, and submit_many() sends jobs with ids of their own: take a handle without it")
    return order


@overload
def submit_many(handle: Handle, items: Iterable[Any], then: Handle | AsyncHandle | None = None) -> Group: ...
@overload
def submit_many(handle: AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None) -> Coroutine[Any, Any, Group]: ...
@overload
def submit_many(
    handle: Handle | AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None
) -> Group | Coroutine[Any, Any, Group]: ...


def submit_many(
    handle: Handle | AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None
) -> Group | Coroutine[Any, Any, Group]:
    """See `Client.submit_many`."""
    if not isinstance(handle, Handle | AsyncHandle):
        raise BadType(f"submit_many() takes a handle and the items to send, not {handle!r}: see serve.get_handle()")
    if not isinstance(then, Handle | AsyncHandle | None):
        raise BadType(f"then= is the handle of the endpoint that gets all results, not {then!r}: see serve.get_handle()")
    sending = _Sending(handle, items, then)
    if isinstance(handle, AsyncHandle):
        return sending.all_soon()
    return sending.all_now()
