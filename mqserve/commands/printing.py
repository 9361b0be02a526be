"""What commands about requests print: one sentence, JSON for scripts, and times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from ..broker.process.printable import printable
from ..broker.times import utc
from .status_table import make_console


def print_sentence(console: Console | None, sentence: str) -> int:
    (console or make_console()).print(sentence, highlight=False, markup=False, soft_wrap=True)
    return 0


def print_json(console: Console, facts: Iterable[dict[str, Any]]) -> int:
    for fact in facts:
        # DEL is the only control character that JSON does not escape
        console.file.write(json.dumps(fact).replace("\x7f", "\\u007f") + "\n")
    return 0


def print_about(console: Console, facts: dict[str, Any]) -> None:
    """Prints all facts about one thing, one per line, but those that are empty; of a list each entry has a line of its own."""
    for name, value in facts.items():
        text = "".join(f"\n    {_joined(entry)}" for entry in value) if isinstance(value, list) else _joined(value)
        if value not in ("", None, []):
            console.print(Text.assemble((f"{name.replace('_', ' ')}: ", "dim"), text), highlight=False, soft_wrap=True)
    console.print()


def _joined(fact: Any) -> str:
    parts = fact.values() if isinstance(fact, dict) else [fact]
    return "  ".join(printable(str(part)) for part in parts if part not in ("", None))


def when(store_ms: int) -> str:
    try:
        return f"{utc(store_ms):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):  # of a number far below 0
        return "at no time there is"
