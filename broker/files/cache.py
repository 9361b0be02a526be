"""The cache of code on this machine: one folder for each manifest, named by the manifest's hash."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNUSED_AFTER_S = 24 * 3600.0
MANIFEST = ".manifest"


def cache_folder() -> Path:
    """Returns the cache's folder, and makes it if need be. Only this user may write there, since what lies there is run by replicas."""
    for folder in _candidates():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            facts = folder.stat()
            if facts.st_uid == os.getuid() and os.access(folder, os.W_OK):
                if facts.st_mode & 0o022:
                    folder.chmod(0o700)
                return folder
    return Path(tempfile.mkdtemp(prefix="mqserve-code-"))  # another user has the usual name


def _candidates() -> Iterator[Path]:
    if chosen := os.environ.get("MQSERVE_CODE_CACHE"):
        yield Path(chosen)
        return
    with suppress(RuntimeError):  # this user has no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqserve" / "code"
    yield Path(tempfile.gettempdir()) / f"mqserve-code-{os.getuid()}"


class Entry:
    """The folder of one manifest. Each process that uses it holds a shared file lock, and whoever removes it needs the exclusive one."""

    def __init__(self, cache: Path, sha256: str) -> None:
        self._lock = cache / f"{sha256}.lock"
        self.folder = cache / sha256

    def __repr__(self) -> str:
        return f"<Entry {self.folder}, {'whole' if self.is_whole else 'missing'}>"

    @property
    def is_whole(self) -> bool:
        """The folder gets its name when it is complete."""
        return (self.folder / MANIFEST).exists()

    def use(self) -> None:
        """Takes the shared lock, until this process and its forked children have ended."""
        while True:
            held = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.stat(self._lock).st_ino == os.fstat(held).st_ino:  # nobody removed it in between
                    os.utime(self._lock)
                    return
            os.close(held)

    @contextmanager
    def making(self) -> Iterator[Path]:
        """Yields an empty folder, which is renamed to this entry at the end. If another process was faster, its folder stays: both have the
        same content."""
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder.parent))
        try:
            yield made
            with suppress(OSError):  # it is there by now
                made.rename(self.folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def remove_unused(cache: Path) -> None:
    """Removes entries that no process has started to use for a day, and what killed processes left half made."""
    old = time.time() - UNUSED_AFTER_S
    for path in cache.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime > old:
                continue
            if path.name.startswith(".new-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".lock":
                _remove(path)


def _remove(lock: Path) -> None:
    held = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
    finally:
        os.close(held)
