"""Jobs: sent over HTTP and found again by their ids, on any proxy; and what the store says of all of them, those of schedules too, when the
load is over: each that was accepted has one recorded end.

Handles send theirs in handle_client.py, direct publishers in load.py. What follows from the end of a job belongs here as well.
"""

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import msgspec

from mqserve.broker.jobs import JobRecord, JobState, record_of
from mqserve.broker.results import Result
from tests.faults.soak.backends import FIRINGS_FROM, SCHEDULES, body_of, word_in
from tests.faults.soak.cluster import Cluster
from tests.faults.soak.ledger import FIRING, JOB_S, End, Entry, Fault, Ledger

LATE_S = 60.0  # up to which a firing is made up for

ENDS = {End.ANSWERED: JobState.SUCCEEDED, End.USER_ERROR: JobState.FAILED}


class JobSender:
    """By HTTP. A job that has not ended in time is left open, and so is one that nobody knows (any more): that is judged with the rest."""

    def __init__(self, urls: Mapping[str, str], ledger: Ledger, http: httpx.AsyncClient, chance: random.Random) -> None:
        self._urls = urls
        self._ledger = ledger
        self._http = http
        self._chance = chance

    async def send(self, entry: Entry) -> None:
        entry.persistent = True
        try:
            answer = await self._http.post(
                self._url_of(entry), json=body_of(entry.backend, entry.number), headers={"Prefer": "respond-async"}
            )
        except httpx.ConnectError:
            return self._end(entry, End.FAILED, "refused")
        except httpx.TimeoutException as error:
            return self._end(entry, End.HANGING, repr(error))
        except httpx.TransportError:
            return self._end(entry, End.FAILED, "reset")
        if answer.status_code != 202:
            return self._end(entry, End.FAILED, f"{answer.status_code}")
        entry.accepted, entry.key = time.monotonic(), answer.json()["id"]
        await self._wait(entry)

    def _url_of(self, entry: Entry) -> str:
        url = f"{self._urls[entry.proxy]}/{entry.backend}"
        return f"{url}/{entry.number}" if entry.backend in ("quick", "patient") else url

    async def _wait(self, entry: Entry) -> None:
        """Asks for the answer by whichever proxy, again and again where one is away."""
        until = entry.accepted + JOB_S
        while (left_s := until - time.monotonic()) > 0:
            url = self._chance.choice(list(self._urls.values()))
            try:
                answer = await self._http.get(f"{url}/-/futures/{entry.key}/result", params={"wait": max(1, min(10, int(left_s)))})
            except httpx.TransportError:
                await asyncio.sleep(0.5)
                continue
            match answer.status_code:
                case 200:
                    self._ledger.hear(entry, lambda: word_in(entry.backend, entry.number, answer.json()))  # noqa: B023
                    return self._end(entry, End.ANSWERED)
                case 500 if "Refused" in answer.text:
                    return self._end(entry, End.USER_ERROR)  # its word stands in the store only
                case 500:
                    return self._end(entry, End.FAILED, f"500 {answer.text[:100]}")
                case 202:  # not yet
                    continue
            await asyncio.sleep(0.5)  # 503, or 404 of a job that the store has lost

    def _end(self, entry: Entry, end: End, detail: str = "") -> None:
        self._ledger.end(entry, end, time.monotonic(), detail)


class Kept(NamedTuple):
    """What the store has of one job."""

    record: JobRecord
    result: Result | None


async def read_jobs(cluster: Cluster) -> dict[str, Kept]:
    """Of all jobs that the store knows, also those whose senders never heard that they were accepted."""
    ids = await cluster.job_ids()
    found: dict[str, Kept] = {}
    for first in range(0, len(ids), 200):
        some = ids[first : first + 200]
        async with cluster.redis.pipeline(transaction=False) as pipe:
            for id in some:
                pipe.hgetall(cluster.keys.job(id))
                pipe.get(cluster.keys.future(id))
            answers: list[Any] = await pipe.execute()
        for id, fields, raw in zip(some, answers[::2], answers[1::2], strict=True):
            if fields:
                found[id] = Kept(record_of(id, fields, has_result=raw is not None), None if raw is None else Result.from_bytes(raw))
    return found


async def unended(cluster: Cluster) -> list[str]:
    """The jobs that have not ended, those that nobody was told of too."""
    return [
        f"job {id} of {kept.record.facts.backend} has no recorded end: it is {kept.record.state}, after {len(kept.record.attempts)} runs"
        for id, kept in (await read_jobs(cluster)).items()
        if not kept.record.state.is_final or kept.result is None
    ]


def compare(entries: Sequence[Entry], kept: Mapping[str, Kept], faults: Sequence[Fault]) -> list[str]:
    """Each job that was accepted, and ended as its sender heard, has that end in its record."""
    found = []
    for entry in entries:
        if (wanted := ENDS.get(entry.end or End.LOST)) is None or _may_be_forgotten(entry, faults):
            continue
        state = kept[entry.key].record.state if entry.key in kept else None
        if state is not wanted:
            found.append(f"{entry.kind} to {entry.backend}, number {entry.number}, was {entry.end}, and its record says {state}")
    return found


def enter_firings(ledger: Ledger, runs: Mapping[int, Sequence[str]], kept: Mapping[str, Kept], faults: Sequence[Fault]) -> list[str]:
    """Enters a request for each second from the first firing to the last; one that never ran is lost. Returns what is wrong with their
    records: each has one job, which has succeeded."""
    numbers = sorted(number for number in runs if number >= FIRINGS_FROM)
    if not numbers:
        return ["no schedule has fired"]
    jobs: defaultdict[int, list[str]] = defaultdict(list)
    for id, (record, result) in kept.items():
        if record.facts.tag in SCHEDULES and result is not None:
            jobs[_number_of(result)].append(id)
    found = []
    for number in range(numbers[0], numbers[-1] + 1):
        sent = time.monotonic() - (time.time() - number)
        entry = ledger.send(Entry(number, FIRING, "ticking", sent, persistent=True))
        ledger.end(entry, End.ANSWERED if number in runs else End.LOST, sent + LATE_S)
        if len(jobs[number]) != 1 and not (_may_be_forgotten(entry, faults) and not jobs[number]):
            found.append(f"firing {number} has {len(jobs[number])} jobs with a result")
    return found


def _number_of(result: Result) -> int:
    decode = json.loads if "json" in result.content_type else msgspec.msgpack.decode
    return int(decode(result.body)["number"]) if result.error is None else 0


def _may_be_forgotten(entry: Entry, faults: Sequence[Fault]) -> bool:
    return any(fault.forgets and entry.sent <= fault.mended for fault in faults)


def counts_of(kept: Mapping[str, Kept]) -> Counter[str]:
    """How many jobs of the store ended in which way, and how many of them needed more than one run."""
    counts = Counter(str(record.state) for record, _ in kept.values())
    counts["tried again"] = sum(len(record.attempts) > 1 for record, _ in kept.values())
    return counts
