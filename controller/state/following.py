"""Following the two documents: if a document is broken or missing, every process goes on with the last good one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from ...broker.documents import follow
from ...broker.errors import UNPARSABLE, BadEnvelope
from ...broker.store import Store
from ...broker.store_keys import StoreKeys
from .documents import Desired, Observed
from .reading import read_desired, read_observed

logger = logging.getLogger(__name__)
D = TypeVar("D", Desired, Observed)

DOUBTED_FOR_S = 15.0  # longer than a change of leaders takes


class _Latest(Generic[D]):
    """The last good version of a document. An older version is refused for DOUBTED_FOR_S: it is a copy from before the store failed,
    which the leader will replace. If it still stands after that, it is accepted."""

    def __init__(self, read: Callable[[bytes], D]) -> None:
        self._read: Callable[[bytes], D] = read
        self._doubted_since = math.inf  # monotonic
        self._broken: bytes | None = None  # the broken value that was logged last: it is read again whenever the other document changes
        self.value: D | None = None

    @property
    def doubts(self) -> bool:
        return self._doubted_since < math.inf

    def take(self, raw: bytes | None) -> None:
        try:
            found = None if raw is None else self._read(raw)
        except BadEnvelope as error:
            if raw != self._broken:
                logger.warning("%s; going on with the last good one", error)
            self._broken = raw
            return
        if self.value is not None and found is not None and (found.epoch, found.version) < (self.value.epoch, self.value.version):
            self._doubted_since = min(self._doubted_since, time.monotonic())
            if time.monotonic() - self._doubted_since < DOUBTED_FOR_S:
                return
        self._doubted_since = math.inf
        self.value = found

    def forget(self) -> None:
        self._doubted_since = math.inf
        self.value = None


async def follow_state(store: Store, keys: StoreKeys) -> AsyncIterator[tuple[Desired | None, Observed | None]]:
    """Yields both documents now and after every change. A document that is broken or older than the last one is replaced by the last good
    one."""
    desired, observed = _Latest(read_desired), _Latest(read_observed)
    instance = ""
    async for raw_desired, raw_observed in follow(store, keys.desired, keys.observed, again=lambda: desired.doubts or observed.doubts):
        if raw_desired is not None and (found := _instance_of(raw_desired)) not in ("", instance):
            instance = found
            desired.forget()
            observed.forget()
        desired.take(raw_desired)
        observed.take(raw_observed)
        yield desired.value, observed.value


class _Named(msgspec.Struct):
    instance: str = ""


def _instance_of(raw: bytes) -> str:
    """Also of a document in which something else is wrong."""
    with suppress(BadEnvelope):
        return read_desired(raw).instance
    try:
        return msgspec.json.decode(raw, type=_Named).instance
    except UNPARSABLE:
        return ""
