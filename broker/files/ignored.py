"""Decides which files stay behind when code travels: secrets, environments, caches, and what `.gitignore` and `.mqserveignore` name."""

from __future__ import annotations

import re
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple, Self

IGNORE_FILE = ".mqserveignore"
_SECRET = (
    ".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", "credentials*.json", "application_default_credentials.json",
    "service-account*.json", "service_account*.json", "*.tfstate", "*.tfstate.*",
)  # fmt: skip
_NEVER = (
    ".git", ".hg", ".svn", ".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".terraform",
    ".venv", "venv", "node_modules", ".tox", ".nox", "__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".ipynb_checkpoints", ".DS_Store",
)  # fmt: skip
_SECRET_NAME = re.compile("|".join(map(translate, _SECRET)), re.IGNORECASE)
_NEVER_NAME = re.compile("|".join(map(translate, _NEVER)))


def is_never_taken(path: Path) -> bool:
    """Whether its name says so, or it is the folder of a Python environment. No ignore file can take it back."""
    if _SECRET_NAME.match(path.name) or _NEVER_NAME.match(path.name):
        return True
    return path.is_dir() and ((path / "pyvenv.cfg").exists() or (path / "conda-meta").exists())


class Rule(NamedTuple):
    """One line of an ignore file, as gitignore(5) defines it."""

    file: Path
    line: str
    pattern: re.Pattern[str]
    takes_back: bool
    folders_only: bool

    @classmethod
    def read(cls, line: str, file: Path) -> Self | None:
        """Returns None for a comment, and like git for a line with a range that no character is in."""
        text = line.rstrip("\n").rstrip()
        if not text or text.startswith("#"):
            return None
        takes_back, text = text.startswith("!"), text.removeprefix("!").removeprefix("\\")
        folders_only, text = text.endswith("/"), text.rstrip("/")
        is_anchored, text = "/" in text, text.lstrip("/")
        regex = _regex(text)
        try:
            pattern = re.compile(regex if is_anchored else f"(?:.*/)?{regex}")
        except re.error:
            return None
        return cls(file, line.strip(), pattern, takes_back, folders_only)

    def names(self, path: Path, *, is_folder: bool) -> bool:
        if (self.folders_only and not is_folder) or not path.is_relative_to(self.file.parent):
            return False
        return self.pattern.fullmatch(path.relative_to(self.file.parent).as_posix()) is not None


class Rules(NamedTuple):
    """The lines that hold in a folder, those of outer folders first. The last one that matches decides, and a line of any `.mqserveignore`
    comes after those of all `.gitignore` files."""

    of_git: tuple[Rule, ...] = ()
    of_ours: tuple[Rule, ...] = ()

    @classmethod
    def above(cls, root: Path) -> Self:
        """Returns those of the `.gitignore` files in the folders above `root`, up to the repository's own folder."""
        above: list[Path] = []
        for folder in root.parents:
            above.append(folder)
            if (folder / ".git").exists():
                break
        else:
            return cls()
        if (root / ".git").exists():
            return cls()
        return cls(tuple(rule for folder in reversed(above) for rule in _read(folder / ".gitignore")))

    def inside(self, folder: Path) -> Rules:
        return Rules((*self.of_git, *_read(folder / ".gitignore")), (*self.of_ours, *_read(folder / IGNORE_FILE)))

    def find_ignoring(self, path: Path, *, is_folder: bool) -> Rule | None:
        """Returns the line that ignores the path, if one does."""
        for rule in (*reversed(self.of_ours), *reversed(self.of_git)):
            if rule.names(path, is_folder=is_folder):
                return None if rule.takes_back else rule
        return None


def line_for(path: str) -> str:
    """Returns the line of an ignore file that takes back this path and no other."""
    return "!/" + re.sub(r"([*?\[\\])", r"\\\1", path)


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
