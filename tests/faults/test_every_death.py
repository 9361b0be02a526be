"""Jobs, and the death of everything in turn: what sent them, what runs them, what leads, and both servers."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.faults.site import Site, running_site
from tests.gates import Gate
from tests.instances import NOISE_S, wait_until
from tests.tallies import Tally

pytestmark = pytest.mark.row(33)

AGAIN_WITHIN_S = 15.0 + NOISE_S
WORDS = ("one", "two", "three")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), "every-death") as site:
        yield site


def one_at_a_time(gate: Gate, tally: Tally) -> Callable[[serve.ServeRequest], str]:
    def handle(request: serve.ServeRequest) -> str:
        tally.note(f"{os.getpid()} {request.data}")
        gate.pass_through(request.data)
        return f"done {request.data}"

    return handle


def state_of(url: str, id: str) -> str:
    """Its status, or what the proxy answers instead."""
    try:
        answer = httpx.get(f"{url}/-/futures/{id}")
    except httpx.TransportError as error:
        return repr(error)
    return str(answer.json()["status"]) if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"


def test_jobs_that_run_and_wait_outlive_the_death_of_everything_in_turn(site: Site, gate: Gate, tally: Tally) -> None:
    site.client.create_backend("b", one_at_a_time(gate, tally), config={"max_concurrent_queries": 1})
    site.client.create_endpoint("b", backend="b", route="/b", methods=("POST",))
    first, other = site.urls
    ids = {word: accepted(f"{first}/b", word) for word in WORDS}
    wait_until(lambda: gate.came == 1)

    def check_one_runs_and_another_waits() -> None:
        """The third one is said to run from the death of its replica on, until it runs again."""

        def states() -> set[str]:
            return {state_of(other, id) for id in ids.values()}

        wait_until(lambda: states() == {"running", "queued"}, told=states)
        assert not any(job.done() for job in map(site.client.job, ids.values()))

    def kill_replica() -> None:
        os.kill(int(tally.lines[-1].split()[0]), signal.SIGKILL)
        wait_until(lambda: len(tally) == 2, AGAIN_WITHIN_S)

    kills: list[Callable[[], None]] = [
        lambda: site.kill_proxy(0),
        kill_replica,
        site.kill_leader,
        lambda: site.kill_server(site.cluster.broker),
        lambda: site.kill_server(site.cluster.store),
    ]
    for kill in kills:
        kill()
        check_one_runs_and_another_waits()
    gate.open()
    for word, id in ids.items():
        answer = httpx.get(f"{other}/-/futures/{id}/result?wait=60", timeout=90)
        assert (answer.status_code, answer.text) == (200, f"done {word}"), answer.text
    runs = Counter(line.split()[1] for line in tally.lines)
    assert set(runs) == set(WORDS) and runs.total() == len(WORDS) + 1, f"only the run whose replica was killed came again: {tally}"


def accepted(url: str, data: Any) -> str:
    answer = httpx.post(url, json=data, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])
