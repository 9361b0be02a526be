"""A node's metrics page: those of all its replicas, which leave them in files of one folder (prometheus_client's multiprocess mode)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from ..broker.errors import BadValue
from ..broker.loopback import is_loopback, names_loopback

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

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
        if is_loopback(host) or host == "localhost":
            server.set_app(_for_this_machine(make_wsgi_app(registry)))
        yield NodeMetrics(folder, f"http://{host}:{server.server_port}/metrics")
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _for_this_machine(page: WSGIApplication) -> WSGIApplication:
    """A page that listens on loopback only is not read by a site whose name was made to resolve to it (DNS rebinding)."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if names_loopback(environ.get("HTTP_HOST", "")):
            return page(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"these metrics are served on loopback: ask by a loopback address, or set --metrics-host\n"]

    return guarded
