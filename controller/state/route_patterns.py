"""The grammar of routes. Clients that create a route and proxies that match it compile it here, and then it is matched in time linear in
the path.

A route is literal text and variables, `/users/{user_id:int}`, and matches the paths that Starlette would match. Python's `re` backtracks:
if the border between two variables may be at many places, it tries them all, which takes the square of the path's length, or worse. So
`re` is used only if all variables but one are *fenced*: the literal text on each side has a character that the variable does not take,
which fixes where the variable begins and ends. Several `str` in one segment are one variable for `re`, and `rfind` divides its text. All
other routes are matched by RE2, which never backtracks.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.convertors import CONVERTOR_TYPES, Convertor, FloatConvertor, PathConvertor, StringConvertor, UUIDConvertor

from ...broker.errors import BadValue
from ...broker.failures import describe
from ...broker.process.printable import printable
from ...broker.process.rate_limited_log import RateLimitedLog
from .linear_regex import Re2Missing, Row, compile_re2, for_re2, read_row

Params = tuple[tuple[str, str, str], ...]
Find = Callable[[str], Sequence[str] | None]
Convertors = Mapping[str, Convertor[Any]]

logger = logging.getLogger(__name__)

MAX_WAYS = 30  # `re` may try this many at each character of a path: 0.1 s for the longest path

_VARIABLE = re.compile(r"{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?}")
# these convertors accept every text that their regex matches
_NEVER_RAISE = (StringConvertor, PathConvertor, FloatConvertor, UUIDConvertor)


class Variable(NamedTuple):
    """A variable of a route; `kind` is the name of its convertor."""

    name: str
    kind: str
    convertor: Convertor[Any]
    regex: str

    @property
    def may_span(self) -> bool:
        """Whether it may match slashes."""
        row = read_row(self.regex)
        return row is None or row.takes("/")


@dataclass(frozen=True, slots=True)
class RoutePattern:
    """A compiled route."""

    route: str
    variables: tuple[Variable, ...]
    find: Find  # returns the texts of the variables
    checked: tuple[int, ...]  # indexes of variables whose convertor may refuse a text that its regex matches
    log: RateLimitedLog = field(default_factory=lambda: RateLimitedLog(logger), compare=False, repr=False)

    def match(self, path: str) -> Params | None:
        """Returns (name, convertor, text) of each variable, or None if the path does not match. A convertor that raises does not match."""
        texts = self.find(path)
        if texts is None:
            return None
        for at in self.checked:
            try:
                self.variables[at].convertor.convert(texts[at])
            except ValueError:
                return None
            except BaseException as error:  # a convertor is user code that runs in a proxy's loop: not even SystemExit may end that
                self.log.say(
                    f"a path does not match route {self.route!r}, since its convertor {self.variables[at].kind!r} raised "
                    f"{printable(describe(error).words)}: let it raise ValueError for a text that it does not take"
                )
                return None
        return tuple([(variable.name, variable.kind, text) for variable, text in zip(self.variables, texts, strict=True)])

    def is_current(self, convertors: Convertors = CONVERTOR_TYPES) -> bool:
        """Whether the names of its convertors still refer to the same convertors."""
        return all(convertors.get(variable.kind) is variable.convertor for variable in self.variables)


class _Obstacle(NamedTuple):
    """The reason why `re` must not match a route."""

    what: str
    mend: str


class _Piece(NamedTuple):
    """A part of a route that is one variable for `re`, and the literal text before it: one variable, or several `str` with the literals
    `between` them."""

    before: str
    variables: tuple[Variable, ...]
    between: tuple[str, ...] = ()

    @property
    def regex(self) -> str:
        return self.variables[0].regex

    @property
    def group(self) -> str:
        return f"(?P<{self.variables[0].name}>{self.regex})"


def compile_route(route: str, convertors: Convertors = CONVERTOR_TYPES) -> RoutePattern:
    """Compiles a route. Raises BadValue for a text that is no route, and for a route that cannot be matched in linear time here."""
    literals, variables = _parse(route, convertors)
    pieces = _join_strs(literals, variables)
    obstacle = _obstacle(pieces)
    find = _find_by_re(pieces, literals[-1]) if obstacle is None else _find_by_re2(route, literals, variables, obstacle)
    checked = [at for at, variable in enumerate(variables) if type(variable.convertor) not in _NEVER_RAISE]
    return RoutePattern(route, tuple(variables), find, tuple(checked))


def check_convertor(name: str, convertor: Convertor[Any], routes: Iterable[str], convertors: Convertors = CONVERTOR_TYPES) -> None:
    """Raises BadValue for an object that is no convertor, and for one with which a route that names it could no longer be matched."""
    _regex_of(name, convertor)
    known = {**convertors, name: convertor}
    for route in routes:
        kinds = {kind or "str" for _, kind in _VARIABLE.findall(route)}
        if name in kinds and kinds <= known.keys():  # convertors known only elsewhere are checked by the proxies there
            compile_route(route, known)


def _parse(route: str, convertors: Convertors) -> tuple[list[str], list[Variable]]:
    """Returns the literal texts, and the variables between them."""
    if not route.startswith("/"):
        raise BadValue(f"route {route!r} does not begin with '/': write it as a path, such as '/users/{{user_id:int}}'")
    literals: list[str] = []
    variables: list[Variable] = []
    at = 0
    for found in _VARIABLE.finditer(route):
        name, kind = found[1], found[2] or "str"
        if kind not in convertors:
            known = ", ".join(sorted(convertors))
            raise BadValue(f"route {route!r} does not parse (there is no convertor {kind!r}): convertors are {known}")
        if any(name == other.name for other in variables):
            raise BadValue(
                f"route {route!r} does not parse (it has two parameters {name!r}): name each parameter once, as in '/{{user_id:int}}'"
            )
        literals.append(route[at : found.start()])
        variables.append(Variable(name, kind, convertors[kind], _regex_of(kind, convertors[kind])))
        at = found.end()
    literals.append(route[at:])
    if odd := re.search(r"[{}?#]", "".join(literals)):
        raise BadValue(f"route {route!r} has a {odd[0]!r} that is no part of a parameter: write parameters as '{{name}}' or '{{name:int}}'")
    return literals, variables


def _regex_of(kind: str, convertor: Convertor[Any]) -> str:
    try:
        regex, _ = convertor.regex, convertor.convert
        named = re.compile(regex).groupindex
        re.compile(f"(?:{regex})")  # as a group: it must have no global flags and no unbalanced parenthesis
    except Exception as error:  # a user's convertor may raise anything
        raise BadValue(
            f"convertor {kind!r} has no regex that a route can hold ({error}): make it a Starlette Convertor, and write flags as (?i:…)"
        ) from error
    if named or not isinstance(regex, str):
        raise BadValue(f"the regex of convertor {kind!r} must be a str without named groups, not {regex!r}: write groups as (?:…)")
    return regex


def _join_strs(literals: list[str], variables: list[Variable]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for before, variable in zip(literals, variables, strict=False):
        last = pieces[-1] if pieces else None
        if last is not None and "/" not in before and last.regex == variable.regex == StringConvertor.regex:
            pieces[-1] = _Piece(last.before, (*last.variables, variable), (*last.between, before))
        else:
            pieces.append(_Piece(before, (variable,)))
    return pieces


def _obstacle(pieces: list[_Piece]) -> _Obstacle | None:
    """Returns None if `re` may match it: the end of at most one variable is tried at many places, and the others are settled quickly for
    each."""
    rows: list[Row] = []
    for piece in pieces:
        row, variable = read_row(piece.regex), piece.variables[0]
        if row is None:
            return _Obstacle(
                f"the regex {variable.regex!r} of {variable.kind!r} is no row of character classes with at most one unbounded repeat",
                "make it one",
            )
        rows.append(row)
    if math.prod(row.ways for row in rows) > MAX_WAYS:
        return _Obstacle("the repeats of its convertors can share a text in too many ways", "give them fixed lengths, as in [0-9]{4}")
    beside = [None, *[piece.before for piece in pieces[1:]], None]
    fenced = [_is_fence(left, row) and _is_fence(right, row) for left, row, right in zip(beside, rows, beside[1:], strict=False)]
    if sum(not (row.fixed or is_fenced) for row, is_fenced in zip(rows, fenced, strict=True)) > 1:
        return _Obstacle(
            "its variables may meet at many places of one path", "put a character between them that neither takes, such as a slash"
        )
    return None


def _is_fence(literal: str | None, row: Row) -> bool:
    """Whether the variable cannot run past the literal. None stands for the start and the end of the path, which always hold it."""
    return literal is None or not all(map(row.takes, literal))


def _find_by_re(pieces: list[_Piece], end: str) -> Find:
    regex = re.compile("^" + "".join([re.escape(piece.before) + piece.group for piece in pieces]) + re.escape(end) + "$")
    names = [piece.variables[0].name for piece in pieces]
    betweens = [piece.between for piece in pieces]

    def find(path: str) -> Sequence[str] | None:
        found = regex.match(path)
        return None if found is None else [found[name] for name in names]

    def find_and_divide(path: str) -> Sequence[str] | None:
        found = regex.match(path)
        if found is None:
            return None
        texts: list[str] = []
        for name, between in zip(names, betweens, strict=True):
            divided = _divide(found[name], between)
            if divided is None:
                return None
            texts += divided
        return texts

    return find_and_divide if any(betweens) else find


def _divide(text: str, between: Sequence[str]) -> list[str] | None:
    """Returns the texts of several `str` as greedy matching divides them: each literal of `between` as far right as possible, with at
    least one character behind it."""
    texts: list[str] = []
    for literal in reversed(between):
        at = text.rfind(literal, 1, len(text) - 1)
        if at < 0:
            return None
        texts.append(text[at + len(literal) :])
        text = text[:at]
    return [text, *reversed(texts)]


def _find_by_re2(route: str, literals: list[str], variables: list[Variable], obstacle: _Obstacle) -> Find:
    why = f"route {route!r} cannot be matched in linear time by Python's re, since {obstacle.what}"
    try:
        groups = [f"(?P<{variable.name}>{for_re2(variable.regex)})" for variable in variables]
        parts = [part for pair in zip(map(re.escape, literals), [*groups, ""], strict=True) for part in pair]
        regex = compile_re2("".join(parts) + r"\n?")  # `$` of `re` matches at the end and before a final line feed
    except Re2Missing:
        raise BadValue(f"{why}: {obstacle.mend}, or install google-re2 for clients and proxies (mqserve[re2])") from None
    except BadValue as error:
        raise BadValue(f"{why}, nor by RE2 ({error}): {obstacle.mend}") from error
    indexes = [regex.groupindex[variable.name] for variable in variables]  # RE2 orders groups by name

    def find(path: str) -> Sequence[str] | None:
        try:
            found = regex.fullmatch(path)
        except UnicodeEncodeError:  # the path has half a surrogate pair
            return None
        return None if found is None else [found[index] for index in indexes]

    return find
