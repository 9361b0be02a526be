"""Jobs as clients see them: their state as JSON, and where their result and events are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from ..broker.callbacks import receiver_of
from ..broker.calls.job_sending import StageRecord
from ..broker.envelope import is_minted
from ..broker.job_groups import GroupRecord
from ..broker.jobs import Attempt, JobFacts, JobRecord, JobState, state_of
from ..broker.results import Result
from ..broker.times import rfc3339
from .responses import Reply, explain, json_reply

Header = tuple[bytes, bytes]

_NOT_STORED: Header = (b"cache-control", b"no-store")
_RETRY_AFTER: Header = (b"retry-after", b"1")


class Links(NamedTuple):
    """Where the paths about jobs stand for one client: `root` ends without a slash."""

    root: str

    def state(self, future_id: str) -> str:
        return f"{self.root}/{name_of(future_id)}"

    def result(self, future_id: str) -> str:
        return f"{self.state(future_id)}/result"

    def events(self, future_id: str) -> str:
        return f"{self.state(future_id)}/events"

    def promise(self, view: dict[str, Any]) -> Reply:
        """Returns 202 for a job of which this is known."""
        status, headers, body = json_reply(view, 202)
        return status, [*headers, _NOT_STORED, _RETRY_AFTER, (b"location", self.state(view["id"]).encode())], body


def name_of(future_id: str) -> str:
    """Returns the id as it stands in paths, headers and events: a publisher's own key may hold line ends."""
    return future_id if is_minted(future_id) else quote(future_id, safe="")


def state_reply(view: dict[str, Any]) -> Reply:
    """Returns 200 with what is known."""
    status, headers, body = json_reply(view)
    return status, [*headers, _NOT_STORED], body


def job_view(
    record: JobRecord, links: Links, *, position: int | None, result: Result | None, debug: bool, stages: Sequence[StageRecord] = ()
) -> dict[str, Any]:
    """Returns what a client gets to know of a job. `result` is there for one that has failed, `stages` for a pipeline."""
    view = {
        **_facts(record.id, record.facts, record.state, links),
        "started_at": rfc3339(record.started_ms),
        "ended_at": rfc3339(record.ended_ms),
        "attempts": len(record.attempts),
        "history": [_attempt(attempt, debug=debug) for attempt in record.attempts if attempt.ended_ms],
        "progress": None if record.progress is None else record.progress.view(),
        "position": position,
        "stages": [_known({"endpoint": stage.endpoint, "id": stage.id, "status": stage.state}) for stage in stages],
        "error": None if result is None else _error(result, debug=debug),
    }
    return _known(view)


def new_job_view(future_id: str, facts: JobFacts, links: Links) -> dict[str, Any]:
    """Returns the view of a job that was accepted now."""
    return _facts(future_id, facts, JobState.QUEUED, links)


def result_view(future_id: str, result: Result, state: JobState, links: Links, *, debug: bool) -> dict[str, Any]:
    """Returns what is known of a request that is no job and has a result."""
    return _known({"id": future_id, "status": state, "result_url": links.result(future_id), "error": _error(result, debug=debug)})


def group_view(group_id: str, group: GroupRecord, links: Links) -> dict[str, Any]:
    """Returns what is known of a group. Its counts are there also where they are 0."""
    facts, counts = group.facts, {state.value: count for state, count in group.ended.items()}
    view = {
        "id": group_id,
        "endpoint": facts.endpoint,
        "created_at": rfc3339(facts.created_ms),
        "expires_at": rfc3339(facts.expires_ms),
        "then_url": links.state(facts.then) if facts.then else "",
    }
    return {**_known(view), "total": facts.total, "pending": facts.total - sum(counts.values()), **counts}


def _facts(future_id: str, facts: JobFacts, state: JobState, links: Links) -> dict[str, Any]:
    """Returns what is there of it: built so and not by `_known`, since each job that is accepted is answered with it. A caller's own key
    names its backend already, which is otherwise nothing for strangers."""
    found: dict[str, Any] = {"id": future_id, "status": state}
    if facts.endpoint:
        found["endpoint"] = facts.endpoint
    if facts.backend and not is_minted(future_id):
        found["backend"] = facts.backend
    if facts.created_ms:
        found["created_at"] = rfc3339(facts.created_ms)
    if facts.not_before_ms:
        found["not_before"] = rfc3339(facts.not_before_ms)
    if facts.expires_ms:
        found["expires_at"] = rfc3339(facts.expires_ms)
    if facts.tag:
        found["tag"] = facts.tag
    if facts.retry_of:
        found["retry_of"] = facts.retry_of
    if facts.callback:
        found["callback_host"] = receiver_of(facts.callback)
    found["result_url"], found["events_url"] = links.result(future_id), links.events(future_id)
    return found


def _attempt(attempt: Attempt, *, debug: bool) -> dict[str, Any]:
    """The message of a handler's exception is for its operators, as in the answer of status 500."""
    return _known(
        {
            "number": attempt.number,
            "started_at": rfc3339(attempt.started_ms),
            "ended_at": rfc3339(attempt.ended_ms),
            "error": attempt.error if debug else attempt.error.partition(":")[0],
            "again_at": rfc3339(attempt.again_ms),
        }
    )


def _error(result: Result, *, debug: bool) -> dict[str, Any] | None:
    if result.error is None:
        is_failed = state_of(result) is JobState.FAILED  # by the status of an answer that code of the user wrote
        return (
            {"type": "HTTPStatus", "message": f"it was answered with status {result.status}", "status": result.status}
            if is_failed
            else None
        )
    return {"type": result.error.type, "message": explain(result, debug=debug), "status": result.status}


def _known(view: dict[str, Any]) -> dict[str, Any]:
    """Returns the view without what is not there."""
    return {name: value for name, value in view.items() if value not in (None, "", [])}
