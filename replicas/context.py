"""Which replica this code runs in: for user code that labels its logs and metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..broker.errors import InstanceError


@dataclass(frozen=True, slots=True)
class ReplicaContext:
    """The seed's names: `backend_tag` is the backend's name, `replica_tag` the replica's id."""

    backend_tag: str
    replica_tag: str


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


def in_replica_process() -> bool:
    """Whether this process is a replica, in whichever thread."""
    return bool(_process)


def get_current_backend_tag() -> str:
    return get_replica_context().backend_tag


def get_current_replica_tag() -> str:
    return get_replica_context().replica_tag
