"""A proxy on an embedded queue and store, whose jobs are held for the test to run as a replica would."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from mqserve.broker.envelope import Envelope, mint_id
from mqserve.broker.jobs import JobEnd, JobFacts, Leased, Run, state_of
from mqserve.broker.results import ErrorInfo, Result, entry_of
from tests.broker.traffic import Hands
from tests.proxy.test_app import TOKEN, Answer, Site

ASYNC = (b"prefer", b"respond-async")
FAR = ("192.0.2.1", 1)
WITH_TOKEN = (b"authorization", f"Bearer {TOKEN}".encode())
FAILED = Result(status=500, error=ErrorInfo(type="ValueError", message="secret words", traceback="Traceback …"))


class JobSite(Site):
    """A site whose jobs are held by `jobs`, which the test runs as a replica would."""

    async def __aenter__(self) -> "JobSite":
        await super().__aenter__()
        self.jobs = Hands()
        await self.queue.consume("b", 1, 1000, self.jobs, jobs=True)
        return self

    async def submitted(self, *headers: tuple[bytes, bytes], **request: Any) -> tuple[Envelope, Answer]:
        before = len(self.jobs)
        answer = await self.ask("/e/x", headers=[ASYNC, *headers], **request)
        await self.jobs.hold(before + 1)
        return self.jobs.held[-1].envelope(), answer

    async def begun(self, future_id: str) -> bytes:
        token = mint_id().encode()
        run = Run(future_id, token, "replica", JobFacts("b", "e"), self.store.now_ms())
        assert isinstance(await self.store.jobs.begin(run), Leased)
        return token

    def end(self, future_id: str, result: Result, *, ttl_ms: int = 60_000) -> None:
        raw = result.to_bytes()
        note, now_ms = entry_of(future_id, raw), self.store.now_ms()
        self.store.jobs.end_then(JobEnd(future_id, raw, note, state_of(result), result.status, "b", now_ms, ttl_ms), lambda outcome: None)

    async def state(self, future_id: str, query: bytes = b"", **scope: Any) -> dict[str, Any]:
        answer = await self.ask(f"/-/futures/{future_id}", query_string=query, **scope)
        assert answer.status == 200, answer.body
        found: dict[str, Any] = json.loads(answer.body)
        return found

    async def events(self, future_id: str, last: bytes = b"", *headers: tuple[bytes, bytes]) -> list[tuple[str, str, Any]]:
        """The id, kind and data of each event until the feed ends."""
        parts: list[bytes] = []

        async def receive() -> MutableMapping[str, Any]:
            await asyncio.Event().wait()
            return {}

        async def send(message: MutableMapping[str, Any]) -> None:
            parts.append(message.get("body", b""))

        path, headers = f"/-/futures/{future_id}/events", (*headers, (b"last-event-id", last))
        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": list(headers),
            "http_version": "1.1", "scheme": "http", "client": FAR, "server": None,
        }  # fmt: skip
        async with asyncio.timeout(20):
            await self.app(scope, receive, send)
        found = []
        for block in b"".join(parts).decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in fields:
                found.append((fields["id"], fields["event"], json.loads(fields["data"])))
        return found
