"""The part of the store that keeps jobs, as an interface with two implementations (`redis/jobs.py`, `memory/jobs.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .job_groups import GroupFacts, GroupRecord
from .jobs import Attempt, Begun, JobEnd, JobEvent, JobFacts, JobRecord, JobState, Run

OnDone = Callable[[bool | Exception], None]
"""Called once with the outcome of a write, as `OnRecorded` is. It must not raise."""


class NumberedEvent(NamedTuple):
    """An event with its place among those of its job, from 1."""

    seq: int
    event: JobEvent


class PlacedEnd(NamedTuple):
    """An entry of the outbox with its place there."""

    place: str
    note: bytes  # of an `EndNote`


class JobStore(Protocol):
    """One process's access to the records of jobs. Calls end within the store's budget, with StoreUnavailable if need be; the batched ones
    go with the others of their loop turn."""

    def add_then(self, future_id: str, facts: JobFacts, on_done: OnDone, message: bytes = b"") -> None:
        """Writes the record of a job that the broker has confirmed, unless it is there, in a batch. Nothing is changed of a job that has
        begun or ended meanwhile. The message is kept beside it for a retry: as long as the job, then as long as its result, and for
        MESSAGE_TTL_S after a success; that of a job which ended before its record came, as long as most results."""
        ...

    async def begin(self, run: Run) -> Begun:
        """Takes the lease for a run, unless the job has a result or another run's lease lives. Writes the record if it is missing, the
        beginning of the run, and the event. The first stage of a pipeline begins that, too, and each one tells of itself there."""
        ...

    async def renew(self, future_id: str, token: bytes) -> bool:
        """Prolongs the lease. Returns False if it is another run's by now."""
        ...

    async def try_again(self, future_id: str, token: bytes, attempt: Attempt, facts: JobFacts) -> bool:
        """Notes that a run has failed and when the job is tried again, and ends its lease: it waits among the others from then on. Returns
        False, and writes nothing, if the lease is another run's, or the job has a result."""
        ...

    async def give_back(self, future_id: str, token: bytes, facts: JobFacts) -> None:
        """Ends the lease of a run that was given back before its end, and takes the run out of the record, since it is no attempt: it waits
        among the others again. Does nothing if the lease is another run's."""
        ...

    def end_then(self, end: JobEnd, on_done: OnDone) -> None:
        """Records the end of a job, in a batch. True if this is its first result (or equal to the first). Only the first writer changes the
        record, tells those who wait, adds the end to the outbox if something follows from it, and counts it for the job's group. False also
        for the failure of a run after which another has begun: that one's end counts. A late success is the same work, and counts. False
        for any other end of a job that has ended and whose result is not kept any more."""
        ...

    def note(self, future_id: str, token: bytes, event: JobEvent) -> None:
        """Adds an event of a run, in a batch, if the lease is its own. Nobody waits for it, and it may be lost."""
        ...

    async def read(self, future_id: str) -> JobRecord | None:
        """Returns the record; None for a job that is not known (any more). Raises BadEnvelope for what is none."""
        ...

    async def message(self, future_id: str) -> bytes | None:
        """Returns the message that was kept with the record."""
        ...

    async def wait(self, future_id: str, inbox: str) -> JobRecord | None:
        """Has the inbox told of the end of the job, by the note of its result, for WAIT_TTL_S, and returns the record as it is then. The
        inbox is registered first, so that no end is missed. Batched, too: thousands may be renewed at once."""
        ...

    async def follow(self, future_id: str, inbox: str) -> JobRecord | None:
        """Does the same for every event: the inbox gets entries of kind EVENT_KIND with the number and the bytes of each."""
        ...

    async def events(self, future_id: str, after: int = 0) -> Sequence[NumberedEvent]:
        """Returns the events behind that number which are kept, in order."""
        ...

    async def ends(self, at_most: int, after: str = "") -> Sequence[PlacedEnd]:
        """Returns the first entries of the outbox, or the first ones behind a place."""
        ...

    async def drop_ends(self, *places: str) -> None:
        """Removes the entries of the outbox at these places."""
        ...

    async def hold(self, future_id: str, facts: JobFacts) -> None:
        """Writes the record of a job that is sent once others have ended, unless it is there. Its facts, which name no backend yet, give
        way to those of `add_then`."""
        ...

    async def keep_group(self, group_id: str, facts: GroupFacts, call: bytes = b"") -> None:
        """Writes the record of a group, unless it is there. From then on the end of each member is counted by the step that ends it, once.
        With a `call` the last of them adds an entry to the outbox."""
        ...

    async def group(self, group_id: str) -> GroupRecord | None:
        """Raises BadEnvelope for what is none."""
        ...

    async def group_ends(self, group_id: str) -> Mapping[int, JobState]:
        """Returns the members that have ended, by their numbers."""
        ...

    async def place(self, future_id: str, facts: JobFacts) -> int | None:
        """Returns how many waiting jobs of its backend stand before it; None for one that does not wait. An estimate."""
        ...

    async def list(self, *, backend: str = "", tag: str = "", states: Sequence[str] = (), at_most: int = 100) -> Sequence[JobRecord]:
        """Returns the latest jobs first."""
        ...

    async def forget(self, future_id: str) -> bool:
        """Removes record, result and events of a job that has ended. Returns False for one that has not; one that is not known is gone."""
        ...
