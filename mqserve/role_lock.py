"""Who plays which part of a detached instance on this machine: one lock for each of the three processes that keep each other."""

from __future__ import annotations

import asyncio
import fcntl
import os
from enum import Enum
from pathlib import Path
from typing import Self

from .broker.errors import InstanceError
from .controller.processes import detached_log

LOOK_EVERY_S = 0.1


class Role(Enum):
    SUPERVISOR = "supervisor"
    CONTROLLER = "controller"
    NODE = "node"


class RoleLock:
    """Held by the process that plays the role; the kernel lets it go when that ends, however it ends.

    A flock is the open file's and not the process's. So whoever is to start the process takes the lock first and hands the file on to it.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path

    def __repr__(self) -> str:
        return f"<RoleLock {self._path.name}>"

    @classmethod
    def open(cls, namespace: str, instance: str, role: Role) -> Self:
        """Not taken yet. Raises InstanceError where it cannot be made."""
        path = _path_of(namespace, instance, role)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), path)
        except OSError as error:
            raise InstanceError(
                f"a detached instance needs a folder for its locks, and {path.parent} is none ({error.strerror}): "
                "set XDG_STATE_HOME to a folder that this user can write"
            ) from error

    @classmethod
    def handed_on(cls, fd: int, namespace: str, instance: str, role: Role) -> Self:
        """The one that this process was started with; no child of its own is to have it."""
        os.set_inheritable(fd, False)
        return cls(fd, _path_of(namespace, instance, role))

    def take(self) -> bool:
        """Whether it is ours now."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def taken(self) -> None:
        """Returns once it is ours: nobody plays the role any more."""
        while not self.take():
            await asyncio.sleep(LOOK_EVERY_S)

    def write(self, word: bytes) -> None:
        """For whoever has it next."""
        os.truncate(self.fd, 0)
        os.pwrite(self.fd, word, 0)

    def read(self) -> bytes:
        return os.pread(self.fd, 100, 0)

    def close(self) -> None:
        """Lets it go, unless it was handed on."""
        os.close(self.fd)

    def remove(self) -> None:
        """The role is over for good."""
        self._path.unlink(missing_ok=True)


def _path_of(namespace: str, instance: str, role: Role) -> Path:
    return detached_log(namespace).with_name(f"{namespace}.{instance}.{role.value}.lock")


def is_played(namespace: str, instance: str, role: Role) -> bool:
    """Whether a process on this machine has the lock."""
    if not _path_of(namespace, instance, role).exists():
        return False
    lock = RoleLock.open(namespace, instance, role)
    try:
        return not lock.take()
    finally:
        lock.close()
