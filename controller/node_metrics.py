"""The metrics page of a node, with the metrics of all its replicas, which leave them in files (prometheus_client's multiprocess mode).
Each replica has a folder of its own in the node's, where the processes that it forks and starts leave theirs too.

A node that is killed leaves its folder behind. So the folder holds a lock file, which the node and its replicas keep locked through a
shared descriptor for as long as any of them lives; a node that finds it unlocked removes the folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil
from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from ..broker.errors import BadValue
from ..broker.process.loopback import is_loopback, names_loopback

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX, _LOCK = "mqserve-metrics-", "lock"


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """The folder of the metrics files and the address of the page. `lock` is a descriptor that the replicas have to hold, too."""

    folder: str
    url: str
    lock: int

    def make_folder(self, replica_id: str) -> str:
        """Makes the folder for a replica's metrics files and returns its path."""
        path = self._folder_of(replica_id)
        path.mkdir(parents=True, exist_ok=True)  # somebody may have removed the parent
        return str(path)

    def forget(self, replica_id: str) -> None:
        """Removes the metrics files of an ended replica and its processes; otherwise every scrape would read them for ever."""
        shutil.rmtree(self._folder_of(replica_id), ignore_errors=True)

    def _folder_of(self, replica_id: str) -> Path:
        return Path(self.folder) / quote(replica_id, safe="")


class _Collector(MultiProcessCollector):
    """Collects the files in the folders of all replicas."""

    def __init__(self, registry: CollectorRegistry, folder: str) -> None:
        super().__init__(registry, path=folder)  # type: ignore[no-untyped-call]
        self._folder = Path(folder)

    def collect(self) -> Any:
        while True:
            with suppress(FileNotFoundError):  # a replica ended meanwhile
                return self.merge([str(path) for path in self._folder.glob("*/*.db") if _is_counted(path)])  # type: ignore[no-untyped-call]


def _is_counted(path: Path) -> bool:
    """Whether a metrics file counts. Counters of an ended process stay, or totals would fall; its live gauges do not, and their file is
    removed."""
    pid = path.stem.rpartition("_")[2]
    if not path.name.startswith("gauge_live") or not pid.isdigit() or psutil.pid_exists(int(pid)):
        return True
    path.unlink(missing_ok=True)
    return False


@contextmanager
def serve_metrics(host: str, port: int) -> Iterator[NodeMetrics]:
    """Serves the page inside the block; port 0 takes any free one. Raises BadValue if the address cannot be bound."""
    _remove_abandoned()
    with _own_folder() as (folder, lock):
        registry = CollectorRegistry()
        _Collector(registry, folder)
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise BadValue(
                f"cannot serve metrics on {host}:{port} ({error.strerror}): choose another --metrics-port, or 0 for any free one"
            ) from error
        if is_loopback(host) or host == "localhost":
            server.set_app(_for_this_machine(make_wsgi_app(registry)))
        try:
            yield NodeMetrics(folder, f"http://{host}:{server.server_port}/metrics", lock)
        finally:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)


@contextmanager
def _own_folder() -> Iterator[tuple[str, int]]:
    """Yields a folder and its lock, and removes the folder on exit."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    lock = os.open(f"{folder}/new-{_LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with suppress(OSError):  # a file system without locks: nobody finds the lock, so nobody removes the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(f"{folder}/new-{_LOCK}", f"{folder}/{_LOCK}")  # renamed once it is locked, so that nobody sees the lock file unlocked
        yield folder, lock
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _remove_abandoned()


def _remove_abandoned() -> None:
    """Removes the folders of killed nodes once their last replica has ended."""
    with suppress(OSError):  # the folder may not be readable
        for path in Path(tempfile.gettempdir()).iterdir():
            if path.name.startswith(_PREFIX):
                _remove_if_abandoned(path)


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):  # it has no lock, or a process holds the lock, or another one was faster
        if folder.lstat().st_uid != os.getuid():
            return
        lock = os.open(folder / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed %s, which a node that was killed had left behind", folder)
        finally:
            os.close(lock)


def _for_this_machine(page: WSGIApplication) -> WSGIApplication:
    """Checks the Host header of a page that listens on loopback only, so that a site whose name resolves to this machine cannot read it
    (DNS rebinding)."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if names_loopback(environ.get("HTTP_HOST", "")):
            return page(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"these metrics are served on loopback: ask by a loopback address, or set --metrics-host\n"]

    return guarded
