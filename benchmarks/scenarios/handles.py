"""Calls from Python with 64 under way: handles of mqserve beside the calls of task queues and RPC on the same RabbitMQ and Redis.

Each peer runs one worker process. Celery's results are for plain code only, Taskiq's and FastStream's for coroutines only: both cases
measure the one way that they have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ..bench import Bench
from ..calls import Caller, calling
from ..peers import CALL_PEERS, FOLDER, Peer, running_worker
from ..scenario import Claim, Measure, Sample, warmed
from ..subjects import PROGRAMS, ROOT, Servers, running_mqserve

IN_FLIGHT = 64
WARM_UP_S = 1.0
MQSERVE_CALLS = (sys.executable, str(PROGRAMS / "calls.py"))
RIVALS = tuple(peer.name for peer in CALL_PEERS)


class Handles:
    name = "handles"
    title = f"Calls from Python, {IN_FLIGHT} under way"
    headline = "per_second"
    baseline = "distributed"
    cases = ("sync", "async")
    claims = tuple(Claim(case, "distributed", "per_second", against=RIVALS, at_least=6) for case in cases)

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        subjects = {"distributed": _distributed(bench.servers), "embedded": calling(MQSERVE_CALLS, {"PYTHONPATH": str(ROOT)}, None)}
        subjects |= {peer.name: _peer(peer, bench.servers) for peer in CALL_PEERS if peer.name in bench.peers}
        for name, subject in subjects.items():
            for caller in bench.started(name, subject, stack):
                measures[name] = self._measure(caller, bench)
        return measures

    def _measure(self, caller: Caller, bench: Bench) -> Measure:
        def measure(case: str) -> Sample:
            return caller.measure(case, IN_FLIGHT, bench.seconds)

        return warmed(measure, lambda: [caller.measure(case, IN_FLIGHT, WARM_UP_S) for case in self.cases])


@contextmanager
def _distributed(servers: Servers) -> Iterator[Caller]:
    with running_mqserve("distributed", servers) as instance, calling(MQSERVE_CALLS, instance.env, instance) as caller:
        yield caller


@contextmanager
def _peer(peer: Peer, servers: Servers) -> Iterator[Caller]:
    command = [str(peer.python), "client.py"]
    with running_worker(peer, servers) as worker, calling(command, worker.env, worker, cwd=FOLDER / peer.folder) as caller:
        yield caller


HANDLES = Handles()
