"""The log of cancellations: every replica reads it, so that no replica has to ask the store before a run, and every proxy, so that it can
answer at once what was cancelled elsewhere.

An entry of the log `cancelled` is MessagePack `[1, kind, name]`: kind `request` names a future id, kind `proxy` names the inbox of a
proxy that died, whose clients are gone, and kind `replica` the feed of a replica that died, with its WebSocket sessions. Readers skip kinds
and versions that they do not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from ..backoff import keep_running
from ..envelope import Envelope, is_minted
from ..results import ErrorInfo, Outcome, Result
from ..store import Store
from ..store_keys import RESULT_TTL_S, StoreKeys

VERSION = 1
REQUEST, PROXY, REPLICA = "request", "proxy", "replica"
KEPT = 20_000  # cancelled ids that a reader remembers; the log keeps fewer

# The bytes are the same whoever cancels: by that the store recognizes that two writers recorded the same result.
CANCELLED = Result(
    status=499,
    error=ErrorInfo(type=Outcome.CANCELLED, message="the request was cancelled, or its client went away, before it had a result"),
)


class CancelNotice(msgspec.Struct, frozen=True, array_like=True):
    v: int
    kind: str
    name: str


def notice_of_request(future_id: str) -> bytes:
    return _encode(CancelNotice(VERSION, REQUEST, future_id))


def notice_of_proxy(inbox: str) -> bytes:
    return _encode(CancelNotice(VERSION, PROXY, inbox))


def notice_of_replica(feed: str) -> bytes:
    return _encode(CancelNotice(VERSION, REPLICA, feed))


class Cancellations:
    """The cancellations and deaths that this process has read from the log. `on_word` gets the names in each batch of entries."""

    def __init__(self, store: Store, keys: StoreKeys, on_word: Callable[[Sequence[str]], None]) -> None:
        self._store = store
        self._log = keys.cancelled
        self._on_word = on_word
        self._heard: dict[str, float] = {}  # future id, inbox or feed -> time of arrival, oldest first; the oldest is forgotten first

    def __repr__(self) -> str:
        return f"<Cancellations, {len(self._heard)} heard>"

    def __bool__(self) -> bool:
        return bool(self._heard)

    def has(self, name: str) -> bool:
        """Whether this future id or proxy inbox is cancelled. A cancellation of a caller's own id lapses with the result's TTL, since the
        caller may use the id again after that."""
        heard_at = self._heard.get(name)
        if heard_at is None:
            return False
        return "/" not in name or is_minted(name) or time.monotonic() - heard_at < RESULT_TTL_S

    async def listen(self) -> None:
        """Reads the log until this task is cancelled."""
        await keep_running("the listener to cancellations", lambda: self._store.read_log(self._log, self._on_entries))

    def names(self, envelope: Envelope, future_id: str) -> bool:
        """Whether nobody wants this request any more. The end of a proxy cancels the requests of that proxy only; the result of a
        handle's request may be read by any process that has the id."""
        header = envelope.header
        return self.has(future_id) or (header.origin == "http" and header.inbox in self._heard)

    def _on_entries(self, entries: list[bytes]) -> None:
        names: list[str] = []
        for raw in entries:
            try:
                notice = _decode(raw)
            except msgspec.MsgspecError:
                continue
            if notice.v == VERSION and notice.kind in (REQUEST, PROXY, REPLICA):
                self._heard.pop(notice.name, None)
                self._heard[notice.name] = time.monotonic()
                names.append(notice.name)
        while len(self._heard) > KEPT:
            del self._heard[next(iter(self._heard))]
        self._on_word(names)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(CancelNotice).decode
