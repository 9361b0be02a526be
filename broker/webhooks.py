"""Webhooks: messages that tell a receiver of the end of a job.

The leading controller puts each into the queue `<ns>.webhooks`; any controller takes it from there and sends it. One that could not be
delivered waits, in a queue whose messages RabbitMQ moves back after 2, 4, 8, … s, and becomes a dead letter after a day.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from .callbacks import receiver_of
from .envelope import Whole
from .errors import UNPARSABLE, BadEnvelope
from .queue import Consumption, DeadLetters

VERSION = 1
WAITS_S: tuple[int, ...] = tuple(2**exponent for exponent in range(1, 14))  # between two tries: from 2 s to two hours and a quarter
GIVEN_UP_AFTER_MS = 24 * 3600 * 1000


class Webhook(msgspec.Struct, frozen=True, omit_defaults=True):
    """One webhook, as its message has it (JSON, so that operators can read a dead one). `body` is the same in each try."""

    v: int
    id: str
    url: str
    body: str
    since_ms: Whole  # store time of the first try
    tries: Whole = 0  # that have failed
    error: str = ""  # of the latest one

    @property
    def receiver(self) -> str:
        """The host that it goes to, for operators. Empty where the URL does not parse."""
        return receiver_of(self.url)

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Webhook:
        """Raises BadEnvelope."""
        try:
            webhook = _decode(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"a webhook does not parse ({error}): another program or version wrote it") from error
        if webhook.v != VERSION:
            raise BadEnvelope(f"a webhook has version {webhook.v}, and this controller reads {VERSION}: update it")
        return webhook


def next_wait_s(webhook: Webhook, now_ms: int, at_least_s: float = 0.0) -> int | None:
    """Returns how long a webhook waits after a failed try; None if it is given up. `at_least_s` is what its receiver asks for, which counts
    up to the longest wait."""
    if now_ms - webhook.since_ms >= GIVEN_UP_AFTER_MS:
        return None
    wait_s = WAITS_S[min(webhook.tries, len(WAITS_S) - 1)]
    return next((longer_s for longer_s in WAITS_S if longer_s >= max(wait_s, at_least_s)), WAITS_S[-1])


class WebhookDelivery(Protocol):
    """One message of `<ns>.webhooks`, unacked. It ends with exactly one call of `ack` or `requeue`."""

    @property
    def is_lost(self) -> bool:
        """Whether the connection that it came by has ended, so that it is delivered again."""
        ...

    def webhook(self) -> Webhook:
        """Raises BadEnvelope."""
        ...

    def ack(self) -> None: ...

    def requeue(self) -> None: ...


class Webhooks(Protocol):
    """The queues of webhooks on the broker, for controllers. Methods that publish return once the broker has confirmed the message, and
    raise its errors."""

    async def declare(self) -> int:
        """Makes sure that `<ns>.webhooks` and the queue of dead ones exist and are bound. Idempotent. Returns how many dead ones there are
        that nobody holds."""
        ...

    async def delete_if_empty(self) -> None:
        """Deletes `<ns>.webhooks` and the queues that lead there, unless a webhook waits in one of them, and the queue of dead ones unless
        there is one."""
        ...

    async def consume(self, prefetch: int, on_delivery: Callable[[WebhookDelivery], None]) -> Consumption:
        """Consumes `<ns>.webhooks`. Raises BrokerUnavailable after our budget."""
        ...

    async def send(self, webhook: Webhook) -> None:
        """Puts it into `<ns>.webhooks`."""
        ...

    async def wait(self, webhook: Webhook, wait_s: int) -> None:
        """Puts it there after that time, which is one of WAITS_S."""
        ...

    async def set_aside(self, webhook: Webhook) -> None:
        """Puts it among the dead ones."""
        ...

    def dead(self, at_most: int | None = None) -> AbstractAsyncContextManager[DeadLetters]:
        """Takes the dead ones, of which each body is a webhook's message. Raises UnknownBackend where there is no queue of them."""
        ...


_decode = msgspec.json.Decoder(Webhook).decode
