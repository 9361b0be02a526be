"""Escapes text for logs and terminals. They obey control codes, and anybody may have written a message id or an exception."""

from __future__ import annotations

INDENT = "    "


def printable(text: str) -> str:
    """Returns the text on one line: line ends, escape codes, other controls and bidirectional marks are escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def printable_lines(text: str, indent: str = "") -> str:
    """Escapes as `printable` does, but keeps line breaks, for tracebacks and multi-line messages. All lines but the first are indented."""
    return f"\n{indent}".join(map(printable, text.split("\n")))
