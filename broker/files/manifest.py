"""Folders as bytes: files are cut into chunks, which are stored under their hashes, and the manifest lists the chunks of each file.

The manifest itself is stored under its hash, and the sealed record of the code names that hash. So the seal of the record
covers every byte.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import UNPARSABLE, BadEnvelope, BadValue
from .walk import LeftOut, walk

CHUNK_BYTES = 1024 * 1024
MAX_BYTES = 100 * 1024 * 1024
MAX_FILES = 20_000
MAX_LEFT_OUT = 200
KEPT_BYTES = 64 * 1024
RECENT_S = 60.0

_INSIDE = r"\A(?!/)(?!(?:[^\0]*/)?\.\.(?:/|\Z))[^\0]*\Z"
Inside = Annotated[str, msgspec.Meta(pattern=_INSIDE)]
"""A path with slashes that does not lead out of the folder that it is relative to. msgspec checks it on arrival, as it does the next."""
Hash = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class File(msgspec.Struct, frozen=True, array_like=True):
    path: Annotated[str, msgspec.Meta(pattern=_INSIDE, min_length=1)]
    size: int
    chunks: tuple[Hash, ...]
    executable: bool = False

    def is_at(self, path: Path) -> bool:
        """Whether the file there has this content."""
        try:
            facts = path.lstat()
            return stat.S_ISREG(facts.st_mode) and facts.st_size == self.size and _hash_chunks(path) == self.chunks
        except OSError:
            return False


class Folder(msgspec.Struct, frozen=True):
    """`origin` is the path on the machine that deployed it, for messages. `paths` are the folders in it that go on `sys.path`."""

    origin: str
    files: tuple[File, ...]
    paths: tuple[Inside, ...] = ("",)
    left_out: tuple[LeftOut, ...] = ()

    def has(self, path: str) -> bool:
        return any(file.path == path for file in self.files)


class Manifest(msgspec.Struct, frozen=True):
    """`modules` are those that the deploying program had imported from the folders."""

    folders: tuple[Folder, ...]
    modules: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @property
    def chunks(self) -> frozenset[str]:
        return frozenset(chunk for folder in self.folders for file in folder.files for chunk in file.chunks)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        try:
            return msgspec.msgpack.decode(raw, type=cls)
        except UNPARSABLE as error:
            raise BadEnvelope(f"the list of files in the store does not parse ({error}): deploy the code again") from error


@dataclass(frozen=True)
class Files:
    """A manifest, and where its folders lie on this machine. `kept` holds the chunks of small files and of recently written ones, such as
    logs, in memory: on disk they may change before they are sent."""

    manifest: Manifest
    roots: tuple[Path, ...]
    kept: Mapping[str, bytes] = field(default_factory=dict)

    @functools.cached_property
    def raw(self) -> bytes:
        return self.manifest.to_bytes()

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()

    def read(self, chunk: str, source: tuple[Path, int]) -> bytes:
        """Raises BadValue if the file has changed since."""
        return self.kept.get(chunk) or read_chunk(source, chunk)

    def sources(self) -> dict[str, tuple[Path, int]]:
        """Maps each chunk to (a file that has it, the offset in bytes)."""
        return {
            chunk: (root / file.path, number * CHUNK_BYTES)
            for root, folder in zip(self.roots, self.manifest.folders, strict=True)
            for file in folder.files
            for number, chunk in enumerate(file.chunks)
        }


def read_chunk(source: tuple[Path, int], sha256: str) -> bytes:
    """Raises BadValue if the file has changed since."""
    path, offset = source
    try:
        with path.open("rb") as file:
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
    except OSError as error:
        raise BadValue(f"{path} cannot be read any more ({error.strerror}): deploy again") from error
    if hashlib.sha256(chunk).hexdigest() != sha256:
        raise BadValue(f"{path} changed while it was being deployed: deploy again")
    return chunk


def read_folders(roots: dict[Path, tuple[str, ...]], modules: tuple[str, ...]) -> Files:
    """`roots` maps each folder to the paths in it that go on `sys.path`. Raises BadValue if the files are too large, too many, or
    unreadable."""
    folders: list[Folder] = []
    kept: dict[str, bytes] = {}
    left_bytes, left_files = MAX_BYTES, MAX_FILES
    for root, paths in roots.items():
        left_out: list[LeftOut] = []
        found = list(walk(root, left_out))
        _check_size(root, found, left_bytes, left_files)
        described = (_describe(root, path, facts, kept) for path, facts in found)
        files = tuple(file for file in described if file is not None)
        left_bytes, left_files = left_bytes - sum(file.size for file in files), left_files - len(files)
        folders.append(Folder(str(root), files, paths, tuple(left_out[:MAX_LEFT_OUT])))
    return Files(Manifest(tuple(folders), modules), tuple(roots), kept)


def _check_size(root: Path, found: list[tuple[Path, os.stat_result]], left_bytes: int, left_files: int) -> None:
    total = sum(facts.st_size for _, facts in found)
    if total > left_bytes:
        largest = sorted(found, key=lambda one: one[1].st_size, reverse=True)[:3]
        names = ", ".join(f"{path.relative_to(root)} ({_mib(facts.st_size)})" for path, facts in largest)
        raise BadValue(
            f"the folder {root} holds {_mib(total)}, and at most {_mib(MAX_BYTES)} of files travel with code; the largest: {names}. "
            f"Name what replicas do not need in {root / '.mqserveignore'} (as in a .gitignore), and give large data a path of its own"
        )
    if len(found) > left_files:
        raise BadValue(
            f"the folder {root} holds {len(found)} files, and at most {MAX_FILES} travel with code: "
            f"name what replicas do not need in {root / '.mqserveignore'}, as in a .gitignore"
        )


def _mib(size: int) -> str:
    return f"{size / 1024 / 1024:.1f} MiB"


def _describe(root: Path, path: Path, facts: os.stat_result, kept: dict[str, bytes]) -> File | None:
    """Returns None for a file that vanished since."""
    is_kept = facts.st_size <= KEPT_BYTES or time.time() - facts.st_mtime < RECENT_S
    try:
        if is_kept:
            content = path.read_bytes()[: facts.st_size]
            pieces = [(_sha256(piece), piece) for piece in _cut(content)]
            kept.update(pieces)
            chunks, size = tuple(sha256 for sha256, _ in pieces), len(content)
        else:
            chunks, size = _hashes(path, facts.st_size, facts.st_mtime_ns, facts.st_ino), facts.st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadValue(
            f"{path} cannot be read ({error.strerror}), and would travel with the code beside it: name it in {root / '.mqserveignore'}"
        ) from error
    return File(path.relative_to(root).as_posix(), size, chunks, bool(facts.st_mode & stat.S_IXUSR))


def _cut(content: bytes) -> list[bytes]:
    return [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]


def _sha256(piece: bytes) -> str:
    return hashlib.sha256(piece).hexdigest()


@functools.lru_cache(maxsize=MAX_FILES)
def _hashes(path: Path, size: int, mtime_ns: int, inode: int) -> tuple[str, ...]:
    """Hashes a file once for as long as its size, time and inode stay the same."""
    return _hash_chunks(path)


def _hash_chunks(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        return tuple(_sha256(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))
