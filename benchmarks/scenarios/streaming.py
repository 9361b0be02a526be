"""Answers that flow, over HTTP: 1,000 chunks of 32 bytes as fast as the handler yields them, and a chunk every 5 ms, which says how late it
comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from ..bench import Bench
from ..cpu import spent_us
from ..peers import PEERS
from ..scenario import Claim, Measure, Sample, warmed
from ..subjects import PROGRAMS, Subject, SubjectFailed

PATHS = {"async": "async_fast", "def": "fast", "async, every 5 ms": "async_paced"}
STREAMS = {"1 stream": 1, "64 streams": 64}
RIVALS = ("ray", "litserve")
WARM_UP_S = 0.5


class Streaming:
    """A request of its CPU figures is one chunk."""

    name = "streaming"
    title = "Streams of 1,000 small chunks over HTTP (a request is one chunk)"
    headline = "chunks_per_second"
    baseline = "starlette"
    cases = tuple(f"{kind}, {streams}" for kind in PATHS for streams in STREAMS)
    claims = tuple(
        claim
        for streams in STREAMS
        for rival in RIVALS
        for claim in (
            Claim(f"async, {streams}", "distributed", "chunks_per_second", against=(rival,), at_least=1.0),
            Claim(f"def, {streams}", "distributed", "chunks_per_second", against=(rival,), at_least=1.0),
            Claim(f"async, every 5 ms, {streams}", "distributed", "first_p50_ms", against=(rival,), at_most=1.0),
        )
    )

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {subject.name: self._measure(subject, bench) for subject in bench.http_subjects("streaming", stack)}

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        peer = PEERS.get(subject.name)
        method = "POST" if peer and peer.posts else "GET"

        def measure(case: str) -> Sample:
            kind, _, streams = case.rpartition(", ")
            return streamed(subject, PATHS[kind], method, STREAMS[streams], bench.seconds)

        return warmed(measure, lambda: [streamed(subject, path, method, 8, WARM_UP_S) for path in PATHS.values()])


def streamed(subject: Subject, path: str, method: str, clients: int, seconds: float) -> Sample:
    """Measures one run of a load generator in a process of its own. Raises SubjectFailed if a stream broke off."""
    command = [sys.executable, str(PROGRAMS / "stream_load.py"), f"{subject.url}/{path}", method, str(clients), str(seconds)]
    with subject.taking_its_turn():
        before = subject.cpu_s()
        told = subprocess.run(command, capture_output=True, text=True)
        after = subject.cpu_s()
    if told.returncode:
        raise SubjectFailed(told.stderr.strip())
    report = json.loads(told.stdout)
    if report["failed"] or not report["streams"]:
        raise SubjectFailed(f"{report['failed']} streams of /{path} broke off, and {report['streams']} were whole")
    chunks = report["all_chunks"]
    values = {"chunks_per_second": report["chunks"] / seconds}
    values |= {f"first_p{percent}_ms": percentile_ms(report["first_s"], percent) for percent in (50, 99)}
    if late_s := report["late_s"]:
        values |= {f"late_p{percent}_ms": percentile_ms(late_s, percent) for percent in (50, 99)}
    return Sample(values, spent_us(before, after, chunks) | {"load": report["cpu_s"] / chunks * 1e6})


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000


STREAMING = Streaming()
