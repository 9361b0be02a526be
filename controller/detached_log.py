"""The log of a detached instance: one file of bounded size to which all its processes on this machine write.

stdout and stderr of these processes are the file, opened to append. So the limit applies to everything in the file, not only to what
loggers write: each process checks the file once a second; the one that finds it full puts an empty one in its place, and the others
follow. A process that cannot follow (a child that user code left behind) goes on writing to the old file. So old files are truncated, and
the oldest is emptied and reused rather than removed: a removed file would grow unseen as long as a process has it open.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..broker.process import forks

PATH_VARIABLE = "MQSERVE_LOG_FILE"
FILE_BYTES = 10 * 1024 * 1024
FILES = 5  # the current file and four older ones
_OUTPUTS = (1, 2)
_LOOK_EVERY_S = 1.0
_LOCK_BUDGET_S = 2.0
_in_this_process = forks.Lock()
_CUT = b"\n(the rest of this file was cut, since it was too long)\n"

Identity = tuple[int, int]


def detached_log(namespace: str) -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mqserve" / f"{namespace}.log"


def open_log(path: Path) -> int:
    """Returns a descriptor that appends to the file. The file, and its folder if it is created here, are readable by the owner only,
    since the log holds tracebacks with clients' data. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):  # under the lock, so that the file is not being rotated away
        return _append_to(path)


def tend_log(path: Path) -> None:
    """Keeps this process's outputs in the current file, and the files at their size, in a thread of its own."""
    tended = TendedLog(path, _OUTPUTS)
    if tended.outputs:
        threading.Thread(target=tended.tend_forever, name="tend the log", daemon=True).start()


class TendedLog:
    """One process's part in keeping the file and its older ones, `<path>.1` to `.4`. `outputs` are its descriptors; it touches only those
    that are the file."""

    def __init__(self, path: Path, outputs: tuple[int, ...], *, file_bytes: int = FILE_BYTES, files: int = FILES) -> None:
        self._path = path
        self._older = [path.with_name(f"{path.name}.{number}") for number in range(1, files)]
        self._file_bytes = file_bytes
        mine = {_identity(file) for file in (path, *self._older)} - {None}
        self._outputs = {fd: _identity(fd) for fd in outputs if _identity(fd) in mine}

    def __repr__(self) -> str:
        return f"<TendedLog {self._path}, outputs {self.outputs}>"

    @property
    def outputs(self) -> list[int]:
        return sorted(self._outputs)

    def tend_forever(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_S)
            with suppress(OSError):  # a full disk or a missing folder may be mended later
                self.tend()

    def tend(self) -> None:
        """Rotates, truncates and follows where due. Raises OSError."""
        if self._is_in_order():
            return
        with _locked(self._path) as is_locked:
            if is_locked:  # else another process does it now, or the next call
                if _size(self._path) > self._file_bytes:
                    self._rotate()
                for file in self._older:
                    if _size(file) > 2 * self._file_bytes:
                        self._cut(file)
                self._follow()

    def _is_in_order(self) -> bool:
        current = _identity(self._path)
        follows = all(identity == current for identity in self._outputs.values())
        return follows and _size(self._path) <= self._file_bytes and all(_size(file) <= 2 * self._file_bytes for file in self._older)

    def _rotate(self) -> None:
        """A process that is killed in the middle leaves files that the next rotation can continue with."""
        empty = self._path.with_name(f"{self._path.name}.next")
        if self._older[-1].exists() and not empty.exists():
            self._older[-1].rename(empty)
        os.close(_append_to(empty))
        os.truncate(empty, 0)
        for older, younger in zip(self._older[::-1], [*self._older[-2::-1], self._path], strict=True):
            with suppress(FileNotFoundError):
                younger.rename(older)
        empty.rename(self._path)

    def _cut(self, file: Path) -> None:
        os.truncate(file, self._file_bytes)
        fd = _append_to(file)
        try:
            os.write(fd, _CUT)
        finally:
            os.close(fd)

    def _follow(self) -> None:
        """Moves our outputs to the current file. An output that user code has redirected meanwhile is left alone from now on."""
        fd = _append_to(self._path)
        try:
            self._outputs = {output: known for output, known in self._outputs.items() if _identity(output) == known}
            for output in self._outputs:
                os.dup2(fd, output)
                self._outputs[output] = _identity(fd)
        finally:
            os.close(fd)


def _append_to(path: Path) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # an earlier version may have created it with other rights
    return fd


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Takes the rotation lock; yields whether it was free. It is a POSIX record lock, since a forked child would inherit one of `flock`."""
    until = time.monotonic() + _LOCK_BUDGET_S
    with _in_this_process:
        fd = _append_to(path.with_name(f"{path.name}.lock"))
        try:
            while not (is_locked := _try_lock(fd)) and time.monotonic() < until:
                time.sleep(0.01)
            yield is_locked
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    with suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _identity(file: Path | int) -> Identity | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
