"""The cache of code on this machine. It has one folder for each manifest, the entry, named by the manifest's hash.

<sha256>/         the entry: `.manifest`, and a folder 0, 1, … for each folder of the manifest
<sha256>.lock     processes that use the entry hold a shared lock; removing it takes the exclusive one
<sha256>.making   the process that makes or repairs the entry holds an exclusive lock
.new-*, .old-*    folders on their way to become an entry, or to be removed
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import BadEnvelope, BadValue
from .manifest import File, Folder, Manifest

UNUSED_AFTER_S = 24 * 3600.0
_MANIFEST = ".manifest"
_NAME = re.compile("[0-9a-f]{64}")
_RETRY_S = 0.05


def cache_folder() -> Path:
    """Returns the cache's folder, and makes it if need be. Only this user may write there, since replicas run what lies there. Raises
    BadValue if MQSERVE_CODE_CACHE names a folder that cannot be used."""
    if chosen := os.environ.get("MQSERVE_CODE_CACHE"):
        folder = Path(chosen).absolute() / "mqserve-code"  # what lies beside it is not ours to remove
        if why := _make_private(folder):
            raise BadValue(f"MQSERVE_CODE_CACHE is {chosen}, and {why}: name a folder that this user may write, or unset it")
        return folder
    for folder in _usual_folders():
        if not _make_private(folder):
            return folder
    return _folder_of_this_process()


def _usual_folders() -> Iterator[Path]:
    with suppress(RuntimeError):  # this user has no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqserve" / "code"
    yield Path(tempfile.gettempdir()) / f"mqserve-code-{os.getuid()}"


@functools.cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="mqserve-code-"))


def _make_private(folder: Path) -> str:
    """Makes the folder. Returns why it cannot be used, or ''."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            return f"{folder} is a link, which another user may have made"
        if facts.st_uid != os.getuid():
            return f"{folder} belongs to another user"
        if facts.st_mode & 0o022:
            folder.chmod(0o700)
        return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"


class Place(NamedTuple):
    """Where a file of a manifest belongs on this machine."""

    folder: Folder
    file: File
    path: Path


def places_in(entry: Path, manifest: Manifest) -> list[Place]:
    roots = roots_in(entry, manifest)
    return [Place(folder, file, root / file.path) for root, folder in zip(roots, manifest.folders, strict=True) for file in folder.files]


def roots_in(entry: Path, manifest: Manifest) -> tuple[Path, ...]:
    return tuple(entry / str(number) for number in range(len(manifest.folders)))


class Entry:
    """The folder of one manifest."""

    def __init__(self, cache: Path, sha256: str) -> None:
        """Raises BadEnvelope for what is no hash."""
        if not _NAME.fullmatch(sha256):
            raise BadEnvelope(f"{sha256!r} is not the hash of a list of files: deploy the code again")
        self.sha256 = sha256
        self.folder = cache / sha256
        self._lock = cache / f"{sha256}.lock"
        self._making = cache / f"{sha256}.making"

    def __repr__(self) -> str:
        return f"<Entry {self.folder}, {'missing' if self.manifest() is None else 'made'}>"

    def manifest(self) -> Manifest | None:
        """Returns None if the entry is missing, or its manifest is not the one that was deployed."""
        try:
            raw = (self.folder / _MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Manifest.from_bytes(raw) if hashlib.sha256(raw).hexdigest() == self.sha256 else None

    def roots(self, manifest: Manifest) -> tuple[Path, ...]:
        return roots_in(self.folder, manifest)

    def check(self) -> tuple[Manifest | None, list[Place]]:
        """Returns the manifest and the files that are not what was deployed. It hashes each file: 100 MiB take about 0.1 s."""
        manifest = self.manifest()
        if manifest is None:
            return None, []
        return manifest, [place for place in places_in(self.folder, manifest) if not place.file.is_at(place.path)]

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

    @asynccontextmanager
    async def only_maker(self) -> AsyncIterator[None]:
        """Waits until no other process makes or repairs the entry, so that replicas that start together read the store once."""
        held = os.open(self._making, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(held):
                await asyncio.sleep(_RETRY_S)
            yield
        finally:
            os.close(held)

    @contextmanager
    def new_folder(self, raw_manifest: bytes) -> Iterator[Path]:
        """Yields an empty folder, which becomes the entry at the end, in the place of a damaged one."""
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder.parent))
        try:
            yield made
            (made / _MANIFEST).write_bytes(raw_manifest)
            if self.folder.exists():
                _remove_folder(self.folder)
            made.rename(self.folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _try_lock(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_unused(cache: Path) -> None:
    """Removes entries that no process has started to use for a day, and what killed processes left half made."""
    old = time.time() - UNUSED_AFTER_S
    for path in list(cache.iterdir()):
        with suppress(OSError):
            if path.lstat().st_mtime > old:
                continue
            if path.name.startswith((".new-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".lock" and _NAME.fullmatch(path.stem):
                _remove_entry(path)


def _remove_entry(lock: Path) -> None:
    held = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry = lock.with_suffix("")
        if entry.exists():
            _remove_folder(entry)
        entry.with_suffix(".making").unlink(missing_ok=True)
        lock.unlink()
    finally:
        os.close(held)


def _remove_folder(folder: Path) -> None:
    """Renames it first: a process that is killed while it removes leaves no entry with half of its files."""
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
