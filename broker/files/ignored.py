"""Decides which files stay behind when code travels: secrets, environments, caches, and what `.gitignore` and `.mqserveignore` name."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, Self

IGNORE_FILES = (".gitignore", ".mqserveignore")  # the later one has the last word
_SECRET = (
    ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials",
)  # fmt: skip
_NEVER = (
    ".git", ".hg", ".svn", ".ssh", ".aws", ".gnupg", ".kube", ".docker",
    ".venv", "venv", "node_modules", ".tox", ".nox", "__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".ipynb_checkpoints", ".DS_Store",
)  # fmt: skip


def is_secret(name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in _SECRET)


def is_never_taken(path: Path) -> bool:
    """Whether its name says so, or it is the folder of a Python environment. No ignore file can take it back."""
    if is_secret(path.name) or any(fnmatch(path.name, pattern) for pattern in _NEVER):
        return True
    return path.is_dir() and ((path / "pyvenv.cfg").exists() or (path / "conda-meta").exists())


class Rule(NamedTuple):
    """One line of an ignore file, as gitignore(5) defines it."""

    folder: Path  # that the ignore file lies in
    pattern: re.Pattern[str]
    takes_back: bool
    folders_only: bool
    said_by: str

    @classmethod
    def read(cls, line: str, file: Path) -> Self | None:
        text = line.rstrip("\n").rstrip()
        if not text or text.startswith("#"):
            return None
        takes_back, text = text.startswith("!"), text.removeprefix("!").removeprefix("\\")
        folders_only, text = text.endswith("/"), text.rstrip("/")
        is_anchored, text = "/" in text, text.lstrip("/")
        regex = _regex(text)
        return cls(
            file.parent, re.compile(regex if is_anchored else f"(?:.*/)?{regex}"), takes_back, folders_only, f"{line.strip()!r} in {file}"
        )

    def names(self, path: Path, *, is_folder: bool) -> bool:
        if (self.folders_only and not is_folder) or not path.is_relative_to(self.folder):
            return False
        return self.pattern.fullmatch(path.relative_to(self.folder).as_posix()) is not None


def rules_above(root: Path) -> list[Rule]:
    """Returns the rules of the `.gitignore` files in the folders above `root`, up to the repository's own folder."""
    above: list[Path] = []
    for folder in root.parents:
        above.append(folder)
        if (folder / ".git").exists():
            break
    else:
        return []
    if (root / ".git").exists():
        return []
    return [rule for folder in reversed(above) for rule in _read(folder / ".gitignore")]


def rules_in(folder: Path) -> list[Rule]:
    return [rule for name in IGNORE_FILES for rule in _read(folder / name)]


def ignored_by(path: Path, rules: list[Rule], *, is_folder: bool) -> str:
    """Returns the line that ignores the path, in words, or ''. The last line that matches decides."""
    for rule in reversed(rules):
        if rule.names(path, is_folder=is_folder):
            return "" if rule.takes_back else rule.said_by
    return ""


def _read(file: Path) -> list[Rule]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [rule for line in lines if (rule := Rule.read(line, file)) is not None]


def _regex(glob: str) -> str:
    """Translates a glob: `*` and `?` match no slash, `**` does."""
    written, at = "", 0
    while at < len(glob):
        if glob.startswith("**/", at):
            written, at = written + "(?:.*/)?", at + 3
        elif glob.startswith("/**", at) and at + 3 == len(glob):
            written, at = written + "/.+", at + 3
        elif glob[at] == "*":
            written, at = written + "[^/]*", at + 1
        elif glob[at] == "?":
            written, at = written + "[^/]", at + 1
        elif glob[at] == "[" and (end := glob.find("]", at + 2)) > 0:
            inside = glob[at + 1 : end].replace("\\", "\\\\").replace("!", "^", 1) if glob[at + 1] == "!" else glob[at + 1 : end]
            written, at = written + f"[{inside}]", end + 1
        else:
            at += glob[at] == "\\" and at + 1 < len(glob)
            written, at = written + re.escape(glob[at]), at + 1
    return written
