"""Readers of answers that flow: as a body, and as events whose connection is cut and which go on by another proxy."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import httpx

from tests.faults.soak.backends import STEPS, words_in_steps
from tests.faults.soak.ledger import End, Entry, Ledger, told

STREAM_KINDS = ("flow", "events")
RESUME_S = 45.0  # in which a reader comes back again and again: longer than any server is away
CUTS = 3  # of one reader


class Way(Enum):
    """How one connection of a reader of events went."""

    ENDED = auto()
    CUT = auto()
    FAILED = auto()


@dataclass(slots=True)
class Events:
    """What a reader has heard so far."""

    entry: Entry
    steps: list[Any] = field(default_factory=list)
    last_id: str = ""
    detail: str = ""  # of a failure


class StreamReader:
    def __init__(self, urls: Mapping[str, str], ledger: Ledger, http: httpx.AsyncClient, chance: random.Random) -> None:
        self._urls = urls
        self._ledger = ledger
        self._http = http
        self._chance = chance

    async def read(self, entry: Entry) -> None:
        try:
            await (self._read_body(entry) if entry.kind == "flow" else self._read_events(Events(entry)))
        except httpx.ConnectError:
            self._end(entry, End.FAILED, "refused")
        except httpx.TimeoutException as error:
            self._end(entry, End.HANGING, repr(error))
        except httpx.TransportError:
            self._end(entry, End.FAILED, "reset")

    async def _read_body(self, entry: Entry) -> None:
        steps: list[Any] = []
        async with self._http.stream("GET", self._url(entry, entry.proxy)) as answer:
            if answer.status_code != 200:
                return self._refused(entry, answer.status_code)
            try:
                async for line in answer.aiter_lines():
                    steps.append(json.loads(line))
            except httpx.TimeoutException:
                raise
            except httpx.TransportError:
                self._check(entry, steps)
                return self._end(entry, End.FAILED, "cut" if entry.backend == "flowing" else "replay cut")
        self._check(entry, steps, whole=True)
        self._end(entry, End.ANSWERED)

    async def _read_events(self, events: Events) -> None:
        """Reads until the end, over as many connections as it takes."""
        entry, proxy, cuts = events.entry, events.entry.proxy, CUTS
        until = time.monotonic() + RESUME_S
        while time.monotonic() < until:
            cut_after = self._chance.randint(1, STEPS // 2) if cuts else STEPS + 1
            cuts = max(0, cuts - 1)
            try:
                way = await self._hear(events, proxy, cut_after)
            except httpx.TransportError:
                if not events.last_id:
                    raise
                await asyncio.sleep(0.5)
                way = Way.CUT
            if way is Way.ENDED:
                self._check(entry, events.steps, whole=True)
                return self._end(entry, End.ANSWERED)
            if way is Way.FAILED:
                self._check(entry, events.steps)
                return self._end(entry, End.EXPIRED if events.detail == "504" else End.FAILED, events.detail)
            proxy = self._chance.choice(list(self._urls))
        self._check(entry, events.steps)
        self._end(entry, End.HANGING, "events")

    async def _hear(self, events: Events, proxy: str, cut_after: int) -> Way:
        """Reads over one connection, which is cut after so many events."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": events.last_id} if events.last_id else {})
        async with self._http.stream("GET", self._url(events.entry, proxy), headers=headers) as answer:
            match answer.status_code:
                case 200:
                    return await self._hear_all(events, answer, cut_after)
                case 204:  # nothing is left: it was cut between the last event and the end
                    return Way.ENDED
                case 502 | 503 | 504 if events.last_id:
                    await asyncio.sleep(0.5)
                    return Way.CUT
                case status:
                    events.detail = str(status)
                    return Way.FAILED

    async def _hear_all(self, events: Events, answer: httpx.Response, cut_after: int) -> Way:
        kind, data = "", ""
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            match name:
                case "id":
                    events.last_id = value
                case "event":
                    kind = value
                case "data":
                    data = value
                case "" if kind == "end":
                    return Way.ENDED
                case "" if kind == "gap":
                    events.detail = "gap"
                    return Way.FAILED
                case "" if kind:
                    events.detail = "failure" if events.entry.backend == "flowing" else "replay failed"
                    return Way.FAILED
                case "" if data:
                    events.steps.append(json.loads(data))
                    kind, data, cut_after = "", "", cut_after - 1
                    if not cut_after:
                        return Way.CUT
        return Way.CUT

    def _check(self, entry: Entry, steps: list[Any], *, whole: bool = False) -> None:
        """Whether the steps are all there, each once, and of one run unless it may be replayed."""
        try:
            words = words_in_steps(entry.number, steps)
        except (ValueError, AttributeError) as error:
            self._ledger.findings.append(f"{told(entry)}: {error}")
            return
        if entry.backend == "flowing":
            entry.words.update(words)
        if whole and len(steps) != STEPS:
            self._ledger.findings.append(f"{told(entry)} looks whole, and has {len(steps)} steps of {STEPS}")

    def _refused(self, entry: Entry, status: int) -> None:
        self._end(entry, End.EXPIRED if status == 504 else End.FAILED, str(status))

    def _url(self, entry: Entry, proxy: str) -> str:
        return f"{self._urls[proxy]}/{entry.backend}/{entry.number}"

    def _end(self, entry: Entry, end: End, detail: str = "") -> None:
        self._ledger.end(entry, end, time.monotonic(), detail)
