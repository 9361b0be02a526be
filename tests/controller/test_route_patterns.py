"""Routes compile to matchers that are linear in the path, or are refused with a sentence."""

import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from starlette.convertors import Convertor

from mqserve.broker.errors import BadValue
from mqserve.controller.state.linear_regex import read_row
from mqserve.controller.state.route_patterns import MAX_WAYS, check_convertor, compile_route
from tests.convertors import Matching, known

LONGEST = 60 * 1024

KNOWN = known(
    word="[a-z]+",
    year=r"\d{4}",
    date=r"\d{4}-\d{2}",
    signed=r"-?\d+",
    size="small|large",
    code="[A-Z]{2}[0-9]{1,3}",
    address=r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}",
    slug="[a-z]+(-[a-z]+)*",
    nested="([a-z]+)*",
    pair=r"\d+-\d+",
    any=".+",
    name=r"\w+ \w+",
)


@pytest.fixture
def without_re2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)


def texts(route: str, path: str) -> list[str] | None:
    found = compile_route(route, KNOWN).match(path)
    return None if found is None else [text for _, _, text in found]


# What a path means. That it is what Starlette makes of it, tests/fuzz/test_routes.py tells.

MATCHES: list[tuple[str, str, list[str] | None]] = [
    ("/a", "/a", []),
    ("/a", "/a/", None),
    ("/{a}", "/x y", ["x y"]),
    ("/{a}", "/", None),
    ("/{a}", "/x/", None),
    ("/{name}.{ext}", "/a.tar.gz", ["a.tar", "gz"]),
    ("/{name}.{ext}", "/a.", None),
    ("/{name}.{ext}", "/.a", None),
    ("/{name}.{ext}", "/..a", [".", "a"]),
    ("/d/{year}-{month}-{day}", "/d/2024-05-06", ["2024", "05", "06"]),
    ("/d/{year}-{month}-{day}", "/d/1-2-3-4-5", ["1-2-3", "4", "5"]),
    ("/d/{year}-{month}-{day}", "/d/---", None),
    ("/d/{year}-{month}-{day}", "/d/-----", ["-", "-", "-"]),
    ("/{a}{b}{c}/", "/abcde/", ["abc", "d", "e"]),
    ("/{a}{b}", "/a", None),
    ("/x-{a}--{b}.json", "/x-1---2.json", ["1-", "2"]),
    ("/{a:int}-{b:int}.{c:float}", "/1-2.3.4", ["1", "2", "3.4"]),
    ("/{p:path}", "/", [""]),
    ("/{p:path}", "/a//b/", ["a//b/"]),
    ("/{p:path}/raw", "/a/raw/raw", ["a/raw"]),
    ("/{p:path}/v{n:int}", "/a/v1/b/v2", ["a/v1/b", "2"]),
    ("/{a}/{p:path}/{b}", "/1/2/3/4", ["1", "2/3", "4"]),
    ("/{a}", "/x\n", ["x\n"]),
    ("/{n:int}", "/5\n", ["5"]),
    ("/{p:path}", "/x\n", ["x"]),
    ("/{p:path}", "/x\ny", None),
    ("/{n:signed}", "/-5", ["-5"]),
    ("/{s:size}.{c:code}", "/large.DE12", ["large", "DE12"]),
]
MATCHES_OF_RE2: list[tuple[str, str, list[str] | None]] = [
    ("/{p:path}.{ext}", "/a/b.tar.gz", ["a/b.tar", "gz"]),
    ("/{a:path}/x/{b:path}", "/1/x/2/x/3", ["1/x/2", "3"]),
    ("/{b}{a:int}", "/abc123", ["abc12", "3"]),
    ("/{s:slug}", "/a-b-c", ["a-b-c"]),
    ("/{s:slug}", "/a-b-", None),
    ("/{n:name}", "/Jürgen Großmann\n", ["Jürgen Großmann"]),
    ("/{n:pair}", "/\u0663-4", ["\u0663-4"]),
]


@pytest.mark.parametrize(("route", "path", "expected"), MATCHES)
def test_a_route_matches_with_nothing_extra_installed(without_re2: None, route: str, path: str, expected: list[str] | None) -> None:
    assert texts(route, path) == expected


@pytest.mark.parametrize(("route", "path", "expected"), MATCHES_OF_RE2)
def test_a_route_that_needs_re2_matches_with_it(route: str, path: str, expected: list[str] | None) -> None:
    assert texts(route, path) == expected


def test_parameters_carry_the_names_of_their_convertors_in_the_order_of_the_route() -> None:
    assert compile_route("/{b}-{a}/{c:int}", KNOWN).match("/x-y/1") == (("b", "str", "x"), ("a", "str", "y"), ("c", "int", "1"))


