"""Gives a process the `__main__` that the user's code expects: the file under `mqserve run`, in the program and in its replicas."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..files.roots import root_of_file
from . import definitions


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file that only declares what is to be served, so that each replica may execute it."""

    path: Path
    source: bytes

    @classmethod
    def read(cls, path: Path) -> RunFile:
        """Raises OSError."""
        return cls(path.absolute(), path.read_bytes())  # the file may change the working directory

    def __repr__(self) -> str:
        return f"<RunFile {self.path}>"

    @property
    def home(self) -> str:
        """Processes that execute the same source have the same definitions, and so the same home."""
        return f"run-{hashlib.sha256(self.source).hexdigest()[:16]}"

    def execute(self) -> None:
        """Executes it as `python FILE` would, and registers it under its own name, so that importing that does not execute it again. Raises
        what the file raises."""
        module = _become_main(self.home, stands_in=False)
        module.__file__ = str(self.path)
        sys.modules["__mp_main__"] = module
        for name in self._names:
            sys.modules.setdefault(name, module)
        exec(compile(self.source, str(self.path), "exec", dont_inherit=True), module.__dict__)
        definitions.name_definitions()

    @property
    def _names(self) -> list[str]:
        """The names by which modules may import the file: its own, and inside a package the one with the names of the packages."""
        dotted = self.path.relative_to(root_of_file(self.path)).with_suffix("").parts
        return [name for name in dict.fromkeys([self.path.stem, ".".join(dotted)]) if name.replace(".", "_").isidentifier()]


def stand_in_for(home: str) -> None:
    """Makes an empty `__main__`, which stands for the `__main__` of that home from now on, and gets its definitions as they arrive."""
    _become_main(home, stands_in=True)


def _become_main(home: str, *, stands_in: bool) -> ModuleType:
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    definitions.settle_at(home, stands_in=stands_in)
    return module
