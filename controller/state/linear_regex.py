"""Regexes that match in time linear in the text: rows of character classes, which are safe for `re`, and regexes that RE2 takes.

RE2 never backtracks. It comes with `google-re2`, the extra `mqserve[re2]`, since that has no wheels for musl.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from starlette.convertors import FloatConvertor

from ...broker.errors import BadValue

_CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_ATOM = rf"{_CLASS}|\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\\^$|?*+()\[\]{{}}]"
_ROW_PART = re.compile(rf"(?P<or>\|)|(?P<atom>{_ATOM})(?P<repeat>\{{\d+(?:,\d*)?\}}|[*+?])?(?![*+?{{])", re.DOTALL)
_TOKEN = re.compile(rf"{_CLASS}|\{{,\d+\}}|\\.|.", re.DOTALL)
_REPEATS = {"": (1, 1.0), "?": (0, 1.0), "*": (0, math.inf), "+": (1, math.inf)}
_UNICODE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}_", "s": r"\t-\r\x1c-\x1f\x85\p{Z}"}  # in RE2 the plain classes are ASCII only, unlike in `re`
_ANCHORS = frozenset(["^", "$", r"\A", r"\Z", r"\z", r"\b", r"\B"])  # RE2 gives some of them another meaning


@dataclass(frozen=True, slots=True)
class Row:
    """A regex that is a row of character classes with repeats, at most one of which is unbounded; or alternatives of such rows.

    `fixed`: all texts that it matches have the same length. `ways`: the largest number of ways in which one text divides among the
    repeats.
    """

    classes: tuple[re.Pattern[str], ...]
    fixed: bool
    ways: int

    def takes(self, char: str) -> bool:
        return any(one.fullmatch(char) for one in self.classes)


class Re2Missing(Exception):
    """google-re2 is not installed."""


@lru_cache(1024)
def read_row(regex: str) -> Row | None:
    """Returns None for a regex that is no such row. `regex` must compile."""
    if regex == FloatConvertor.regex:
        return Row((re.compile("[0-9.]"),), fixed=False, ways=1)  # `[0-9]+(\.[0-9]+)?` divides a text in one way only
    classes: set[str] = set()
    rows: list[list[tuple[int, float]]] = [[]]
    at = 0
    while at < len(regex):
        part = _ROW_PART.match(regex, at)
        if part is None:
            return None
        at = part.end()
        if part["or"]:
            rows.append([])
        else:
            classes.add(part["atom"])
            rows[-1].append(_bounds(part["repeat"] or ""))
    if any(sum(most == math.inf for _, most in row) > 1 for row in rows):
        return None
    lengths = {bound for row in rows for bound in (sum(least for least, _ in row), sum(most for _, most in row))}
    return Row(tuple(map(re.compile, sorted(classes))), fixed=len(lengths) == 1, ways=sum(map(_ways, rows)))


def _bounds(repeat: str) -> tuple[int, float]:
    if repeat in _REPEATS:
        return _REPEATS[repeat]
    least, comma, most = repeat[1:-1].partition(",")
    return int(least), float(most) if most else math.inf if comma else float(least)


def _ways(row: list[tuple[int, float]]) -> int:
    """In how many ways the repeats can divide a text. All vary freely except the one with the most choices, which takes the rest."""
    choices = sorted(most - least + 1 for least, most in row)
    return int(math.prod(choices[:-1]))


def compile_re2(pattern: str) -> Any:
    """Compiles with RE2. Raises Re2Missing, and BadValue with RE2's message for look-around, back-references and long repeats."""
    try:
        import re2
    except ImportError:
        raise Re2Missing from None
    if not hasattr(re2, "Options"):  # another package of that name falls back to `re`
        raise Re2Missing
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0]
        raise BadValue(why.decode() if isinstance(why, bytes) else str(error)) from None


def for_re2(regex: str) -> str:
    """Rewrites the regex so that RE2 gives it the meaning it has in `re`. Raises BadValue if that is impossible."""
    return "".join(map(_translate, _TOKEN.findall(regex)))


def _translate(token: str) -> str:
    is_class = token[0] == "[" and len(token) > 1
    if token in _ANCHORS or (is_class and re.search(r"\[:|\\[DWSbB]", token)):
        raise BadValue(f"it gives {token} another meaning")
    if token[:2] == "{,":
        return "{0" + token[1:]
    if is_class:
        return re.sub(r"\\([dws])", lambda one: _UNICODE[one[1]], token)
    if token[0] == "\\" and token[1].lower() in _UNICODE:
        return f"[{'^' if token[1].isupper() else ''}{_UNICODE[token[1].lower()]}]"
    return token
