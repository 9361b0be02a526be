"""Finds the patterns that a path may match by their literal segments, and the longest prefix of a path, instead of trying one route after
the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

from ..controller.state.documents import Endpoint
from ..controller.state.route_patterns import RoutePattern

T = TypeVar("T")


class Shape(NamedTuple):
    """The positions of a pattern's literal segments; negative ones count from the end of the path.

    A path must have exactly as many `segments` as the pattern, or at least as many if a variable may match slashes.
    """

    segments: int
    is_open: bool
    literal_at: tuple[int, ...]

    def key_of(self, segments: list[str]) -> Any:
        """Returns the literal segments of a path that has this shape."""
        return itemgetter(*self.literal_at)(segments)


@dataclass(frozen=True, slots=True)
class PatternRoute:
    """A route with variables. `age` is its position among the endpoints, oldest first. Its `shape` and its `key` there are its place in
    the index."""

    age: int
    pattern: RoutePattern
    endpoint: Endpoint
    methods: frozenset[str]
    shape: Shape
    key: Any

    @classmethod
    def of(cls, age: int, pattern: RoutePattern, endpoint: Endpoint, methods: frozenset[str]) -> PatternRoute:
        shape = _shape(pattern)
        return cls(age, pattern, endpoint, methods, shape, shape.key_of(pattern.route.split("/")))


class _Table:
    """The patterns of one shape, keyed by their literal segments."""

    def __init__(self, shape: Shape) -> None:
        self.segments = shape.segments
        self._key_of = itemgetter(*shape.literal_at)
        self._patterns: dict[Any, list[PatternRoute]] = {}

    def add(self, route: PatternRoute) -> None:
        self._patterns.setdefault(route.key, []).append(route)

    def at(self, segments: list[str]) -> Sequence[PatternRoute]:
        return self._patterns.get(self._key_of(segments), ())


class RouteIndex:
    """One table for each shape of patterns. A look-up takes time in the number of shapes, which are few, and not in the number of
    patterns."""

    def __init__(self, routes: Iterable[PatternRoute]) -> None:
        tables: dict[Shape, _Table] = {}
        for route in routes:
            table = tables.get(route.shape)
            if table is None:
                table = tables[route.shape] = _Table(route.shape)
            table.add(route)
        self._open = [table for shape, table in tables.items() if shape.is_open]
        self._closed: dict[int, list[_Table]] = {}
        for shape, table in tables.items():
            if not shape.is_open:
                self._closed.setdefault(shape.segments, []).append(table)

    def __repr__(self) -> str:
        return f"<RouteIndex, {len(self._open) + sum(map(len, self._closed.values()))} shapes>"

    def find(self, path: str) -> Sequence[PatternRoute]:
        """Returns all patterns that may match, oldest first. They still have to be tried: some may not match."""
        found = self._look_up(path)
        if path[-1:] == "\n":  # `$` also matches before a final line feed, so a pattern may match the path without it
            found = list({route.age: route for route in (*found, *self._look_up(path[:-1]))}.values())
        if len(found) > 1:
            found.sort(key=attrgetter("age"))
        return found

    def _look_up(self, path: str) -> list[PatternRoute]:
        segments = path.split("/")
        found: list[PatternRoute] = []
        for table in self._closed.get(len(segments), ()):
            found += table.at(segments)
        for table in self._open:
            if len(segments) >= table.segments:
                found += table.at(segments)
        return found


class PrefixIndex(Generic[T]):
    """Routes that are prefixes, `/` or `/v1`, and what each leads to. A look-up takes time in the number of segments of the deepest prefix,
    and not in the number of prefixes or in the length of the path."""

    def __init__(self, prefixes: Mapping[str, T]) -> None:
        self._at = {route.rstrip("/"): target for route, target in prefixes.items()}
        self._depth = max((prefix.count("/") for prefix in self._at), default=-1)

    def __repr__(self) -> str:
        return f"<PrefixIndex of {len(self._at)}>"

    def find(self, path: str) -> T | None:
        """Returns what the longest prefix of the path leads to. A prefix ends where a segment ends: `/v1` is none of `/v10`."""
        if self._depth < 0 or path[:1] != "/":
            return None
        segments = path.split("/", self._depth + 1)
        for end in range(min(len(segments), self._depth + 1), 0, -1):
            found = self._at.get("/".join(segments[:end]))
            if found is not None:
                return found
        return None


def _shape(pattern: RoutePattern) -> Shape:
    segments, variables = pattern.route.split("/"), iter(pattern.variables)
    spans = [any([next(variables).may_span for _ in range(segment.count("{"))]) for segment in segments]
    count = len(segments)
    open_from, open_to = (spans.index(True), count - spans[::-1].index(True)) if any(spans) else (count, count)
    from_the_left = [at for at in range(open_from) if "{" not in segments[at]]
    from_the_right = [at - count for at in range(open_to, count) if "{" not in segments[at]]
    return Shape(count, any(spans), (*from_the_left, *from_the_right))
