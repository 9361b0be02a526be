"""Walks a folder of code: yields the files that travel, and notes what stays behind though a program may import it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from .ignored import IGNORE_FILE, Rules, is_never_taken, line_for

_MODULES = (".py", ".so", ".pyd")
_OF_THE_SYSTEM = tuple(map(Path, ("/etc", "/run", "/proc", "/sys", "/dev")))  # containers have secrets in /run


class LeftOut(msgspec.Struct, frozen=True, array_like=True):
    """A module or folder that stays behind, why, and what to do about it."""

    path: str
    why: str
    mend: str

    def keeps_back(self, module: str) -> bool:
        """Whether a module lies here. `module` is its path, with or without a suffix."""
        if self.path == module or module.startswith(f"{self.path}/"):
            return True
        return self.path.startswith(f"{module}.") and "/" not in self.path.removeprefix(module)


class _Found(NamedTuple):
    path: Path
    facts: os.stat_result  # of the target, for a link
    is_folder: bool
    is_link: bool

    @property
    def is_importable(self) -> bool:
        if stat.S_ISDIR(self.facts.st_mode):
            return self.path.name.isidentifier() and self.path.name != "__pycache__"
        return self.path.suffix in _MODULES


def walk(root: Path, left_out: list[LeftOut]) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields regular files, and links to them. Appends to `left_out` what may be imported: data that comes and goes makes no new version of
    the code."""
    waiting = [(root, Rules.above(root))]
    while waiting:
        folder, rules = waiting.pop()
        rules = rules.inside(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # it vanished
        except OSError as error:
            left_out.append(LeftOut(_inside(root, folder), f"it cannot be read ({error.strerror})", "let this user read it"))
            continue
        for found in filter(None, map(_look_at, entries)):
            if reason := _why_left_out(found, rules, root):
                if found.is_importable:
                    left_out.append(LeftOut(_inside(root, found.path), *reason))
            elif found.is_folder:
                waiting.append((found.path, rules))
            else:
                yield found.path, found.facts


def _look_at(entry: os.DirEntry[str]) -> _Found | None:
    """Returns None for what vanished, for links that lead nowhere, for sockets and the like, and for names that no module can have."""
    try:
        entry.name.encode()
        found = _Found(Path(entry.path), entry.stat(), entry.is_dir(follow_symlinks=False), entry.is_symlink())
    except (OSError, UnicodeEncodeError):
        return None
    return found if stat.S_ISREG(found.facts.st_mode) or stat.S_ISDIR(found.facts.st_mode) else None


def _why_left_out(found: _Found, rules: Rules, root: Path) -> tuple[str, str] | None:
    """Returns (why, mend)."""
    if is_never_taken(found.path):
        return "its name is that of a secret, a cache or an environment", "give it another name"
    if rule := rules.find_ignoring(found.path, is_folder=found.is_folder):
        why = f"{rule.line!r} in {rule.file} names it"
        if rule.file.name == IGNORE_FILE:
            return why, "remove that line"
        return why, f"take it back by a line {line_for(_inside(root, found.path))} in {root / IGNORE_FILE}"
    if not found.is_link:
        return None
    if stat.S_ISDIR(found.facts.st_mode):
        return "it is a link to a folder, and such links are not followed", "put the folder itself there"
    if _leads_to_private(found.path, root):
        return "it is a link to a place that does not travel", "put a copy of the file there"
    return None


def _leads_to_private(link: Path, root: Path) -> bool:
    """Whether the file or a folder around it never travels. Outside the root this also holds for hidden folders and those of the system:
    programs keep tokens there."""
    target, root = link.resolve(), root.resolve()
    around = [target, *target.parents]
    if root in around:
        return any(map(is_never_taken, around[: around.index(root)]))
    return any(path.name.startswith(".") or path in _OF_THE_SYSTEM or is_never_taken(path) for path in around)


def _inside(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
