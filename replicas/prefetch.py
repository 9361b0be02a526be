"""How many deliveries a replica holds: enough never to be idle, too few for a request to wait behind a busy sibling."""

from __future__ import annotations

LOOKAHEAD_S = 0.002


def slots(limit: int, *, is_async: bool, sync_threads: int, batch_size: int) -> int:
    """Requests that can run at once, or while the next batch gathers. `batch_size` 0: no batches."""
    if batch_size:
        return min(limit, 2 * batch_size * sync_threads)
    return limit if is_async else min(limit, sync_threads)


def prefetch(slots: int, limit: int, run_s: float, *, may_look_ahead: bool = True) -> int:
    """Slots, plus what runs within LOOKAHEAD_S at `run_s` seconds a call (0: not known yet), up to `limit`.

    Rounded down to a power of two above the slots, since each change costs a consumer.
    """
    if run_s <= 0 or limit <= slots or not may_look_ahead:
        return slots
    ahead = int(LOOKAHEAD_S / run_s) * slots
    return min(limit, slots + (1 << (ahead.bit_length() - 1) if ahead else 0))
