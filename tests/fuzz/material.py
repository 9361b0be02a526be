"""What the targets are fed: bytes and values that nobody would think of, the cases that once did harm, and a pickle that tells."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
SURROGATE = "\udc80"

any_text = st.text(st.characters(exclude_categories=()), max_size=40)  # surrogates too
good_text = st.text(st.characters(codec="utf-8"), max_size=60)
plain_atoms = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | good_text | st.binary(max_size=40)
plain = st.recursive(plain_atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(good_text, inner, max_size=4), max_leaves=12)
anything: st.SearchStrategy[Any] = st.recursive(
    plain_atoms | any_text | st.floats() | st.integers() | st.sampled_from([10**400, object(), int, ..., 1j, SURROGATE]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(0, 3) | any_text, inner, max_size=4)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | good_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(good_text, inner, max_size=4),
    max_leaves=12,
)


def cases(target: str) -> list[Any]:
    """The corpus of a target, to parametrize a test with."""
    return [pytest.param(path.read_bytes(), id=path.stem) for path in sorted((CORPUS / target).iterdir())]


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes after one to four accidents."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        until = min(len(raw), at + draw(st.integers(0, 8)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"])):
            case "flip" if at < len(raw):
                raw[at] ^= draw(st.integers(1, 255))
            case "cut":
                del raw[at:until]
            case "insert":
                raw[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                raw[at:at] = raw[at:until] * draw(st.integers(1, 40))
            case "end":
                del raw[at:]
    return bytes(raw)


def bytes_like(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, and these with accidents."""
    return st.binary(max_size=200) | st.sampled_from(valid).flatmap(mutated)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def bomb(mark: Path) -> bytes:
    """A pickle that makes the folder `mark` when it is opened."""
    return pickle.dumps(_Bomb(mark))
