"""What was sent and has not begun: waited for after a sample, so that it does not burden the next one."""

from __future__ import annotations

import asyncio

import aiormq

from .subjects import Servers, SubjectFailed

DRAIN_BUDGET_S = 120.0
_ASKED_EVERY_S = 0.1


def drained(servers: Servers, queue: str) -> None:
    """Returns once the queue is empty. Raises SubjectFailed if it stays full."""
    try:
        asyncio.run(asyncio.wait_for(_is_empty(servers.urls["MQSERVE_BROKER_URL"], queue), DRAIN_BUDGET_S))
    except TimeoutError:
        raise SubjectFailed(f"its queue {queue} was not emptied within {DRAIN_BUDGET_S:g} s") from None


async def _is_empty(url: str, queue: str) -> None:
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        while (await channel.queue_declare(queue, passive=True)).message_count:
            await asyncio.sleep(_ASKED_EVERY_S)
    finally:
        await connection.close()
