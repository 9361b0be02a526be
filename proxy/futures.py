"""The paths about one request, found by its id: its state, its result, its events, its end, and sending it once more. A group of jobs has
its counts under its id.

They stand at `/-/futures/{id}`, and also at the setting `futures_path`, since servers in front often hide `/-/`. Knowing a minted id is the
right to all of them; a caller's own key is no secret, so that needs the token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from ..broker.calls.group_ends import cancel_group, group_now
from ..broker.calls.job_sending import JobSender
from ..broker.calls.sending import RequestSender
from ..broker.envelope import is_endpoint_key, is_minted, mint_id
from ..broker.errors import MQServeError, ResultGone, UnknownJob
from ..broker.jobs import JobRecord, JobState, state_of
from .common_ids import CommonIds
from .events import EventId, EventStreams
from .forwarded import PREFIX
from .job_events import JobFeed
from .job_views import Links, group_view, job_view, name_of, new_job_view, result_view, state_reply
from .polls import Polls
from .preferences import wait_of
from .responses import Reply, from_error, json_reply, problem
from .stored_bodies import AnyReply, reply_of
from .streaming import Flow
from .system_routes import forbidden

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Answer = AnyReply | Flow | JobFeed

SYSTEM_PATH = "/-/futures"
_PARTS = ("result", "events", "retry")


class Futures:
    """What a proxy answers about requests by their ids. `path` is the setting, and may change."""

    def __init__(
        self, sender: RequestSender, jobs: JobSender, polls: Polls, events: EventStreams,
        *, is_cancelled: Callable[[str], bool], trusts: Callable[[Scope], bool], common_ids: CommonIds | None, debug: bool,
    ) -> None:  # fmt: skip
        self._sender = sender
        self._jobs = jobs
        self._records = jobs.store.jobs
        self._polls = polls
        self._events = events
        self._is_cancelled = is_cancelled
        self._trusts = trusts
        self._common_ids = common_ids
        self._debug = debug
        self.move(SYSTEM_PATH)
        self.refusal = ""  # why no new jobs are taken

    def __repr__(self) -> str:
        return f"<Futures at {self.path}>"

    def move(self, path: str) -> None:
        """From now on they stand at this path, too."""
        self.path = path
        self.own = ("/-/", f"{path}/")  # how the paths begin that are no endpoint's

    def links(self, scope: Scope) -> Links:
        return self.links_behind(scope.get(PREFIX, ""))

    def links_behind(self, prefix: str) -> Links:
        """Returns the links for a client whose paths begin with this, which a server in front takes away."""
        return Links(prefix + self.path)

    def root_of(self, raw_path: bytes) -> str:
        """Returns under which of the two roots a path stands; empty if it stands elsewhere. A path that is written otherwise (`/%2D/…`)
        passes by a server in front that lets nobody there, so it stands nowhere."""
        for root in (self.path, SYSTEM_PATH):
            if raw_path.startswith(root.encode() + b"/"):
                return root
        return ""

    async def answer(self, scope: Scope, receive: Receive, root: str) -> Answer:
        future_id, part = _read_path(scope["raw_path"].decode("latin-1").removeprefix(root + "/"))
        methods = {"": ("GET", "HEAD", "DELETE"), "retry": ("POST",), "events": ("GET",)}.get(part, ("GET", "HEAD"))
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            return problem(405, f"{scope['path']} takes {allowed}.", mint_id(), headers=((b"allow", allowed.encode()),))
        if not is_minted(future_id):
            if "/" not in future_id and not is_endpoint_key(future_id):
                return problem(404, "That is no request's id: it is what X-Request-ID or a handle's future says, 32 hex digits.", mint_id())
            if not self._trusts(scope):
                return forbidden("A request by its sender's own key")
        try:
            if part == "result":
                return await self._result(future_id, scope, receive)
            if part == "events":
                return await self._follow(future_id, scope, receive)
            if part == "retry":
                return await self._retry(future_id, scope)
            if scope["method"] == "DELETE":
                return await self._cancel(future_id, scope)
            return await self._state(future_id, scope, receive)
        except MQServeError as error:
            return from_error(error, name_of(future_id), debug=self._debug)

    # What is known of it.

    async def _state(self, future_id: str, scope: Scope, receive: Receive) -> Reply:
        if (record := await self._record(future_id, scope, receive)) is not None:
            return state_reply(await self.view(record, self.links(scope)))
        if (result := await self._sender.pending.peek_head(future_id)) is not None:
            return state_reply(result_view(future_id, result, state_of(result), self.links(scope), debug=self._debug))
        if (group := await group_now(self._jobs, future_id)) is not None:
            return state_reply(group_view(future_id, group, self.links(scope)))
        return _unknown(future_id)

    async def _record(self, future_id: str, scope: Scope, receive: Receive) -> JobRecord | None:
        """Returns the record of a job, once it has ended or its client has waited for as long as the query says."""
        wait_s = wait_of(scope["query_string"])
        record = await self._jobs.look(future_id)
        if record is None or not wait_s or record.state.is_final:
            return record
        with suppress(MQServeError):  # the record says it, too
            await self._polls.until(mint_id(), receive, self._sender.pending.job_result(future_id, wait_s))
        return await self._jobs.look(future_id) or record

    async def view(self, record: JobRecord, links: Links) -> dict[str, Any]:
        """Returns what a client gets to know of a job. Raises StoreUnavailable."""
        is_queued = record.state is JobState.QUEUED and not record.facts.stages
        stages = await self._jobs.stages(record)
        position = await self._records.place(record.id, record.facts) if is_queued else None
        failed = await self._sender.pending.peek_head(record.id) if record.has_result and record.state is not JobState.SUCCEEDED else None
        return job_view(record, links, position=position, result=failed, debug=self._debug, stages=stages)

    # Its answer.

    async def _result(self, future_id: str, scope: Scope, receive: Receive) -> AnyReply:
        record = await self._record(future_id, scope, receive)
        result = await self._sender.pending.peek(future_id)
        if result is None:
            return await self._not_there(future_id, record, scope)
        if result.frames:
            return 303, [(b"location", self.links(scope).events(future_id).encode())], b""
        files, to_head = self._jobs.store.files, scope["method"] == "HEAD"
        return await reply_of(files, future_id, result, name_of(future_id), debug=self._debug, to_head=to_head)

    async def _not_there(self, future_id: str, record: JobRecord | None, scope: Scope) -> Reply:
        if record is None:
            return await self._of_group(future_id, scope) or _unknown(future_id)
        if record.state.is_final:
            raise ResultGone(f"job {future_id} has {record.state}, and its result is not kept any more")
        links = self.links(scope)
        return links.promise(await self.view(record, links))

    async def _follow(self, future_id: str, scope: Scope, receive: Receive) -> Answer:
        place, _, seq = next((value for name, value in scope["headers"] if name == b"last-event-id"), b"").rpartition(b":")
        after = int(seq) if place == name_of(future_id).encode() and seq.isdigit() and len(seq) <= 15 else 0
        if (record := await self._jobs.look(future_id)) is None:
            return await self._of_group(future_id, scope) or await self._events.resume(EventId(future_id, after))
        if after and record.state.is_final and not await self._records.events(future_id, after):
            return 204, [(b"x-request-id", name_of(future_id).encode())], b""  # it has all of them: a browser does not come back after that
        followers = self._sender.pending.followers
        return JobFeed(await followers.follow(future_id, after), followers, self._polls, receive)

    # Its end, and another beginning.

    async def _cancel(self, future_id: str, scope: Scope) -> Reply:
        if (record := await self._jobs.look(future_id)) is not None:
            # also one that is cancelled: the store may have failed before the stage of a pipeline was, too
            return _cancelled(future_id, await self._jobs.cancel(future_id, self._is_cancelled) or record.state is JobState.CANCELLED)
        is_known = self._is_known(future_id)
        if not is_known and (group := await self._records.group(future_id)) is not None:
            count = await cancel_group(self._jobs, future_id, group.facts, self._is_cancelled)
            return json_reply({"id": future_id, "cancelled": count > 0, "jobs": count})
        if not (is_known or self._trusts(scope)):
            # An id that this proxy does not know leaves traces in the store: not for anybody to make up.
            return forbidden("The request of another process")
        # An id that is in the log already is not appended again: repeated DELETEs of one id would push out the notices of others.
        cancelled = self._is_cancelled(future_id) or await self._sender.cancel_everywhere(future_id)
        return _asked(future_id) if cancelled and not is_known else _cancelled(future_id, cancelled)

    def _is_known(self, future_id: str) -> bool:
        """Whether this proxy waits for the request, or one that shares its port has sent it."""
        pending = self._sender.pending
        return (
            future_id in pending or future_id in pending.streams or (self._common_ids is not None and self._common_ids.are_ours(future_id))
        )

    async def _retry(self, future_id: str, scope: Scope) -> Reply:
        new_id = mint_id() if self._common_ids is None else self._common_ids.mint()
        try:
            facts = await self._jobs.retry(future_id, new_id, refusal=self.refusal)
        except UnknownJob:
            if (reply := await self._of_group(future_id, scope)) is not None:
                return reply
            raise
        links = self.links(scope)
        return links.promise(new_job_view(new_id, facts, links))

    async def _of_group(self, future_id: str, scope: Scope) -> Reply | None:
        """Returns what is answered where only a job has something, if that is the id of a group."""
        if await self._records.group(future_id) is None:
            return None
        counts = self.links(scope).state(future_id)
        detail = f"That is the id of a group, which has counts, at {counts}; results and events are those of its jobs, under their own ids."
        return problem(404, detail, name_of(future_id))


def _read_path(path: str) -> tuple[str, str]:
    """Returns the id, and which part of it is asked for. An id is one segment, percent-encoded; servers in front may have decoded it."""
    name, _, last = path.rpartition("/")
    return (unquote(name), last) if name and last in _PARTS else (unquote(path), "")


def _cancelled(future_id: str, cancelled: bool) -> Reply:
    return json_reply({"id": future_id, "cancelled": cancelled})


def _asked(future_id: str) -> Reply:
    """Only the process that waits for a request knows of it, so nobody else can tell whether there is one."""
    detail = "Nothing is known here of a request of this id. If another process waits for it, or sends it yet, it is cancelled."
    return json_reply({"id": future_id, "cancelled": "asked", "detail": detail}, 202)


def _unknown(future_id: str) -> Reply:
    return problem(
        404,
        "Nothing is known of a request of this id: there was none, its result is not kept any more, or it is no job and has no result yet.",
        name_of(future_id),
    )
