"""A node's metrics page: those of all its replicas, which leave them in files of one folder (prometheus_client's multiprocess mode)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from ..broker.errors import BadValue

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """Where the replicas write and where people read."""

    folder: str
    url: str

    def forget(self, pid: int) -> None:
        """Those of a replica that ended: its files would be read at every scrape for ever."""
        for path in Path(self.folder).glob(f"*_{pid}.db"):
            path.unlink(missing_ok=True)


@contextmanager
def serve_metrics(host: str, port: int) -> Iterator[NodeMetrics]:
    """The page is up inside the block; port 0 takes any free one. Raises BadValue when the address cannot be had."""
    folder = tempfile.mkdtemp(prefix="mqserve-metrics-")
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    try:
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise BadValue(
                f"cannot serve metrics on {host}:{port} ({error.strerror}): choose another --metrics-port, or 0 for any free one"
            ) from error
        yield NodeMetrics(folder, f"http://{host}:{server.server_port}/metrics")
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
