"""How many deliveries a replica holds: enough that it is never idle, few enough that no request waits while another replica is idle."""

from __future__ import annotations

LOOKAHEAD_S = 0.002
SLOW_CALL_S = 0.02


def slots(limit: int, *, is_async: bool, sync_threads: int, batch_size: int) -> int:
    """Returns how many requests can run at once, or run and gather for the next batch. `batch_size` 0 means no batches."""
    if batch_size:
        return min(limit, 2 * batch_size * sync_threads)
    return limit if is_async else min(limit, sync_threads)


def prefetch(slots: int, limit: int, run_s: float, *, may_look_ahead: bool = True) -> int:
    """Returns the slots plus the number of requests that run within LOOKAHEAD_S, at most `limit`. `run_s` is the run time of a call, 0 if
    unknown.

    The look-ahead is rounded down to a power of two, since each change of the prefetch costs a new consumer.
    """
    if run_s <= 0 or limit <= slots or not may_look_ahead:
        return slots
    ahead = int(LOOKAHEAD_S / run_s) * slots
    return min(limit, slots + (1 << (ahead.bit_length() - 1) if ahead else 0))


def must_give_back(waiting: int, least: int, prefetch: int, blocked_s: float) -> bool:
    """Whether the requests that wait at the worker go back to the queue, since another replica may be idle: they wait behind a call of more
    than SLOW_CALL_S, or calls have become so long that none would be fetched ahead. `least` is the prefetch without a look-ahead: the
    slots, or the number of queues where that is higher. `blocked_s` is for how long no call could start."""
    return (waiting > 0 and blocked_s > SLOW_CALL_S) or (waiting > least and prefetch <= least)
