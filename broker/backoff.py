"""Delays between retries: they double, and each has a random part, so that processes do not retry in step."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first_s: float = 0.05, cap_s: float = 5.0) -> Iterator[float]:
    """Yields delays without end. Half of each delay is fixed and half is random (jitter), so that a fleet does not hit a recovering
    server at the same moment."""
    delay_s = first_s
    while True:
        yield delay_s * (0.5 + random.random() / 2)
        delay_s = min(cap_s, delay_s * 2)
