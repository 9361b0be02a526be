"""Delays between retries: they double, and each has a random part, so that processes do not retry in step."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator

logger = logging.getLogger(__name__)


def delays(first_s: float = 0.05, cap_s: float = 5.0) -> Iterator[float]:
    """Yields delays without end. Half of each delay is fixed and half is random (jitter), so that a fleet does not hit a recovering
    server at the same moment."""
    delay_s = first_s
    while True:
        yield delay_s * (0.5 + random.random() / 2)
        delay_s = min(cap_s, delay_s * 2)


def retry_after_s() -> float:
    """When a client is to come again that was told 503: a number of seconds that goes out rounded up, and not the same for all."""
    return random.uniform(0.5, 3.0)


async def keep_running(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled: `work` never returns, and is started again after an exception that it did not foresee."""
    pauses = delays()
    while True:
        try:
            return await work()
        except Exception:
            logger.exception("%s has failed and is started again: that is a bug in mqserve, please report it", what)
        await asyncio.sleep(next(pauses))
