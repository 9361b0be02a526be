"""Large results of jobs as files, in a folder that all processes of an instance share: `MQSERVE_RESULT_STORE=file:///…`.

The store has the result, with the size and the SHA-256 of its body instead of the body. The file's name is made of these and of a hash of
the id, so no reference leads out of the folder, and runs that end differently have files of their own. A file is complete once it has its
name. The time of its last change is set to when it expires, and the leading controller removes what has expired.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from .errors import BadValue, MQServeError, ResultGone
from .process.daemon_threads import in_daemon_thread
from .results import BodyFile, ResultLimit

MAX_IN_STORE = 8 * 1024 * 1024  # of a job's result: it is kept for hours, and Redis keeps all in memory
MAX_IN_FILE = 1024 * 1024 * 1024
PIECE_BYTES = 256 * 1024  # of a file that is sent on
RECORDED_WITHIN_MS = 3600 * 1000  # a result is recorded by then, if it ever is
_PROBE_BUDGET_S = 5.0
_BUDGET_S = 600.0  # for a file; results of jobs are worth some patience
_AT_ONCE = 8
_UNFINISHED = ".part"
_OURS = re.compile(r"[0-9a-f]{64}-[0-9a-f]{64}|(probe-)?[0-9a-f]+\.part")  # nothing else in the folder is ever removed
_UNFINISHED_FOR_S = 24 * 3600

T = TypeVar("T")

NO_FOLDER_LIMIT = ResultLimit(
    MAX_IN_STORE,
    f"the result of a job has more than {MAX_IN_STORE // 2**20} MiB, and the store keeps no larger one: set MQSERVE_RESULT_STORE to a "
    "folder that all processes of the instance share, or return less, or a reference to it",
)
FOLDER_LIMIT = ResultLimit(
    MAX_IN_FILE, f"the result of a job has more than {MAX_IN_FILE // 2**20} MiB, which is the limit: return less, or a reference to it"
)


class BodyGone(ResultGone):
    """A result whose body is not kept any more."""


class Unreadable(BodyGone):
    """A result whose body this process cannot read."""

    status = 500


class NotWritten(MQServeError):
    """The body of a result cannot be written; the message is for the job's sender."""


