"""Convertors for tests: of any regex, with names that no other test has."""

from collections.abc import Callable
from typing import Any

from starlette.convertors import CONVERTOR_TYPES, Convertor


class Matching(Convertor[Any]):
    """Of this regex; converts by `convert`."""

    def __init__(self, regex: str, convert: Callable[[str], Any] = str) -> None:
        self.regex = regex  # type: ignore[misc]
        self._convert = convert

    def convert(self, value: str) -> Any:
        return self._convert(value)

    def to_string(self, value: Any) -> str:
        return str(value)


def known(**regexes: str) -> dict[str, Convertor[Any]]:
    """Starlette's own, and one of each regex."""
    return {**CONVERTOR_TYPES, **{name: Matching(regex) for name, regex in regexes.items()}}
