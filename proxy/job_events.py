"""What happens to a job, as server-sent events: its states, its progress, and what its handler logs and yields.

The id of an event is `<job id>:<number>`. The feed ends behind the final state; a client that was cut off before that sends the last id
that it has as `Last-Event-ID`, to any proxy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..broker.calls.job_events import JobFollower, JobFollowers
from ..broker.envelope import mint_id
from ..broker.job_store import NumberedEvent
from .events import EVENT_HEADERS, RECONNECT_MS, RETRY_MS
from .job_views import name_of
from .polls import Polls

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

COMMENT_EVERY_S = 15.0


@dataclass(frozen=True, slots=True)
class JobFeed:
    """An answer that sends the events of a job. Whoever has it calls `send`."""

    follower: JobFollower
    followers: JobFollowers
    polls: Polls
    receive: Receive

    async def send(self, send: Send) -> None:
        """Sends by ASGI until the job has ended, or its client has gone, or this proxy ends: then the client comes back to another one."""
        follower = self.follower
        try:
            headers = [*EVENT_HEADERS, (b"x-request-id", name_of(follower.id).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_part(send, b"retry: %d\n\n" % RETRY_MS)
            while (events := await self.polls.until(mint_id(), self.receive, follower.more(COMMENT_EVERY_S))) or not follower.is_over:
                if events is None:
                    await self._send_part(send, b"retry: %d\n\n" % RECONNECT_MS)
                    break
                await self._send_part(send, b"".join([_lines(follower.id, event) for event in events]) or b": \n\n")
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.followers.leave(follower)

    async def _send_part(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _lines(future_id: str, numbered: NumberedEvent) -> bytes:
    seq, event = numbered
    data = msgspec.json.encode(event.view())
    return b"id: %b:%d\nevent: %b\ndata: %b\n\n" % (name_of(future_id).encode(), seq, event.kind.encode(), data)