def test_half_a_surrogate_pair_is_in_no_path_that_re2_matches() -> None:
    assert texts("/{p:path}.{ext}", "/a.\udc80") is None


# Linear time.

HOSTILE: list[tuple[str, str, str, str]] = [  # what begins the path, is repeated in it and ends it
    ("/d/{year}-{month}-{day}", "/d/", "-", "/"),
    ("/{name}.{ext}", "/", ".", "/"),
    ("/{a}{b}{c}{d}", "/", "a", "/"),
    ("/{a}/{b}-{c}/{d}", "/", "-/", ""),
    ("/{a:int}-{b:int}-{c:int}", "/", "1", "!"),
    ("/{a:float}-{b:float}", "/", "1.", "!"),
    ("/{p:path}/{a}/{b}", "/", "/", "\n\n"),
    ("/{p:path}/a{n:int}b", "/", "/a1", "!"),
    ("/{p:path}/{a:float}", "/", "/1.1", "!"),
    ("/{w:word}{n:int}x", "/", "a", "!"),
    ("/{s:signed}", "/", "1", "!"),
    ("/{p:path}/{a:address}", "/", "/1.1.1.1", "!"),
    ("/{p:path}.{ext}", "/", ".", "/"),
    ("/{a:path}/x/{b:path}", "/", "/x", "\n\n"),
    ("/{a:path}/{b:path}/{c:path}", "/", "/", "\n\n"),
    ("/{a}{n:int}{b}{m:int}", "/", "1", "/"),
    ("/{s:slug}/", "/", "a-", "!"),
    ("/{n:nested}/", "/", "a", "!"),
    ("/{a:any}{b:any}", "/", "a", "\n\n"),
]


def seconds(call: Callable[[], object]) -> float:
    """The least of a few."""
    taken = math.inf
    for _ in range(5):
        began = time.perf_counter()
        call()
        taken = min(taken, time.perf_counter() - began)
    return taken


