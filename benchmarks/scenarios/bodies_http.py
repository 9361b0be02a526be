"""Bodies over HTTP: 10 KB of JSON that the handler answers with, and 1 MB of which it answers the length."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..peers import PEERS
from ..scenario import Claim, Measure, Sample, warmed
from ..subjects import Subject

JSON, MEGABYTE = "10 KB of JSON and back, 64 clients", "1 MB, 16 clients"


class BodiesHttp:
    name = "bodies-http"
    title = "Bodies over HTTP"
    headline = "per_second"
    baseline = "starlette"
    cases = (JSON, MEGABYTE)
    claims = (Claim(MEGABYTE, "distributed", "per_second", against=("ray-tuned",), at_least=1.0),)

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {subject.name: self._measure(subject, bench) for subject in bench.http_subjects("bodies", stack)}

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        peer = PEERS.get(subject.name)
        megabyte = "text" if peer and peer.posts else "octets"  # those that take JSON alone get it as a string in JSON

        def measure(case: str) -> Sample:
            if case == JSON:
                return closed_loop(subject, "json", 64, bench.seconds, "json")
            return closed_loop(subject, "length", 16, bench.seconds, megabyte)

        return warmed(measure, lambda: [measure(case) for case in self.cases])


BODIES_HTTP = BodiesHttp()
