"""Ten thousand jobs at full speed, by HTTP, by handle and from Node, while replicas are killed at random and both servers crash once: each
has one recorded end."""

import asyncio
import faulthandler
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import redis

import mqserve as serve
from mqserve.broker.errors import MQServeError
from mqserve.broker.jobs import JobState
from mqserve.broker.results import Result
from tests.faults.site import Site, running_site
from tests.instances import ROOT, wait_until
from tests.tallies import Tally

pytestmark = [pytest.mark.long, pytest.mark.row(33)]

JOBS = 10_000
EVERY = 20  # of so many jobs one is meant to fail, one to be cancelled, and one to expire
FAILS, CANCELLED, EXPIRES = 3, 7, 11
SOON_S = 0.001  # within which the latter may begin
SENDERS = 16
PAUSES_S = (1.0, 4.0)  # between two killed replicas
BROKER_AFTER, STORE_AFTER = 500, 5_000  # runs
ALL_ENDED_S = 150.0

FATES = {FAILS: JobState.FAILED, CANCELLED: JobState.CANCELLED, EXPIRES: JobState.EXPIRED}
ENDS = {  # each may have; a job that should be cancelled or expire may have run before that
    JobState.FAILED: {JobState.FAILED},
    JobState.CANCELLED: {JobState.CANCELLED, JobState.SUCCEEDED},
    JobState.EXPIRED: {JobState.EXPIRED, JobState.SUCCEEDED},
    JobState.SUCCEEDED: {JobState.SUCCEEDED},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), "ten-thousand") as site:
        yield site


def deploy(client: serve.Client, tally: Tally) -> None:
    async def work(request: serve.ServeRequest) -> str:
        number = request.data["number"]
        tally.note(number)
        await asyncio.sleep(0.005)
        if number % EVERY == FAILS:
            raise ArithmeticError(number)
        return said_by(number)

    client.create_backend("b", work, config={"num_replicas": 3, "max_concurrent_queries": 32, "max_attempts": 50})
    client.create_endpoint("b", backend="b", route="/b", methods=("POST",))


def said_by(number: int) -> str:
    return f"twice {number} is {2 * number}"


def meant_for(number: int) -> JobState:
    return FATES.get(number % EVERY, JobState.SUCCEEDED)


