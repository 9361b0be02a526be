"""A lock file for each of the three processes of a detached instance on one machine: supervisor, controller, node."""

from __future__ import annotations

import asyncio
import fcntl
import os
from enum import Enum
from pathlib import Path
from typing import Self

from ..broker.errors import InstanceError
from ..controller.detached_log import detached_log

LOOK_EVERY_S = 0.1


class Role(Enum):
    SUPERVISOR = "supervisor"
    CONTROLLER = "controller"
    NODE = "node"


class RoleLock:
    """The lock of one role, held by the process in that role. The kernel releases it when that process ends, in any way.

    A flock belongs to the open file, not to the process. So a process that starts another takes the lock first and passes the open file
    on.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path

    def __repr__(self) -> str:
        return f"<RoleLock {self._path.name}>"

    @classmethod
    def open(cls, namespace: str, instance: str, role: Role) -> Self:
        """Opens the lock file without taking the lock. Raises InstanceError if the file cannot be made."""
        path = _path_of(namespace, instance, role)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), path)
        except OSError as error:
            raise _no_place(path, error) from error

    @classmethod
    def handed_on(cls, fd: int, namespace: str, instance: str, role: Role) -> Self:
        """Wraps the lock that this process inherited from its starter; children of this process do not inherit it."""
        os.set_inheritable(fd, False)
        return cls(fd, _path_of(namespace, instance, role))

    def take(self) -> bool:
        """Tries to take the lock; returns whether it is ours."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # the file system has no such locks
            raise _no_place(self._path, error) from error
        return True

    async def taken(self) -> None:
        """Returns once the lock is ours, which means that no process has the role any more."""
        while not self.take():
            await asyncio.sleep(LOOK_EVERY_S)

    def write(self, word: bytes) -> None:
        """Leaves a word in the file for the next holder."""
        os.truncate(self.fd, 0)
        os.pwrite(self.fd, word, 0)

    def read(self) -> bytes:
        return os.pread(self.fd, 100, 0)

    def close(self) -> None:
        """Releases the lock, unless another process got it too. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Removes the file, because the role is over for good."""
        self._path.unlink(missing_ok=True)


def _path_of(namespace: str, instance: str, role: Role) -> Path:
    return detached_log(namespace).with_name(f"{namespace}.{instance}.{role.value}.lock")


def _no_place(path: Path, error: OSError) -> InstanceError:
    return InstanceError(
        f"a detached instance needs a folder for its locks, and {path.parent} cannot be used ({error.strerror}): "
        "set XDG_STATE_HOME to a folder that this user can write"
    )


def check_folder(namespace: str) -> None:
    """Raises InstanceError if no lock file can be made."""
    lock = RoleLock.open(namespace, "none", Role.SUPERVISOR)
    try:
        lock.take()
        lock.remove()
    finally:
        lock.close()


def played_here(namespace: str) -> list[str]:
    """Returns the roles of the namespace's instances that processes on this machine have, without asking any server."""
    places = [(role, path) for role in Role for path in detached_log(namespace).parent.glob(f"{namespace}.*.{role.value}.lock")]
    return [role.value for role, path in places if is_played(namespace, path.name.split(".")[1], role)]


def is_played(namespace: str, instance: str, role: Role) -> bool:
    """Whether a process on this machine holds the lock."""
    if not _path_of(namespace, instance, role).exists():
        return False
    lock = RoleLock.open(namespace, instance, role)
    try:
        return not lock.take()
    finally:
        lock.close()
