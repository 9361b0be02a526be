"""Which replica this code runs in: for user code that labels its logs and metrics."""

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
    """A request under way, as far as this module knows it."""

    @property
    def unwanted(self) -> bool: ...

    @property
    def deadline(self) -> float: ...


running_jobs: ContextVar[Sequence[Request]] = ContextVar("running_jobs", default=())  # of the call that runs here

_here = threading.local()
_process: list[ReplicaContext] = []  # of a replica that is a process of its own: for threads that user code starts


def enter_context(context: ReplicaContext, *, whole_process: bool = False) -> None:
    """From now on this thread (or every thread of this process) is the replica's."""
    _here.context = context
    if whole_process:
        _process[:] = [context]


def get_replica_context() -> ReplicaContext:
    """The replica whose code calls this. Raises InstanceError outside of one."""
    context = getattr(_here, "context", None) or (_process[0] if _process else None)
    if context is None:
        raise InstanceError("there is no replica here: get_replica_context() works in a backend's own code, in its worker's threads")
    return context


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of a replica's code, in its thread."""
    _here.is_importing = True
    try:
        yield
    finally:
        _here.is_importing = False


def check_not_importing(what: str) -> None:
    """Raises InstanceError where a replica's code calls this while it is imported: each replica would do it once more."""
    if getattr(_here, "is_importing", False):
        raise InstanceError(
            f"{what} was called while a replica imports the code: each replica would call it again. Put it behind "
            '`if __name__ == "__main__":` in a file that `python` starts, or into a program that imports the code'
        )


def in_replica_process() -> bool:
    """Whether this process is a replica, in whichever thread."""
    return bool(_process)


def in_replica() -> bool:
    """Whether the code of a replica calls this."""
    return bool(_process) or getattr(_here, "context", None) is not None


def get_current_backend_tag() -> str:
    return get_replica_context().backend_tag


def get_current_replica_tag() -> str:
    return get_replica_context().replica_tag


def cancelled() -> bool:
    """Whether nobody wants what runs here any more: its caller has cancelled it or gone away, or its time is spent (in a batch: of all
    of them). For plain code, which cannot be stopped from outside: ask it now and then in a long call, and return. False where no
    request runs."""
    jobs = running_jobs.get()
    return bool(jobs) and all(job.unwanted for job in jobs)


def deadline() -> float:
    """In monotonic seconds, of what runs here: the latest of a batch; infinite where no request runs or it has none."""
    return max((job.deadline for job in running_jobs.get()), default=math.inf)
