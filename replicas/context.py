"""Tells user code in which replica it runs, for example to label logs and metrics."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from ..broker.errors import InstanceError


@dataclass(frozen=True, slots=True)
class ReplicaContext:
    """The seed's names: `backend_tag` is the backend's name, `replica_tag` the replica's id."""

    backend_tag: str
    replica_tag: str


class Request(Protocol):
    """The part of a running request that this module reads."""

    @property
    def unwanted(self) -> bool: ...

    @property
    def deadline(self) -> float: ...


running_jobs: ContextVar[Sequence[Request]] = ContextVar("running_jobs", default=())  # the requests of the current call

_here = threading.local()
_replica: ContextVar[ReplicaContext | None] = ContextVar("replica", default=None)  # for threads that run with a copy of a call's context
_process: list[ReplicaContext] = []  # filled if this whole process is a replica, for threads that user code starts


def enter_context(context: ReplicaContext, *, whole_process: bool = False) -> None:
    """Marks this thread, or every thread of this process, as the replica's."""
    _here.context = context
    if whole_process:
        _process[:] = [context]


def note_replica(context: ReplicaContext) -> None:
    """Notes the replica in the current context, which `asyncio.to_thread` and AnyIO take into the threads that they run."""
    _replica.set(context)


def _replica_here() -> ReplicaContext | None:
    return getattr(_here, "context", None) or _replica.get() or (_process[0] if _process else None)


def get_replica_context() -> ReplicaContext:
    """Returns the replica whose code calls this. Raises InstanceError outside of a replica."""
    context = _replica_here()
    if context is None:
        raise InstanceError("there is no replica here: get_replica_context() works in a backend's own code, in its worker's threads")
    return context


@contextmanager
def importing() -> Iterator[None]:
    """Marks the worker's thread while it imports the replica's code."""
    _here.is_importing = True
    try:
        yield
    finally:
        _here.is_importing = False


def is_importing() -> bool:
    """Whether the code of a replica calls this while it is imported."""
    return getattr(_here, "is_importing", False)


def check_not_importing(what: str) -> None:
    """Raises InstanceError if a replica's code calls `what` while it is imported: each replica would call it again."""
    if is_importing():
        raise InstanceError(
            f"{what} was called while a replica imports the code: each replica would call it again. Put it behind "
            '`if __name__ == "__main__":` in a file that `python` starts, or into a program that imports the code'
        )


def in_replica_process() -> bool:
    """Whether this process is a replica, in any thread."""
    return bool(_process)


def in_replica() -> bool:
    """Whether the code of a replica calls this."""
    return _replica_here() is not None


def is_constructing() -> bool:
    """Whether the code of a replica calls this while no request runs: a constructor, mostly."""
    return in_replica() and not running_jobs.get()


def get_current_backend_tag() -> str:
    return get_replica_context().backend_tag


def get_current_replica_tag() -> str:
    return get_replica_context().replica_tag


def cancelled() -> bool:
    """Whether nobody waits for the running request: its caller has cancelled it or gone away, or its deadline has passed (in a batch, this
    must hold for all requests). A plain call cannot be stopped from outside, so a long one should ask this now and then, and return.
    False if no request runs."""
    jobs = running_jobs.get()
    return bool(jobs) and all(job.unwanted for job in jobs)


def deadline() -> float:
    """The deadline of the running request in monotonic seconds; of a batch the latest one. Infinite if no request runs or it has none."""
    return max((job.deadline for job in running_jobs.get()), default=math.inf)
