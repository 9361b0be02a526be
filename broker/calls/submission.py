"""One job on its way to the broker, and into the store."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..envelope import Envelope
from ..errors import BrokerUnavailable, MQServeError, NotRouted
from ..jobs import JobFacts
from ..pipelines import Plan
from .sending import INLINE_BODY_BYTES, REPUBLISH_BUDGET_S, REPUBLISH_EVERY_S, again

if TYPE_CHECKING:
    from .job_sending import JobSender

OnSubmitted = Callable[[JobFacts | MQServeError], None]
"""Called once with what is known of a job that was accepted, or with the error for which it was not accepted."""


class Submission:
    """One job on its way to the broker: published again while the broker is away, as requests are, and as long as its sender waits.

    Await it, or `begin` it, once. Awaited it returns what is known of the job when the broker has confirmed its message and the store has
    its record, or could not take that: then its replica writes it. Either raises, or tells, Overloaded if this process holds too much
    already, NotRouted, BrokerUnavailable, and StoreUnavailable for a body that the store does not take. The job was not accepted then,
    unless the broker may have it (`maybe_sent`).
    """

    __slots__ = ("_again", "_backend", "_ended", "_envelope", "_facts", "_has_left", "_kept", "_plan", "_sender", "_sent_at", "_size")

    _ended: OnSubmitted  # this one and the next two are set when it begins
    _kept: bytes
    _sent_at: float  # monotonic

    def __init__(self, sender: JobSender, backend: str, envelope: Envelope, facts: JobFacts, plan: Plan | None) -> None:
        self._sender = sender
        self._backend = backend
        self._envelope = envelope
        self._size = len(envelope.body)
        self._facts = facts
        self._plan = plan
        self._has_left = False
        self._again: asyncio.TimerHandle | None = None  # publishes it again

    def __repr__(self) -> str:
        return f"<Submission of {self._envelope.id}>"

    def __await__(self) -> Generator[Any, None, JobFacts]:
        return self._submit().__await__()

    def begin(self, ended: OnSubmitted) -> None:
        """Sends a job whose body has at most INLINE_BODY_BYTES, for a sender that does not leave. `ended` is called once, perhaps before
        this returns, and must not raise."""
        self._sender.take(self._size)
        try:
            self._send(ended)
        except BaseException:
            self._sender.give(self._size)
            raise

    async def _submit(self) -> JobFacts:
        accepted: asyncio.Future[JobFacts] = asyncio.get_running_loop().create_future()
        self._sender.take(self._size)
        try:
            if self._size > INLINE_BODY_BYTES:
                self._envelope = await self._sender.by_reference(self._envelope)
            self._send(partial(_tell, accepted))
        except BaseException:
            self._sender.give(self._size)
            raise
        try:
            return await accepted
        except asyncio.CancelledError:
            self._leave()
            raise
        finally:
            del accepted  # an error's traceback holds this frame, which would hold the error

    def _send(self, ended: OnSubmitted) -> None:
        self._ended = ended
        self._kept = self._sender.kept_message(self._backend, self._envelope)
        self._sent_at = time.monotonic()
        self._publish()

    def _leave(self) -> None:
        """Nobody waits for its end any more, which comes all the same if the broker may have the message."""
        self._has_left = True
        if self._again is not None:
            self._again.cancel()
            self._drop_body(maybe_sent=False)
            self._sender.give(self._size)

    def _end(self, outcome: JobFacts | MQServeError) -> None:
        self._sender.give(self._size)
        ended = self._ended
        del self._ended, self._kept  # whoever is told may hold this submission, and they would keep each other
        ended(outcome)

    def _publish(self) -> None:
        self._again = None
        queue, not_before_ms = self._sender.queue, self._facts.not_before_ms
        left_ms = not_before_ms - self._sender.store.now_ms() if not_before_ms else 0
        try:
            if left_ms > 0:
                queue.publish_later(self._backend, self._envelope, left_ms / 1000, self._settled)
            else:
                queue.publish_job(self._backend, self._envelope, self._settled)
        except MQServeError as error:
            self._fail(error)

    def _settled(self, error: MQServeError | None) -> None:
        if error is None:
            return self._sender.add(self._envelope.id, self._facts, self._kept, self._plan, self._added)
        maybe_sent = isinstance(error, BrokerUnavailable) and error.maybe_sent
        passes = isinstance(error, BrokerUnavailable) or self._is_early(error)
        if passes and not (maybe_sent and self._envelope.header.once) and self._may_try_again():
            if maybe_sent:
                self._envelope = replace(self._envelope, header=again(self._envelope.header))
            self._again = asyncio.get_running_loop().call_later(REPUBLISH_EVERY_S * random.uniform(0.5, 1.5), self._publish)
            return
        self._fail(error)

    def _is_early(self, error: MQServeError) -> bool:
        """Whether the queue of those that wait is not there yet: the leader declares it behind those of the first backends."""
        return isinstance(error, NotRouted) and self._facts.not_before_ms > 0

    def _may_try_again(self) -> bool:
        """Whether the broker may be waited for: for REPUBLISH_BUDGET_S in all, and what it was away before the job counts."""
        waited_s = time.monotonic() - self._sent_at
        return max(waited_s, self._sender.queue.down_s) < REPUBLISH_BUDGET_S and not self._has_left

    def _added(self) -> None:
        self._end(self._facts if self._plan is None else self._plan.facts)

    def _fail(self, error: MQServeError) -> None:
        self._drop_body(maybe_sent=isinstance(error, BrokerUnavailable) and error.maybe_sent)
        self._end(error)

    def _drop_body(self, *, maybe_sent: bool) -> None:
        header = self._envelope.header
        if header.ref and not (header.again or maybe_sent):
            self._sender.drop_body(self._envelope.id)


def _tell(accepted: asyncio.Future[JobFacts], outcome: JobFacts | MQServeError) -> None:
    if accepted.done():  # whoever awaited it was cancelled
        return
    if isinstance(outcome, MQServeError):
        accepted.set_exception(outcome)
    else:
        accepted.set_result(outcome)
