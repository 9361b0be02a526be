"""The takers of what a generator yields: one request, or the members of a batch, each of which takes its own item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..broker.results import Result
from .batch_decorators import END, split_results
from .execute import Execution
from .sinks import Sink
from .stages import Job


class Putting(Protocol):
    """Where results go."""

    @property
    def execution(self) -> Execution: ...

    def put(self, job: Job, result: Result) -> None:
        """Puts the result of a job, behind its chunks if it has shown any."""
        ...


class Taker(Protocol):
    """Takes the values of one generator, in the thread in which that runs."""

    @property
    def left(self) -> Sequence[Job]:
        """The jobs that have no result yet."""
        ...

    @property
    def is_given_up(self) -> bool:
        """Whether nobody waits for any value."""
        ...

    @property
    def has_room(self) -> bool: ...

    @property
    def wants_more(self) -> bool: ...

    def park(self, resume: Callable[[], None]) -> bool:
        """See `Outgoing.park`; `resume` may also be called without need."""
        ...

    def take(self, value: object) -> None:
        """Raises MQServeError for a value that cannot be sent."""
        ...

    def end(self) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def give_up(self) -> None: ...


class RequestTaker:
    """One request that takes the values."""

    def __init__(self, job: Job, sink: Sink, results: Putting) -> None:
        self.job = job
        self._sink = sink
        self._results = results

    def __repr__(self) -> str:
        return f"<RequestTaker by {self._sink!r}>"

    @property
    def left(self) -> Sequence[Job]:
        return (self.job,)

    @property
    def is_given_up(self) -> bool:
        return self.job.given_up is not None

    @property
    def has_room(self) -> bool:
        return self._sink.has_room

    @property
    def wants_more(self) -> bool:
        return self._sink.wants_more

    def park(self, resume: Callable[[], None]) -> bool:
        return self._sink.park(resume)

    def take(self, value: object) -> None:
        self._sink.take(value)

    def end(self) -> None:
        try:
            result = self._sink.end()
        except BaseException as error:
            return self.fail(error)
        self._results.put(self.job, result)

    def fail(self, error: BaseException) -> None:
        self._results.put(self.job, self._results.execution.failed(error, self.job))

    def give_up(self) -> None:
        self._results.put(self.job, self.job.unwanted_result)


class BatchTaker:
    """The members of a batch. The slowest reader among them sets the pace; a member that has ended, failed or left gets no more items."""

    def __init__(self, members: Sequence[RequestTaker]) -> None:
        self._members: list[RequestTaker | None] = list(members)

    def __repr__(self) -> str:
        return f"<BatchTaker of {len(self.left)}>"

    @property
    def _left(self) -> list[RequestTaker]:
        return [member for member in self._members if member is not None]

    @property
    def left(self) -> Sequence[Job]:
        return [member.job for member in self._left]

    @property
    def is_given_up(self) -> bool:
        return all([member.is_given_up for member in self._left])

    @property
    def has_room(self) -> bool:
        return all([member.has_room or member.is_given_up for member in self._left])

    @property
    def wants_more(self) -> bool:
        return bool(self._left)

    def park(self, resume: Callable[[], None]) -> bool:
        for member in self._left:
            if not (member.is_given_up or member.has_room):
                member.park(resume)
        return self.has_room

    def take(self, value: object) -> None:
        for place, item in enumerate(split_results(value, len(self._members), "yield")):
            member = self._members[place]
            if member is not None and not self._goes_on(member, item):
                self._members[place] = None

    def _goes_on(self, member: RequestTaker, item: object) -> bool:
        """Gives a member its item; returns whether it takes more."""
        if member.is_given_up:
            member.give_up()
        elif item is END:
            member.end()
        else:
            try:
                member.take(item)
            except BaseException as error:
                member.fail(error)
            else:
                if member.wants_more:
                    return True
                member.end()
        return False

    def end(self) -> None:
        for member in self._left:
            member.end()

    def fail(self, error: BaseException) -> None:
        for member in self._left:
            member.fail(error)

    def give_up(self) -> None:
        for member in self._left:
            member.give_up()
