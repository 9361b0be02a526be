"""Delays between tries: they double, and no two processes keep step."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first_s: float = 0.05, cap_s: float = 5.0) -> Iterator[float]:
    """Endless: half of each delay is fixed and half is chance, so that a fleet does not hit a recovering server together."""
    delay_s = first_s
    while True:
        yield delay_s * (0.5 + random.random() / 2)
        delay_s = min(cap_s, delay_s * 2)