class Senders:
    """Each way has a third of the numbers, and sends each again until it is accepted: with a key of its own, so that it is one job. `ids`
    are those of the jobs that were accepted."""

    def __init__(self, site: Site, amqplib: str) -> None:
        self._site = site
        self._amqplib = amqplib
        self.ids: dict[int, str] = {}
        self.refused: Counter[str] = Counter()
        third = JOBS // 3
        self._by_http, self._by_handle, self._from_node = range(third), range(third, 2 * third), range(2 * third, JOBS)

    def __repr__(self) -> str:
        return f"<Senders, {len(self.ids)} accepted, {dict(self.refused.most_common(10))}>"

    def send_all(self) -> None:
        with ThreadPoolExecutor() as ways:
            for way in [ways.submit(send) for send in (self._send_by_http, self._send_by_handle, self._send_from_node)]:
                way.result()

    def _send_by_http(self) -> None:
        asyncio.run(self._send_over_connections())

    async def _send_over_connections(self) -> None:
        numbers = iter(self._by_http)
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(keepalive_expiry=2)) as http:

            async def some() -> None:
                for number in numbers:
                    self.ids[number] = id = await self._posted(http, number)
                    if meant_for(number) is JobState.CANCELLED:
                        await self._answered(http, "DELETE", f"/-/futures/{id}", 200)

            await asyncio.gather(*(some() for _ in range(SENDERS)))

    async def _posted(self, http: httpx.AsyncClient, number: int) -> str:
        headers = {"Prefer": "respond-async", "Idempotency-Key": f"http-{number}"}
        if meant_for(number) is JobState.EXPIRED:
            headers["X-Request-Timeout-Seconds"] = f"{SOON_S}"
        answer = await self._answered(http, "POST", "/b", 202, json={"number": number}, headers=headers)
        return str(answer.json()["id"])

    async def _answered(self, http: httpx.AsyncClient, method: str, path: str, status: int, **request: Any) -> httpx.Response:
        """By any proxy, until one answers with that status."""
        while True:
            with suppress(httpx.TransportError):
                answer = await http.request(method, f"{random.choice(self._site.urls)}{path}", **request)
                if answer.status_code == status:
                    return answer
                assert answer.status_code == 503, answer.text
                self.refused[f"{method}: {answer.text[:100]}"] += 1
            await asyncio.sleep(0.2)

    def _send_by_handle(self) -> None:
        handle = self._site.client.get_handle("b")

        def send(number: int) -> None:
            within_s = SOON_S if meant_for(number) is JobState.EXPIRED else None
            keyed = handle.options(idempotency_key=f"handle-{number}", expires_s=within_s)
            job = self._retried(lambda: keyed.submit({"number": number}))
            self.ids[number] = job.id
            if meant_for(number) is JobState.CANCELLED:
                self._retried(job.cancel)

        with ThreadPoolExecutor(SENDERS) as threads:
            list(threads.map(send, self._by_handle))

    def _retried(self, act: Any) -> Any:
        while True:
            try:
                return act()
            except MQServeError as error:
                self.refused[f"handle: {str(error)[:100]}"] += 1
                time.sleep(0.2)

    def _send_from_node(self) -> None:
        env = {
            **os.environ, "MQSERVE_BROKER_URL": self._site.cluster.broker.url, "MQSERVE_NAMESPACE": self._site.cluster.namespace,
            "NODE_PATH": self._amqplib, "BACKEND": "b", "FIRST": f"{self._from_node.start}", "COUNT": f"{len(self._from_node)}",
            "EVERY": f"{EVERY}", "AT": f"{EXPIRES}",
        }  # fmt: skip
        script = ROOT / "tests" / "faults" / "publish_jobs.js"
        done = subprocess.run(["node", script], env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        for number in self._from_node:
            self.ids[number] = f"b/node-{number}"
            if meant_for(number) is JobState.CANCELLED:
                self._retried(self._site.client.job(f"node-{number}", backend="b").cancel)
        self.refused["node: published again"] += int(done.stdout) - len(self._from_node)


@contextmanager
def deaths(site: Site, tally: Tally) -> Iterator[Counter[str]]:
    """Kills a replica every now and then, and each server once, until the block ends. Yields what was killed so far."""
    killed: Counter[str] = Counter()
    ended = threading.Event()

    def kill_replicas() -> None:
        while not ended.wait(random.uniform(*PAUSES_S)):
            with suppress(redis.RedisError, OSError):  # Redis is away, or the replica has gone
                if pids := site.members.pids("replica", "b"):
                    os.kill(random.choice(sorted(pids)), signal.SIGKILL)
                    killed["replica"] += 1

    def kill_servers() -> None:
        for server, runs in ((site.cluster.broker, BROKER_AFTER), (site.cluster.store, STORE_AFTER)):
            while len(tally) < runs and not ended.wait(0.1):
                pass
            site.kill_server(server)
            killed[server.name] += 1

    with ThreadPoolExecutor(2) as threads:
        killing = [threads.submit(kill_replicas), threads.submit(kill_servers)]
        try:
            yield killed
            killing[1].result()
        finally:
            ended.set()


class Records:
    """What the store says of jobs, read as docs/protocol.md describes it."""

    def __init__(self, site: Site, ids: list[str]) -> None:
        self._store: Any = redis.Redis.from_url(site.cluster.store.url)
        self._keys = site.cluster.keys
        self._ids = ids
        self._open = list(ids)

    def __repr__(self) -> str:
        return f"<Records, {len(self._open)} have not ended: {self._open[:5]}>"

    def all_ended(self) -> bool:
        with suppress(redis.RedisError):
            states = self._read("HGET", [self._keys.job(id) for id in self._open], "state")
            self._open = [id for id, state in zip(self._open, states, strict=True) if state is None]
        return not self._open

    def ends(self) -> dict[str, tuple[JobState, Result]]:
        states = self._read("HGET", [self._keys.job(id) for id in self._ids], "state")
        results = self._read("GET", [self._keys.future(id) for id in self._ids])
        return {id: (JobState(state.decode()), Result.from_bytes(raw)) for id, state, raw in zip(self._ids, states, results, strict=True)}

    def known(self) -> set[str]:
        return {raw.decode() for raw in self._store.zrange(self._keys.jobs, 0, -1)}

    def _read(self, command: str, keys: list[str], *more: str) -> list[Any]:
        found: list[Any] = []
        for first in range(0, len(keys), 1000):
            with self._store.pipeline(transaction=False) as pipe:
                for key in keys[first : first + 1000]:
                    pipe.execute_command(command, key, *more)
                found += pipe.execute()
        return found


def test_each_of_ten_thousand_jobs_has_one_recorded_end_whatever_dies(site: Site, amqplib: str, tally: Tally) -> None:
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test
    deploy(site.client, tally)
    senders = Senders(site, amqplib)
    began = time.monotonic()
    with deaths(site, tally) as killed:
        senders.send_all()
        sent_s = time.monotonic() - began
        records = Records(site, list(senders.ids.values()))
        wait_until(records.all_ended, ALL_ENDED_S, told=lambda: f"{records!r}\n{senders!r}\n{killed}\n{site.logs()}")
    ended_s = time.monotonic() - began
    ends = records.ends()
    counts = Counter(state for state, _ in ends.values())
    runs = Counter(map(int, tally.lines))
    print(f"\n{len(senders.ids)} accepted in {sent_s:.0f} s = " + " + ".join(f"{counts[state]} {state}" for state in sorted(counts)))
    print(f"all ended after {ended_s:.0f} s; killed: {dict(killed)}; {sum(times > 1 for times in runs.values())} ran more than once")
    print(f"refused, and sent again: {dict(senders.refused)}")

    assert len(senders.ids) == len(ends) == counts.total() == JOBS
    assert killed["RabbitMQ"] == killed["Redis"] == 1 and killed["replica"] >= 3
    assert all(counts[state] for state in ENDS), counts
    for number, id in senders.ids.items():
        check_end(number, *ends[id])
    assert {number for number in range(JOBS) if ends[senders.ids[number]][0] in (JobState.SUCCEEDED, JobState.FAILED)} <= set(runs)
    unasked = Records(site, list(records.known() - set(ends)))
    wait_until(unasked.all_ended, told=lambda: f"jobs whose senders never heard that they were accepted: {unasked!r}")
    wait_until(lambda: waiting(site) == {"0"}, told=lambda: f"messages wait: {waiting(site)}")


def check_end(number: int, state: JobState, result: Result) -> None:
    assert state in ENDS[meant_for(number)], (number, state, result)
    status = {JobState.SUCCEEDED: 200, JobState.FAILED: 500, JobState.CANCELLED: 499, JobState.EXPIRED: 504}[state]
    assert result.status == status, (number, state, result)
    if state is JobState.SUCCEEDED:
        assert said_by(number) in result.body.decode(errors="replace"), (number, result)
    if state is JobState.FAILED:
        assert result.error is not None and "ArithmeticError" in result.error.type, (number, result)


def waiting(site: Site) -> set[str]:
    """How many messages the queues of jobs and the dead letters hold."""
    listed = site.cluster.broker.ctl("list_queues", "--no-table-headers", "name", "messages").splitlines()
    return {count for name, count in map(str.split, listed) if name.startswith(f"{site.cluster.namespace}.")}