class ResultFiles:
    """The files of one namespace; there are none without a folder. Reading and writing is done in threads of their own, since a folder that
    others share may be slow, or hang."""

    def __init__(self, folder: Path | None, namespace: str) -> None:
        self._root = folder
        self._folder = folder / namespace if folder is not None else None
        self._free = asyncio.Semaphore(_AT_ONCE)  # threads

    def __repr__(self) -> str:
        return f"<ResultFiles in {self._folder}>"

    def __bool__(self) -> bool:
        return self._folder is not None

    @property
    def limit(self) -> ResultLimit:
        """Of a job's result."""
        return NO_FOLDER_LIMIT if self._folder is None else FOLDER_LIMIT

    async def trouble(self) -> str:
        """Why no file can be written now, with the mend; empty if one can, or if none is to be."""
        if self._folder is None:
            return ""
        try:
            async with asyncio.timeout(_PROBE_BUDGET_S):
                await self._in_thread(self._probe)
        except OSError as error:
            return (
                f"MQSERVE_RESULT_STORE names {self._root}, where this process cannot write ({_why(error)}): make the folder, and let its "
                f"user write there; jobs with results above {MAX_IN_STORE // 2**20} MiB fail until then"
            )
        return ""

    async def put(self, future_id: str, body: bytes, expires_ms: int) -> BodyFile:
        """Writes the body of a result that expires at that store time. It survives the end of the machine once this returns. Raises
        NotWritten."""
        try:
            return await self._in_thread(self._put, future_id, body, expires_ms)
        except OSError as error:
            raise NotWritten(
                f"the result has {len(body)} bytes, and could not be written to the result store ({_why(error)}): mend that "
                "(MQSERVE_RESULT_STORE), and retry the job"
            ) from error

    async def read(self, future_id: str, file: BodyFile) -> bytes:
        """Raises BodyGone."""
        with _reading(future_id):
            return await self._in_thread(self._read, future_id, file)

    async def open(self, future_id: str, file: BodyFile) -> OpenBody:
        """Returns the body to be read in pieces, after its check. Raises BodyGone."""
        with _reading(future_id):
            return await self._in_thread(self._open, future_id, file)

    async def drop(self, future_id: str, file: BodyFile) -> None:
        """Removes a file, if it is there. What cannot be removed now goes when it has expired."""
        if self._folder is not None:
            with suppress(OSError):
                await self._in_thread(self._path(self._folder, future_id, file).unlink)

    async def sweep(self, now_ms: int) -> int:
        """Removes the files that have expired at that store time, and what others that died were writing. Returns how many there were.
        Raises OSError."""
        return await self._in_thread(self._sweep, now_ms)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Raises TimeoutError, an OSError, for a folder that hangs: a thread is lost to it, and nobody waits for that."""
        async with asyncio.timeout(_BUDGET_S):
            await self._free.acquire()
            return await in_daemon_thread("result files", partial(function, *arguments), on_end=self._free.release)

    def _probe(self) -> None:
        assert self._folder is not None
        self._make_folder()
        probe = self._folder / f"probe-{secrets.token_hex(16)}{_UNFINISHED}"
        probe.write_bytes(b"")
        probe.unlink()

    def _put(self, future_id: str, body: bytes, expires_ms: int) -> BodyFile:
        assert self._folder is not None, "only what the limit allows is kept"
        file = BodyFile(len(body), sha256(body).digest())
        path = self._path(self._folder, future_id, file)
        part = path.with_name(f"{secrets.token_hex(16)}{_UNFINISHED}")
        try:
            self._make_folder()
            self._write(part, path, body, expires_ms / 1000)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        return file

    def _write(self, part: Path, path: Path, body: bytes, expires_s: float) -> None:
        readable_by_group = path.parent.stat().st_mode & 0o040  # whoever shares the folder with others says so by its mode
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as output:
            if readable_by_group:
                os.fchmod(descriptor, 0o640)
            left = memoryview(body)
            while left:
                left = left[output.write(left) :]
            os.utime(descriptor, (time.time(), expires_s))
            os.fsync(descriptor)
        part.replace(path)
        _sync_folder(path.parent)

    def _make_folder(self) -> None:
        """Only that of the namespace: a root that is missing is a disk that is not mounted."""
        assert self._folder is not None
        with suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)

    def _read(self, future_id: str, file: BodyFile) -> bytes:
        with self._opened(future_id, file) as stored:
            body = stored.read(file.size + 1)
        if sha256(body).digest() != file.sha256:
            raise _changed(future_id)
        return body

    def _open(self, future_id: str, file: BodyFile) -> OpenBody:
        stored, digest, left = self._opened(future_id, file), sha256(), file.size
        try:
            while left and (piece := stored.read(min(left, PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            if digest.digest() != file.sha256:
                raise _changed(future_id)
        except BaseException:
            stored.close()
            raise
        return OpenBody(stored, file.size, self._in_thread)

    def _opened(self, future_id: str, file: BodyFile) -> BinaryIO:
        if self._folder is None:
            raise Unreadable(
                f"the result of job {future_id} is a file, and this process was not told where: set MQSERVE_RESULT_STORE as its replicas "
                "have it"
            )
        return open(self._path(self._folder, future_id, file), "rb")

    def _path(self, folder: Path, future_id: str, file: BodyFile) -> Path:
        return folder / f"{sha256(future_id.encode(errors='surrogatepass')).hexdigest()}-{file.sha256.hex()}"

    def _sweep(self, now_ms: int) -> int:
        if self._folder is None:
            return 0
        count, unfinished_before = 0, time.time() - _UNFINISHED_FOR_S
        self._make_folder()
        with os.scandir(self._folder) as entries:
            for entry in filter(lambda one: _OURS.fullmatch(one.name), entries):
                with suppress(FileNotFoundError):  # another one has removed it
                    before = unfinished_before if entry.name.endswith(_UNFINISHED) else now_ms / 1000
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.path)
                        count += 1
        return count


class OpenBody:
    """A body that is read in pieces. Whoever has it closes it, or reads all of it."""

    def __init__(self, stored: BinaryIO, size: int, in_thread: Callable[..., Awaitable[bytes]]) -> None:
        self._stored = stored
        self._in_thread = in_thread
        self.size = size

    def __repr__(self) -> str:
        return f"<OpenBody of {self.size} bytes>"

    async def pieces(self) -> AsyncGenerator[bytes]:
        at, descriptor = 0, self._stored.fileno()
        # pread moves no offset: a cancelled read may come behind the close, and the descriptor be another file's by then
        while at < self.size and (piece := await self._in_thread(os.pread, descriptor, min(self.size - at, PIECE_BYTES), at)):
            at += len(piece)
            yield piece

    def close(self) -> None:
        self._stored.close()


def parse_result_store(text: str) -> Path | None:
    """Returns the folder that the setting names, None without one. Raises BadValue."""
    if not text:
        return None
    url = urlsplit(text)
    path = unquote(url.path)
    if url.scheme != "file" or url.netloc not in ("", "localhost") or not path.startswith("/") or path == "/" or "\0" in path:
        raise BadValue(
            f"MQSERVE_RESULT_STORE is {text!r}, and has to name a folder that all processes of the instance share, such as "
            "file:///mnt/mqserve-results"
        )
    return Path(path)


@contextmanager
def _reading(future_id: str) -> Iterator[None]:
    """Raises BodyGone for what the file system says."""
    try:
        yield
    except FileNotFoundError:
        raise BodyGone(f"the result of job {future_id} is not kept any more: its file is gone from the result store") from None
    except OSError as error:
        raise Unreadable(f"the result of job {future_id} cannot be read from the result store ({_why(error)})") from error


def _why(error: OSError) -> str:
    return error.strerror or "it does not answer"


def _changed(future_id: str) -> Unreadable:
    return Unreadable(f"the file with the result of job {future_id} is not what its replica wrote: it was changed, or is damaged")


def _sync_folder(folder: Path) -> None:
    """Makes a new name last, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


NO_FILES = ResultFiles(None, "")
