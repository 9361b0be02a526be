"""The log of a detached instance: one file to which all its processes on this machine write, whichever way, of a bounded size.

Their stdout and stderr are the file, opened to append. So what is bounded is not what a logger writes but what is in the file: each
process looks once a second, and the one that finds the file full puts an empty one in its place; the others follow. A process that
cannot follow (a child that user code left behind) goes on writing to the old file. Old files are cut, and the oldest is emptied and used
again rather than removed: a removed file would grow on, unseen, as long as somebody has it open.
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
FILES = 5  # the current one is the first
_OUTPUTS = (1, 2)
_LOOK_EVERY_S = 1.0
_LOCK_BUDGET_S = 2.0
_in_this_process = forks.Lock()
_CUT = b"\n(the rest of this file was cut, since it was too long)\n"

Identity = tuple[int, int]


def detached_log(namespace: str) -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mqserve" / f"{namespace}.log"


def open_log(path: Path) -> int:
    """A descriptor that appends to it. It is its owner's alone, as is its folder where that is made here: it holds tracebacks with what
    clients sent. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):  # or it might be a file that is being put away
        return _append_to(path)


def tend_log(path: Path) -> None:
    """Keeps this process's outputs in the file that is the current one, and the files at their size, in a thread of its own."""
    tended = TendedLog(path, _OUTPUTS)
    if tended.outputs:
        threading.Thread(target=tended.tend_forever, name="tend the log", daemon=True).start()


class TendedLog:
    """One process's part in keeping the file and its older ones, `<path>.1` to `.4`. `outputs`: its descriptors, of which it touches those
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
            with suppress(OSError):  # a full disk, a folder that is gone: there may be another one later
                self.tend()

    def tend(self) -> None:
        """Raises OSError."""
        if self._is_in_order():
            return
        with _locked(self._path) as is_locked:
            if is_locked:  # else the next look does it
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
        """Whoever is killed in here leaves files that the next one goes on with."""
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
        """Outputs that are not what they were are the user code's, from then on."""
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
    os.fchmod(fd, 0o600)  # of one that an earlier version made
    return fd


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else does this now. Among processes by a lock that no forked child inherits, as it would one of `flock`."""
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
