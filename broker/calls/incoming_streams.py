"""The streamed answers that this process reads: they are told of frames by the inbox, and read from the store what it did not bring.

One task reads what is missing, and one other looks after all of them. Neither runs while there is nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import msgspec

from ..backoff import delays
from ..errors import BadEnvelope, MQServeError, StoreUnavailable
from ..process.printable import printable
from ..process.tasks import Tasks
from ..results import Result, entry_of
from ..store import Place, Record, Store
from ..store_keys import StoreKeys
from ..streams import CREDIT_EVERY_S, IDLE_TIMEOUT_S, Credit, End, Form, Frame, Head, Owner, lost_result
from .incoming import BEGINNING, IncomingStream

logger = logging.getLogger(__name__)

LONGER_S = 30.0  # a reader waits for the next frame so much longer than the handler may take for it
_READ_AT_ONCE = 16  # frames: a megabyte
_ASK_AT_ONCE = 100  # streams, of two keys each: one read for thousands would hold up Redis
_POLL_EVERY_S = 0.5
_RECORD_BUDGET_MS = 5_000

OnStream = Callable[[IncomingStream], None]
OnRaw = Callable[[str, bytes], None]


class IncomingStreams:
    """All readers of this process. One answer may have several: the latest one gives the credit, since the others may have gone unseen.

    `on_head` is called when the answer to a request of this process begins, `on_loss` when its beginning cannot be read, and `on_result`
    with a recorded result that was found.
    """

    def __init__(
        self, store: Store, keys: StoreKeys, inbox: str, tasks: Tasks, *, on_head: OnStream, on_loss: OnStream, on_result: OnRaw
    ) -> None:
        self._store = store
        self._keys = keys
        self._inbox = inbox
        self._feeds = keys.feed("")
        self._tasks = tasks
        self._on_head = on_head
        self._on_loss = on_loss
        self._on_result = on_result
        self._readers: dict[str, list[IncomingStream]] = {}
        self._lacking: dict[IncomingStream, None] = {}  # those that have to read the stream, in the order of their asking
        self._healing = self._tending = False

    def __repr__(self) -> str:
        return f"<IncomingStreams, {len(self)} read>"

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, future_id: str) -> bool:
        return future_id in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    # What is told.

    def hear(self, future_id: str, seq: int, raw: bytes) -> None:
        """Passes on a frame from the inbox, unless nobody here reads this answer any more."""
        for stream in list(self._readers.get(future_id, ())):
            stream.hear(seq, raw)

    def expect(self, future_id: str) -> None:
        """Begins to read the answer to a request of this process, unless it is read already."""
        if future_id not in self._readers:
            self._add(IncomingStream(future_id, self))

    def ends(self, future_id: str, result: Result) -> None:
        for stream in list(self._readers.get(future_id, ())):
            stream.ends(End.of(result))

    def fail(self, future_id: str, error: MQServeError) -> bool:
        """Whether somebody read it."""
        readers = list(self._readers.get(future_id, ()))
        for stream in readers:
            stream.fail(error)
        return bool(readers)

    def replica_died(self, feed: str) -> None:
        """Looks at once after the answers that the replica with this feed made; other names mean nothing here."""
        if feed.startswith(self._feeds) and (cut := [stream for stream in self._everyone() if self._feed_of(stream) == feed]):
            self._tasks.start(self._look_after(cut))

    def stop(self) -> None:
        """Ends all, since this process stops reading."""
        for stream in self._everyone():
            stream.break_off("the process that read this answer ended before it was complete: send the request again")

    def heal_all(self) -> None:
        """Has all streams read from the store and all credit repeated: the inbox may have lost entries, and the feeds what was posted."""
        for stream in self._everyone():
            stream.claims = True
            self.heal(stream)
            self.credit(stream)

    async def find(self, future_ids: Sequence[str]) -> None:
        """Begins to read those answers to requests of this process that have begun to flow, since their first frames may be lost. Raises
        StoreUnavailable."""
        found = await self._store.get_many([self._keys.owner(future_id) for future_id in future_ids])
        for future_id, owner in zip(future_ids, found, strict=True):
            if owner is not None and future_id not in self._readers:
                self.expect(future_id)
                self.heal(self._readers[future_id][0])

    # Going on with an answer that flows, or has ended.

    async def resume(self, future_id: str, owner: Owner, after: int, form: Form) -> tuple[IncomingStream, int] | None:
        """Begins to read behind the frame `after`. Returns the reader and the number of the first frame that is there, which is higher than
        `after + 1` if what came next is not kept any more; None for an answer of another form. Raises StoreUnavailable, and BadEnvelope
        for a stream that does not parse."""
        key = self._keys.stream(future_id)
        head = Head(form=form)
        kept = await self._store.read_stream(key, BEGINNING, 1)
        if kept:
            first = Frame.from_bytes(kept[0][1])
            head = first.head or Head(form=Form.VALUES if first.content_type else Form.ITEMS)  # only these two are kept
        if head.form is not form:
            return None
        head = msgspec.structs.replace(head, replica=owner.replica, resumable=True)
        end: End | None = None
        if (raw := await self._store.get(self._keys.future(future_id))) is not None:  # behind the end come no frames
            end = End.of(Result.from_bytes(raw))
            # the result of a cancelled request does not say how many frames there are: its writer did not know
            end = end._replace(frames=max(end.frames, await self._store.last_of_stream(key)))
        first_there = max(after + 1, kept[0][0].seq if kept else 0)
        place = Place(kept[0][0].attempt if kept else owner.attempt, first_there - 1)
        # From here on nothing is awaited: a reader that is registered and whom nobody gets would never be left.
        stream = IncomingStream(future_id, self, head=head, after=place, told=False)
        self._add(stream)
        if end is not None:
            stream.ends(end)
        if stream.heard_end is None:
            self.heal(stream)
            self.credit(stream)
        return stream, first_there

    async def owner(self, future_id: str) -> Owner | None:
        """Returns which run writes the stream; None if the request made none. Raises StoreUnavailable."""
        [raw] = await self._store.get_many([self._keys.owner(future_id)])
        return read_owner(future_id, raw)

    # What the readers ask for.

    def show(self, stream: IncomingStream) -> None:
        self._on_head(stream)

    def heal(self, stream: IncomingStream) -> None:
        """Lets it read from the stream what the inbox did not bring."""
        self._lacking[stream] = None
        if not self._healing:
            self._healing = True
            self._tasks.start(self._heal_them())

    def credit(self, stream: IncomingStream, *, left: bool = False) -> None:
        """Tells the replica what this reader has taken, if it is the latest one."""
        if stream.head is None or (self._is_read_by_another(stream) and not left):
            return
        seq, size = stream.taken
        stream.credited()
        credit = Credit(1, stream.id, self._inbox, seq, size, left, renews=not stream.claims)
        self._store.post(self._feeds + stream.head.replica, credit.to_bytes())

    def leave(self, stream: IncomingStream) -> bool:
        """Ends it for its consumer, which does not read on. Returns whether the request has to be cancelled, since nobody can come back."""
        readers = self._readers.get(stream.id, [])
        is_resumable = stream.head is not None and stream.head.resumable
        if stream not in readers:
            given_up, stream.is_given_up = stream.is_given_up, False
            return given_up and not is_resumable
        is_last = len(readers) == 1
        if is_last and is_resumable:
            self.credit(stream, left=True)
        stream.abandon()
        return is_last and not is_resumable

    def leave_all(self) -> list[str]:
        """Ends all for their consumers. Returns the requests that have to be cancelled."""
        return [stream.id for stream in self._everyone() if self.leave(stream)]

    def retire(self, stream: IncomingStream) -> None:
        """Forgets a reader that needs no more of the store."""
        readers = self._readers.get(stream.id, [])
        if stream not in readers:
            return
        readers.remove(stream)
        self._lacking.pop(stream, None)
        if not readers:
            del self._readers[stream.id]
            if stream.head is None:
                self._on_loss(stream)
            elif not stream.head.resumable and stream.is_recorded:
                self._store.drop_soon(self._keys.stream(stream.id))
                self._store.drop_soon(self._keys.owner(stream.id))

    def _everyone(self) -> list[IncomingStream]:
        return [stream for readers in self._readers.values() for stream in readers]

    def _feed_of(self, stream: IncomingStream) -> str:
        return "" if stream.head is None else self._feeds + stream.head.replica

    def _is_read_by_another(self, stream: IncomingStream) -> bool:
        readers = self._readers.get(stream.id)
        return readers is not None and readers[-1] is not stream

    def _add(self, stream: IncomingStream) -> None:
        self._readers.setdefault(stream.id, []).append(stream)
        if not self._tending:
            self._tending = True
            self._tasks.start(self._tend())

    # One task reads streams, for those that lack some.

    async def _heal_them(self) -> None:
        pauses = delays()
        try:
            while self._lacking:
                stream = next(iter(self._lacking))
                del self._lacking[stream]  # before the read: a stream that asks again during it may lack what the read does not bring
                try:
                    await self._heal(stream)
                except StoreUnavailable as error:
                    if stream.heard_end is None:
                        self._lacking[stream] = None
                    logger.warning("cannot read the streamed answer to %s yet: %s", printable(stream.id), error)
                    await asyncio.sleep(next(pauses))
                else:
                    pauses = delays()
        finally:
            self._healing = False
            self._lacking.clear()

    async def _heal(self, stream: IncomingStream) -> None:
        """Reads up to what the store has now, or until the reader has enough."""
        while stream.heard_end is None and not stream.is_full:
            known = (stream.told_of, stream.has_last_word)
            entries = await self._store.read_stream(self._keys.stream(stream.id), stream.place, _READ_AT_ONCE)
            if entries:
                for place, raw in entries:
                    if stream.heard_end is None:
                        stream.read(place, raw)
                if len(entries) < _READ_AT_ONCE and not stream.lacks_some:
                    return  # the reader is told of later ones: to wait for a read without any would hold up the others while it flows
            elif known == (stream.told_of, stream.has_last_word):  # or it is told of more meanwhile
                if stream.has_last_word and stream.heard_end is None:
                    stream.lose()
                elif stream.lacks_some:  # the store has lost it, and the replica may append it again
                    stream.is_told = False
                return

    # One task looks after all.

    async def _tend(self) -> None:
        """Repeats credit, which may be lost; looks for the end of those that hear nothing; and reads the streams of those that are not told
        of frames, because a later reader is."""
        credit_at = time.monotonic() + CREDIT_EVERY_S
        try:
            while self._readers:
                await asyncio.sleep(_POLL_EVERY_S)
                now = time.monotonic()
                is_due = now >= credit_at
                everyone = self._everyone()
                if is_due:
                    credit_at = now + CREDIT_EVERY_S
                    for stream in everyone:
                        self.credit(stream)
                asking = [stream for stream in everyone if not stream.is_told or (is_due and now - stream.heard_at > CREDIT_EVERY_S)]
                await self._look_after(asking)
        finally:
            self._tending = False

    async def _look_after(self, streams: Sequence[IncomingStream]) -> None:
        with suppress(StoreUnavailable):
            for start in range(0, len(streams), _ASK_AT_ONCE):
                await self._ask_for(streams[start : start + _ASK_AT_ONCE])

    async def _ask_for(self, streams: Sequence[IncomingStream]) -> None:
        """Looks up the results and the owners of these streams, ends those whose replica has died, and reads those that go on. Raises
        StoreUnavailable."""
        ids = list(dict.fromkeys(stream.id for stream in streams))
        found = await self._store.get_many([*map(self._keys.future, ids), *map(self._keys.owner, ids)])
        for future_id, raw in zip(ids, found[: len(ids)], strict=True):
            if raw is not None and future_id in self._readers:
                self._on_result(future_id, raw)
        owners = {future_id: read_owner(future_id, raw) for future_id, raw in zip(ids, found[len(ids) :], strict=True)}
        await self._end_lost(
            {future_id: owner for future_id, owner in owners.items() if owner and not owner.replays and future_id in self._readers}
        )
        for stream in streams:
            if stream.has_last_word or stream.id not in self._readers:
                continue
            if (owner := owners[stream.id]) is not None and stream.moves_to(owner.replica):
                self.credit(stream)
            if stream.head is None or stream.head.resumable or not stream.is_told:
                self.heal(stream)
            if self._is_too_quiet(stream):
                stream.be_late()

    async def _end_lost(self, owners: Mapping[str, Owner]) -> None:
        """Ends the answers whose replica has died and which no other one replays. Raises StoreUnavailable."""
        replicas = list({owner.replica for owner in owners.values()})
        lost = await self._store.get_many([self._keys.lost(replica) for replica in replicas]) if replicas else []
        dead = {replica for replica, raw in zip(replicas, lost, strict=True) if raw is not None}
        cut = [(future_id, owner.backend) for future_id, owner in owners.items() if owner.replica in dead]
        await asyncio.gather(*(self._record_loss(future_id, backend) for future_id, backend in cut))

    async def _record_loss(self, future_id: str, backend: str) -> None:
        """Records that the answer has ended, unless it has its end already, and tells its readers."""
        raw = lost_result(backend, await self._store.last_of_stream(self._keys.stream(future_id))).to_bytes()
        key, until_ms = self._keys.future(future_id), self._store.now_ms() + _RECORD_BUDGET_MS
        await self._store.record(Record(key, raw, "", entry_of(future_id, raw), until_ms))
        if (recorded := await self._store.get(key)) is not None and future_id in self._readers:
            self._on_result(future_id, recorded)

    @staticmethod
    def _is_too_quiet(stream: IncomingStream) -> bool:
        limit_s = (stream.head.idle_s if stream.head is not None else IDLE_TIMEOUT_S) + LONGER_S
        return stream.is_drained and time.monotonic() - stream.heard_at > limit_s


def read_owner(future_id: str, raw: bytes | None) -> Owner | None:
    try:
        return None if raw is None else Owner.from_bytes(raw)
    except BadEnvelope as error:
        logger.warning("cannot read who streams the answer to %s: %s", printable(future_id), error)
        return None
