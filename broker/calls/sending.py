"""Sends requests: bodies, deadlines, tries again, copies, and cancels them; `pending.py` waits for their results."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

from msgspec.structs import replace

from ..envelope import Envelope, Header, RequestHead, mint_id
from ..errors import BrokerUnavailable, Cancelled, MQServeError, Overloaded, StoreUnavailable, TooLarge
from ..overload import HeldBytes, Pace
from ..process.rate_limited_log import RateLimitedLog
from ..process.tasks import Tasks
from ..queue import Queue
from ..results import entry_of
from ..sessions import CloseCode
from ..shards import FIRST, RoundRobin, other_shards
from ..store import Record, Store
from ..store_keys import StoreKeys
from .call import Call
from .cancellations import CANCELLED, notice_of_request
from .incoming import IncomingStream
from .links import Links
from .pending import PendingResults

logger = logging.getLogger(__name__)

INLINE_BODY_BYTES = 1024 * 1024  # a larger body goes to the store and travels by reference
MAX_BODY_BYTES = 64 * 1024 * 1024
REPUBLISH_BUDGET_S = 3.0  # how long a broker that is away is waited for
REPUBLISH_EVERY_S = 0.2  # on the average
_CANCEL_BUDGET_S = 5.0


class RequestSender:
    """One per process that sends requests. `run` must be running for any result to arrive; it owns every task in here."""

    def __init__(self, queue: Queue, store: Store, keys: StoreKeys, process_id: str, *, leaves_files: bool = False) -> None:
        self._queue = queue
        self._store = store
        self._keys = keys
        self.pending = PendingResults(store, keys, process_id, leaves_files=leaves_files)
        self.held = HeldBytes()
        self._uncancelled = RateLimitedLog(logger)
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)  # by backend
        self._shards = RoundRobin()
        self._tasks = Tasks()

    def __repr__(self) -> str:
        return f"<RequestSender {self.pending.inbox}, {len(self.pending)} waiting>"

    async def run(self) -> None:
        """Reads results until cancelled."""
        try:
            await self.pending.run()
        finally:
            self._tasks.cancel()

    def send(
        self,
        call: Call,
        backend: str,
        body: bytes,
        content_type: str,
        meta: RequestHead,
        *,
        origin: str,
        timeout_s: float,
        replay_s: float = 0,
        at_most_once: bool = False,
        stream: int = 0,
        priority: int = 0,
    ) -> None:
        """Sends the request of a call, whose id is set. The call ends by `timeout_s` plus at most a second: in a Result, or in Overloaded,
        NotRouted or BrokerUnavailable if the broker does not take the message, or in Cancelled. The broker keeps the message for `replay_s`
        longer: if its replica dies while the answer flows, another one replays that.

        Raises TooLarge for more than 64 MiB of body or 64 KiB of head, and Overloaded if this process holds too much already: then the
        call never began.
        """
        size = len(body)
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"the body has {size} bytes and the limit is {MAX_BODY_BYTES}: send less, or a reference to it")
        timeout_ms = max(1, int(timeout_s * 1000))
        deadline_ms = self._store.now_ms() + timeout_ms
        header = Header(origin=origin, inbox=self.pending.inbox, deadline=deadline_ms, meta=meta, once=at_most_once, stream=stream)
        self.held.take(size)
        call.sender, call.backend, call.deadline_ms, call.give_up_at = self, backend, deadline_ms, 0.0
        kept_ms = timeout_ms + int(replay_s * 1000)
        call.envelope = envelope = Envelope(call.id, body, content_type, header, "", "", priority, kept_ms)
        call.shards = self._shards.take(backend) if self._shards.is_needed else FIRST
        call.pace, call.sent_at = self._paces[backend], time.monotonic()
        call.pace.sent(call.sent_at)
        self.pending.add(call)
        try:
            if size > INLINE_BODY_BYTES:
                self._tasks.start(self._send_by_reference(envelope, partial(self._publish_reference, call)))
            else:
                self._queue.publish(backend, envelope, call.settled, call.shards[0])
        except MQServeError:
            self.pending.drop(call.id)
            self.held.give(size)
            raise

    def send_shadow(
        self, backend: str, body: bytes, content_type: str, meta: RequestHead, *, origin: str, timeout_s: float, shadow_id: str = ""
    ) -> None:
        """A copy of a request that was sent: its own id, no future, and whatever becomes of it is nobody's concern."""
        timeout_ms = max(1, int(timeout_s * 1000))
        header = Header(origin=origin, deadline=self._store.now_ms() + timeout_ms, shadow=True, meta=meta)
        envelope = Envelope(shadow_id or mint_id(), body, content_type, header, expiration_ms=timeout_ms)
        try:
            self.held.take(len(body))
        except Overloaded:
            return

        def settled(error: MQServeError | None) -> None:
            self.held.give(len(body))

        shard = self._shards.take(backend)[0]
        if len(body) > INLINE_BODY_BYTES:
            publish = partial(self._queue.publish, backend, settled=_nobody_waits, shard=shard)
            self._tasks.start(self._send_by_reference(envelope, publish))
            return
        try:
            self._queue.publish(backend, envelope, settled, shard)
        except MQServeError as error:
            settled(error)

    def new_links(self) -> Links:
        """Returns a register for the WebSocket sessions that begin with requests of this process; `pending.on_session` gets its entries."""
        return Links(self._store, self.pending.inbox, self._keys.feed(""), CloseCode.RESTART)

    def cancel(self, future_id: str) -> None:
        """Whoever waits here is told at once, and the replicas soon."""
        self.pending.fail(future_id, Cancelled(f"request {future_id} was cancelled by its caller"))
        self._tasks.start(self._cancel_quietly(future_id))

    def leave(self, stream: IncomingStream) -> None:
        """Stops reading a streamed answer before its end. Its request is cancelled, unless its caller may come back for the rest."""
        if self.pending.streams.leave(stream):
            self.cancel(stream.id)

    def leave_all(self) -> None:
        """Leaves all streamed answers, because this process is about to stop reading."""
        for future_id in self.pending.streams.leave_all():
            self.cancel(future_id)

    async def cancel_everywhere(self, future_id: str) -> bool:
        """Records that the request is cancelled, and tells every replica. False for one that has its result already.

        Raises StoreUnavailable.
        """
        raw = CANCELLED.to_bytes()
        deadline_ms = self._store.now_ms() + int(_CANCEL_BUDGET_S * 1000)
        if not await self._store.record(Record(self._keys.future(future_id), raw, "", entry_of(future_id, raw), deadline_ms)):
            return False
        self.end_cancelled(future_id)
        await self._store.append_log(self._keys.cancelled, notice_of_request(future_id))
        return True

    def end_cancelled(self, future_id: str) -> None:
        """Tells whoever waits here that the request was cancelled, by this process or another."""
        self.pending.fail(future_id, Cancelled(f"request {future_id} was cancelled"))

    async def _cancel_quietly(self, future_id: str) -> None:
        try:
            await self.cancel_everywhere(future_id)
        except StoreUnavailable as error:
            self._uncancelled.say(f"cancelled requests run to their end or their deadline, since nobody can be told of them: {error}")

    @property
    def trouble(self) -> str:
        """Why results cannot be stored and read now; empty while they can."""
        return self._store.health.trouble

    def now_ms(self) -> int:
        """Store time."""
        return self._store.now_ms()

    def follow(self, backends: Mapping[str, int]) -> None:
        """Learns which backends there are, each with its number of queues, and forgets how quickly others answered: they were deleted."""
        self._paces = defaultdict(Pace, {name: pace for name, pace in self._paces.items() if name in backends})
        self._shards.keep(backends)

    async def settle(self) -> None:
        """Until the broker has confirmed what was sent, and the store has what was cancelled; at most as long as a broker is waited for."""
        await until_over(lambda: not (self.held.held or self._tasks))

    # Sending.

    def _publish_reference(self, call: Call, envelope: Envelope) -> None:
        call.envelope = envelope
        self._publish_again(call)

    def _publish_again(self, call: Call) -> None:
        envelope = call.envelope
        assert envelope is not None, "only the last confirm takes it away"
        if call.id not in self.pending:  # cancelled or late since the last try
            return call.settled(None)
        self._queue.publish(call.backend, envelope, call.settled, call.shards[0])

    def not_taken(self, call: Call, error: MQServeError) -> None:
        """The broker did not take the message of the call, or did not say so: publishes it again, or fails the call."""
        envelope = call.envelope
        assert envelope is not None, "a publish is settled once"
        maybe_sent = isinstance(error, BrokerUnavailable) and error.maybe_sent
        if isinstance(error, BrokerUnavailable) and not (maybe_sent and envelope.header.once) and self._may_try_again(call):
            if maybe_sent:
                call.envelope = replace(envelope, header=again(envelope.header))
            asyncio.get_running_loop().call_later(REPUBLISH_EVERY_S * random.uniform(0.5, 1.5), self._publish_again, call)
            return
        if others := other_shards(call.shards, error):
            call.shards = others
            return self._publish_again(call)
        call.settled(None)
        if envelope.header.ref and not (envelope.header.again or maybe_sent):
            self._store.drop_soon(envelope.header.ref)  # nobody will ask for it
        if isinstance(error, Overloaded):
            left_s = (call.deadline_ms - self._store.now_ms()) / 1000
            error = Overloaded(str(error), retry_after_s=call.pace.retry_after_s(left_s))
        self.pending.fail(call.id, error)

    def _may_try_again(self, call: Call) -> bool:
        """Whether the broker may be waited for: for REPUBLISH_BUDGET_S in all, and what it was away before the call counts."""
        now = time.monotonic()
        if not call.give_up_at:
            away_before_s = max(0.0, self._queue.down_s - (now - call.sent_at))
            call.give_up_at = call.sent_at + REPUBLISH_BUDGET_S - away_before_s
        return now < call.give_up_at and call.id in self.pending

    async def _send_by_reference(self, envelope: Envelope, publish: Callable[[Envelope], None]) -> None:
        key = self._keys.body(envelope.id)
        try:
            await self._store.set(key, envelope.body, ttl_ms=envelope.expiration_ms + 60_000)
            header = replace(envelope.header, ref=key)
            publish(replace(envelope, body=b"", header=header))
        except MQServeError as error:
            self.pending.fail(envelope.id, error)
        finally:
            self.held.give(len(envelope.body))


def _nobody_waits(error: MQServeError | None) -> None:
    """A shadow that cannot be published is not missed."""


async def until_over(is_over: Callable[[], bool]) -> None:
    """Waits until it is over, or until the time has passed for which a broker is waited for."""
    give_up_at = time.monotonic() + REPUBLISH_BUDGET_S
    while not is_over() and time.monotonic() < give_up_at:
        await asyncio.sleep(0.005)


def again(header: Header) -> Header:
    """Returns the header of a message that may have been delivered before."""
    return replace(header, again=True)