@pytest.mark.parametrize(("route", "begin", "repeated", "end"), HOSTILE)
def test_a_path_of_twice_the_length_takes_about_twice_as_long(route: str, begin: str, repeated: str, end: str) -> None:
    """Up to the longest that a proxy takes. Backtracking is seen long before: it would take four times as long, or eight."""
    pattern, before, length = compile_route(route, KNOWN), math.inf, 120
    while length <= LONGEST:
        path = begin + repeated * (length // len(repeated)) + end
        took = seconds(lambda path=path: pattern.match(path))  # type: ignore[misc]
        assert took < max(3.2 * before, 0.01), f"{length} characters took {took:.4f} s, and half of it {before:.4f} s"
        before, length = took, 2 * length


@pytest.mark.parametrize("route", [route for route, *_ in HOSTILE[12:]] + [route for route, _, _ in MATCHES_OF_RE2])
def test_a_route_that_re_could_take_long_for_is_refused_without_re2(without_re2: None, route: str) -> None:
    with pytest.raises(BadValue, match=r"in linear time by Python's re, since .*: .*, or install google-re2 .*mqserve\[re2\]"):
        compile_route(route, KNOWN)


def test_a_package_that_is_only_called_re2_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", types.ModuleType("re2"))
    with pytest.raises(BadValue, match="install google-re2"):
        compile_route("/{s:slug}", KNOWN)


def test_the_divisions_of_all_convertors_of_a_route_count(without_re2: None) -> None:
    compile_route("/{a:address}", KNOWN)
    with pytest.raises(BadValue, match="in linear time"):
        compile_route("/{a:address}/{b:address}", KNOWN)


ROWS = {
    "": (True, 1), "abc": (True, 1), "[a-z]+": (False, 1), r"[0-9]{4}-\d{2}": (True, 1), ".*": (False, 1), "-?[0-9]+": (False, 2),
    r"[]a-z\]]+x": (False, 1), r"\.[^]/]*": (False, 1), "[a-z]{2,5}": (False, 1), "a{2,5}b{1,3}": (False, 3), "ab|cd": (True, 2),
    "ab|c": (False, 2), "a?b?c?": (False, 4), "[a-z]{2,}": (False, 1), "[a-z]+|[0-9]+": (False, 2), r"\W\-": (True, 1),
}  # fmt: skip
NO_ROWS = ["(a)", "(?:ab)+", "a+b+", "a*?", "a++", "^a", "a$", r"\bA", r"a\1", "(?i:a)", "(?=a)", "a{,3}", r"\x41", "[a-z]+[0-9]*"]


@pytest.mark.parametrize("regex", ROWS)
def test_a_row_of_classes_is_read(regex: str) -> None:
    row = read_row(regex)
    assert row is not None and (row.fixed, row.ways) == ROWS[regex]


@pytest.mark.parametrize("regex", NO_ROWS)
def test_any_other_regex_is_none(regex: str) -> None:
    assert read_row(regex) is None


def test_the_everyday_rows_are_below_the_limit() -> None:
    assert all(row.ways <= MAX_WAYS for regex in ROWS if (row := read_row(regex)) is not None)


# What is refused.


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize(
    ("regex", "says"),
    [
        ("(?=a)[a-z]+", "nor by RE2 \\(invalid perl operator"),
        (r"([a-z])\1", "nor by RE2 \\(invalid escape sequence"),
        ("(a|b){5000}", "nor by RE2 \\(invalid repetition size"),
        ("[a-z]+-?[a-z]+$", r"nor by RE2 \(it gives \$ another meaning\)"),
        (r"\b[a-z]+-[a-z]+", r"nor by RE2 \(it gives \\b another meaning"),
        (r"[^\W\d]+-[a-z]+", "another meaning"),
        (r"[[:alpha:]+-[a-z]+", "another meaning"),
        ("[a-z", "has no regex that a route can hold"),
        ("a)|(b", "has no regex that a route can hold"),
        ("(?i)[a-z]+", r"has no regex that a route can hold \(global flags .*write flags as \(\?i:…\)"),
        ("(?P<inner>a)", "without named groups"),
    ],
)
def test_a_regex_that_cannot_be_matched_is_refused(regex: str, says: str) -> None:
    with pytest.raises(BadValue, match=says):
        compile_route("/{x:odd}", known(odd=regex))


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_what_re2_means_by_a_class_is_what_re_means() -> None:
    for regex, text in [
        (r"(?:\d\w\s)+", "\u06f3ß\u2003"),
        (r"(?:\D\W\S)+", "a-\u0301"),
        (r"(?:[\d-][\w.])+", "\u06f3é"),
        ("(?:a{,2}b)+", "aab"),
    ]:
        assert compile_route("/{x:odd}", known(odd=regex)).match(f"/{text}") == (("x", "odd", text),)


class NoConvertor:
    pass


class Raising(Convertor[Any]):
    @property
    def regex(self) -> str:  # type: ignore[override]
        raise LookupError("no regex today")


class OfBytes(Matching):
    regex: ClassVar[Any] = b"[a-z]+"

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("convertor", [NoConvertor(), Raising(), OfBytes(), Matching("["), None])
def test_what_is_no_convertor_is_refused_where_it_is_registered_and_where_it_is_used(convertor: Any) -> None:
    for attempt in (lambda: check_convertor("odd", convertor, []), lambda: compile_route("/{x:odd}", {"odd": convertor})):
        with pytest.raises(BadValue, match="convertor 'odd'"):
            attempt()


def test_a_convertor_is_refused_if_a_route_that_names_it_could_not_be_matched_any_more(without_re2: None) -> None:
    routes = ["/a/{x:word}", "/b/{x:other}", "/c", "/d/{x:word}/{y:of_another_client}"]
    check_convertor("word", Matching("[A-Z]+"), routes, KNOWN)
    check_convertor("unused", Matching("([a-z]+)*"), routes, KNOWN)
    with pytest.raises(BadValue, match=r"route '/a/\{x:word\}' cannot be matched"):
        check_convertor("word", Matching("([a-z]+)*"), routes, KNOWN)


# Convertors that refuse.


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyError("x"), RecursionError, SystemExit(1), GeneratorExit, Odd])
def test_a_convertor_that_raises_anything_does_not_match(error: Any) -> None:
    def refuse(text: str) -> str:
        if text == "no":
            raise error
        return text

    pattern = compile_route("/{x:picky}", {"picky": Matching("[a-z]+", refuse)})
    assert pattern.match("/yes") == (("x", "picky", "yes"),)
    assert pattern.match("/no") is None


def test_a_number_that_int_does_not_take_does_not_match() -> None:
    assert compile_route("/{n:int}").match("/" + "9" * 5000) is None


def test_a_pattern_is_current_until_one_of_its_convertors_is_another() -> None:
    convertors = known(word="[a-z]+", other="[0-9]+")
    pattern, literal = compile_route("/{x:word}", convertors), compile_route("/x", convertors)
    convertors["other"] = Matching("[0-7]+")
    assert pattern.is_current(convertors)
    convertors["word"] = Matching("[A-Z]+")
    assert not pattern.is_current(convertors) and literal.is_current(convertors)
