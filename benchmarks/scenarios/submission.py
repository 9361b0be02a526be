"""Jobs as they are sent, persistent and confirmed: mqserve by HTTP and by handle beside Celery's `apply_async` with `confirm_publish`.

A submission ends when RabbitMQ has confirmed the message; mqserve's has its record in Redis by then, too. One replica, or one worker, runs
the jobs meanwhile, and what it has not run by the end of a sample is waited for before the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from ..backlog import drained
from ..bench import Bench
from ..calls import Caller, calling
from ..closed_loop import closed_loop
from ..peers import FOLDER, PEERS, running_worker
from ..scenario import Claim, Measure, Sample, warmed
from ..subjects import PROGRAMS, Servers, Subject, running_mqserve

IN_FLIGHT = {"1 under way": 1, "64 under way": 64, "256 under way": 256}
BUSY = "256 under way"
WARM_UP_S = 1.0
MQSERVE_SUBMISSIONS = (sys.executable, str(PROGRAMS / "submissions.py"))
CELERY = PEERS["celery"]
CELERY_QUEUE = "peer-celery"  # of its server.py


class Submission:
    name = "submission"
    title = "Submissions of jobs, persistent and confirmed"
    headline = "per_second"
    baseline = "celery"
    cases = tuple(IN_FLIGHT)
    claims = tuple(Claim(BUSY, subject, "per_second", against=("celery",), at_least=5) for subject in ("http", "handle"))

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        for subject in bench.started("http", running_mqserve("distributed", bench.servers), stack):
            queue = f"{subject.env['MQSERVE_NAMESPACE']}.jobs.noop.1"
            measures["http"] = _measure(bench, queue, partial(_by_http, subject))
            for caller in bench.started("handle", calling(MQSERVE_SUBMISSIONS, subject.env, subject), stack):
                measures["handle"] = _measure(bench, queue, partial(_by_call, caller))
        if CELERY.name in bench.peers:
            for caller in bench.started(CELERY.name, _celery(bench.servers), stack):
                measures[CELERY.name] = _measure(bench, CELERY_QUEUE, partial(_by_call, caller))
        return measures


def _by_http(subject: Subject, case: str, seconds: float) -> Sample:
    return closed_loop(subject, "noop", IN_FLIGHT[case], seconds, "job")


def _by_call(caller: Caller, case: str, seconds: float) -> Sample:
    in_flight = IN_FLIGHT[case]
    return caller.measure("sync" if in_flight == 1 else "async", in_flight, seconds)


def _measure(bench: Bench, queue: str, submit: Callable[[str, float], Sample]) -> Measure:
    def measured(case: str, seconds: float) -> Sample:
        sample = submit(case, seconds)
        drained(bench.servers, queue)
        return sample

    return warmed(lambda case: measured(case, bench.seconds), lambda: measured(BUSY, WARM_UP_S))


@contextmanager
def _celery(servers: Servers) -> Iterator[Caller]:
    command = [str(CELERY.python), "submissions.py"]
    with running_worker(CELERY, servers) as worker, calling(command, worker.env, worker, cwd=FOLDER / CELERY.folder) as caller:
        yield caller


SUBMISSION = Submission()
