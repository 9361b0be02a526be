"""What the tests of jobs do all day: add, begin and end them, and learn the outcomes."""

import asyncio
from collections.abc import Callable
from typing import Any

from mqserve.broker.jobs import Begun, JobEnd, JobFacts, JobState, Run
from mqserve.broker.store import Store
from tests.broker.traffic import BUDGET_S

FACTS = JobFacts("b", endpoint="e", created_ms=1000)


async def outcome_of(write: Callable[[Callable[[bool | Exception], None]], None]) -> bool:
    """The outcome of a batched write. Told twice, it fails the test."""
    told: asyncio.Future[bool | Exception] = asyncio.get_running_loop().create_future()
    write(told.set_result)
    async with asyncio.timeout(BUDGET_S):
        outcome = await told
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def added(store: Store, id: str = "f", facts: JobFacts = FACTS, message: bytes = b"") -> None:
    assert await outcome_of(lambda on_done: store.jobs.add_then(id, facts, on_done, message))


async def begun(store: Store, token: bytes = b"run", id: str = "f", facts: JobFacts = FACTS) -> Begun:
    return await store.jobs.begin(Run(id, token, "replica-1", facts, now_ms=2000))


def end_of(id: str = "f", result: bytes = b"result", **fields: Any) -> JobEnd:
    known: dict[str, Any] = {
        "note": b"note of " + result, "state": JobState.SUCCEEDED, "status": 200, "backend": "b", "ended_ms": 3000, "result_ttl_ms": 60_000,
    }  # fmt: skip
    return JobEnd(id, result, **{**known, **fields})


async def ended(store: Store, id: str = "f", result: bytes = b"result", **fields: Any) -> bool:
    return await outcome_of(lambda on_done: store.jobs.end_then(end_of(id, result, **fields), on_done))


async def state_of(store: Store, id: str = "f") -> str:
    record = await store.jobs.read(id)
    return "unknown" if record is None else str(record.state)
