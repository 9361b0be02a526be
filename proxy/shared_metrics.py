"""The metrics of several proxies that share a port. A scrape reaches any one of them, and shows the sums of all.

Each proxy adds its counts to one file: once a second, before each scrape that it answers, and when it ends. What a scrape has shown is
thus in the file and stays there when its proxy ends, so no sum falls, with two exceptions. A proxy that learns of a deleted route after
the others may show the route again, with what it has counted since. And all sums begin anew should the file be unreadable. The file has
no name: whoever starts the proxies makes it and hands its descriptor on (`broker/process/listener.py`), and nothing is left behind when
all have ended.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import logging
import os
import struct
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from ..broker.errors import MQServeError
from ..broker.latencies import LATENCY_BUCKETS_MS
from ..broker.process.listener import KEY_BYTES
from ..broker.process.rate_limited_log import RateLimitedLog
from ..controller.state.documents import Desired
from .metrics import ProxyMetrics
from .streaming import FlowEnd

logger = logging.getLogger(__name__)

SHARE_EVERY_S = 1.0
LOCK_WAIT_S = 1.0  # others hold the lock for a few milliseconds, unless they are frozen just then
_STARTED_AT = 19  # of the fields in /proc/*/stat that follow the name
_HEADER = struct.Struct("<QQ")  # behind the key: where the valid part begins, and its length
_CONTENT_AT = KEY_BYTES + _HEADER.size
_LATENCIES = len(LATENCY_BUCKETS_MS) + 1


_ProcessKey = tuple[int, int]
"""A pid, and when its process started: another process may get the pid of a dead proxy."""


class _Route(msgspec.Struct, array_like=True):
    statuses: dict[int, int]
    streams: dict[FlowEnd, int]
    latencies: list[int]
    latency_sum_ms: float


class _Sums(msgspec.Struct, array_like=True):
    """The content of the file. `follows` is the newest version that deleted series were dropped for."""

    follows: tuple[int, int] = (0, 0)
    routes: dict[str, _Route] = {}
    sent: dict[str, int] = {}
    waiting: dict[_ProcessKey, list[tuple[str, str, int]]] = {}


_decode = msgspec.msgpack.Decoder(_Sums).decode


class SharedMetrics(ProxyMetrics):
    """The metrics of one of the proxies. It holds what it has counted since it last wrote; the file has the rest."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file
        self._behind = RateLimitedLog(logger)
        self._unreadable = RateLimitedLog(logger, logging.ERROR)
        self._process = _process_of(os.getpid()) or (os.getpid(), 0)
        self._written: tuple[object, ...] = ()

    def __repr__(self) -> str:
        return f"<SharedMetrics, {len(self.routes)} routes not written yet>"

    async def share_forever(self) -> None:
        while True:
            await asyncio.sleep(SHARE_EVERY_S)
            if self.routes or self.sent or self._written != self._state():
                try:
                    self._share()
                    self._behind.over()
                except BlockingIOError:
                    continue  # the next time, then
                except OSError as error:
                    self._behind.say(f"cannot add this proxy's metrics to those of the others, and tries again: {error}")

    async def close(self) -> None:
        """Writes what was counted, before this proxy ends."""
        with self._file, suppress(MQServeError):
            await self._share_soon()

    async def exposition(self) -> bytes:
        """Returns the sums of all proxies. Other metrics of this process are not among them: the next scrape may reach another process.

        Raises MQServeError if another proxy holds the file.
        """
        registry = CollectorRegistry()
        registry.register(await self._share_soon())
        return generate_latest(registry)

    async def _share_soon(self) -> ProxyMetrics:
        give_up_at = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return self._share()
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise MQServeError(f"the metrics of all proxies of this port cannot be added: {error}") from error
                if time.monotonic() > give_up_at:
                    raise MQServeError("another proxy of this port hangs while it holds their common counts: ask again") from error
                await asyncio.sleep(0.005)

    def _share(self) -> ProxyMetrics:
        """Moves the counts to the file and returns the sums. Raises BlockingIOError if another proxy is doing that now."""
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            stored = self._read()
            follows = stored.follows
            sums = _loaded(stored)
            sums.add(self)
            if self._desired is not None and _version(self._desired) >= follows:  # else another proxy knows more routes than this one
                follows = _version(self._desired)
                sums.keep(self._desired)
            waiting = {process: counts for process, counts in stored.waiting.items() if _process_of(process[0]) == process}
            waiting[self._process] = [(*labels, count) for labels, count in self.waiting.items()]
            for counts in waiting.values():
                for backend, endpoint, count in counts:
                    sums.waiting[backend, endpoint] += count
            self._write(_packed(sums, follows, waiting))
            self.forget_counts()
            self._written = self._state()
            return sums
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _state(self) -> tuple[object, ...]:
        """What the file should know beside the counts."""
        return dict(self.waiting), self._desired

    def _read(self) -> _Sums:
        """What is unreadable counts as empty: the next write mends the file, while an error would come again in every proxy."""
        at, length = self._read_header()
        if not length:
            return _Sums()
        try:
            sums = _decode(os.pread(self._file.fileno(), length, at))
            if any(len(route.latencies) != _LATENCIES for route in sums.routes.values()):
                raise msgspec.ValidationError("a route has another number of latencies")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._unreadable.say(f"the common counts of the proxies of this port are unreadable and begin anew: {error}")
            return _Sums()
        self._unreadable.over()
        return sums

    def _read_header(self) -> tuple[int, int]:
        header = os.pread(self._file.fileno(), _HEADER.size, KEY_BYTES)
        return _HEADER.unpack(header) if header else (_CONTENT_AT, 0)

    def _write(self, sums: _Sums) -> None:
        """Writes beside what is valid, and then the header, so that a proxy that is killed in between has changed nothing.

        Raises OSError, and has changed nothing then either, if there is no room."""
        content, fd = msgspec.msgpack.encode(sums), self._file.fileno()
        at, length = self._read_header()
        at = _CONTENT_AT if at >= _CONTENT_AT + len(content) else at + length
        if (taken := os.pwrite(fd, content, at)) < len(content):
            raise OSError(errno.ENOSPC, f"their file took {taken} of {len(content)} bytes")
        os.pwrite(fd, _HEADER.pack(at, len(content)), KEY_BYTES)


def _version(desired: Desired) -> tuple[int, int]:
    return desired.epoch, desired.version


def _loaded(stored: _Sums) -> ProxyMetrics:
    sums = ProxyMetrics()
    for pattern, route in stored.routes.items():
        counts = sums.route(pattern)
        counts.statuses, counts.streams = Counter(route.statuses), Counter(route.streams)
        counts.latencies, counts.latency_sum_ms = route.latencies, route.latency_sum_ms
    sums.sent = Counter(stored.sent)
    return sums


def _packed(sums: ProxyMetrics, follows: tuple[int, int], waiting: dict[_ProcessKey, list[tuple[str, str, int]]]) -> _Sums:
    routes = {
        pattern: _Route(dict(counts.statuses), dict(counts.streams), counts.latencies, counts.latency_sum_ms)
        for pattern, counts in sums.routes.items()
    }
    return _Sums(follows, routes, dict(sums.sent), waiting)


def _process_of(pid: int) -> _ProcessKey | None:
    """The process that has this pid now. Where there is no /proc, all of them started at 0."""
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]  # proc(5): the name may hold anything
    except OSError:
        return pid, 0
    return pid, int(after_name.split()[_STARTED_AT])
