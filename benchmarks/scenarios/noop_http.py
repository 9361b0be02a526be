"""A handler that does nothing, over HTTP: what the path of a request costs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..peers import PEERS
from ..scenario import Claim, Measure, Sample, warmed
from ..subjects import Subject

PATHS = {"async": "async_noop", "def": "noop"}
CLIENTS = {"1 client": 1, "16 clients": 16, "64 clients": 64, "256 clients": 256}
CLIENTS_OF_PEERS = ("1 client", "64 clients")  # a full run is long enough
WARM_UP_S = 1.0


class NoopHttp:
    name = "noop-http"
    title = "No-op over HTTP"
    headline = "per_second"
    baseline = "starlette"
    cases = tuple(f"{kind}, {clients}" for kind in PATHS for clients in CLIENTS)
    claims = (
        Claim("async, 64 clients", "distributed", "per_second", against=("starlette",), at_least=0.40),
        Claim("async, 64 clients", "distributed", "cpu_us", at_most=200),
        Claim("def, 64 clients", "distributed", "per_second", against=("starlette",), at_least=0.38),
        Claim("async, 64 clients", "distributed", "per_second", against=("ray-tuned",), at_least=1.5),
        Claim("async, 64 clients", "distributed", "per_second", against=("ray",), at_least=15),
        Claim("def, 64 clients", "distributed", "per_second", against=("litserve",), at_least=6),
        Claim("async, 1 client", "distributed", "p50_ms", against=("ray-tuned",), at_most=1.3),
        Claim("async, 1 client", "distributed", "p50_ms", against=("ray",), at_most=0.167),
        Claim("async, 64 clients", "embedded", "per_second", against=("starlette",), at_least=0.62),
        Claim("def, 64 clients", "embedded", "per_second", against=("starlette",), at_least=0.52),
    )

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {subject.name: self._measure(subject, bench) for subject in bench.http_subjects("noop", stack)}

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        """Async handlers are compared with bare Starlette's async one, plain ones with both of Starlette's."""
        peer = PEERS.get(subject.name)
        body = "empty" if peer and peer.posts else ""
        without_async = subject.name == "starlette-def" or (peer is not None and not peer.has_async)

        def measure(case: str) -> Sample | None:
            kind, _, clients = case.partition(", ")
            if (kind == "async" and without_async) or (peer is not None and clients not in CLIENTS_OF_PEERS):
                return None
            return closed_loop(subject, PATHS[kind], CLIENTS[clients], bench.seconds, body)

        paths = [PATHS["def"]] if without_async else PATHS.values()
        return warmed(measure, lambda: [closed_loop(subject, path, 16, WARM_UP_S, body) for path in paths])


NOOP_HTTP = NoopHttp()
