"""Whole numbers that a caller gives: 2.0 is one, as it is in JSON; True is none."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(value: Any) -> int | None:
    """None for what is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None
