"""The end of a backend, as its replicas see it."""

from __future__ import annotations

from dataclasses import dataclass

from ..broker.results import Result


@dataclass(frozen=True, slots=True)
class BackendEnd:
    """The end of a backend: it was deleted, or its instance is being shut down."""

    at: float  # monotonic; a request without a result by then gets `result`
    result: Result
    keeps_queue: bool  # requests that have not started go back to the queue, for the next instance
