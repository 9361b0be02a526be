"""Text as it may be shown in a log or on a terminal: these obey what they read, and a message id or an exception may be anybody's."""

from __future__ import annotations

INDENT = "    "


def printable(text: str) -> str:
    """On one line: line ends, escape codes, other controls and what turns the direction of writing are escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def printable_lines(text: str, indent: str = "") -> str:
    """As `printable`, but lines stay lines: for tracebacks, and messages that hold one. All but the first are indented."""
    return f"\n{indent}".join(map(printable, text.split("\n")))
