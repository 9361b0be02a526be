"""Gives a process the `__main__` that the user's code expects: the file under `mqserve run`, in the program and in its replicas."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import pickling


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file that only declares what is to be served, so that each replica may execute it."""

    path: Path
    source: bytes

    @classmethod
    def read(cls, path: Path) -> RunFile:
        """Raises OSError."""
        return cls(path, path.read_bytes())

    def __repr__(self) -> str:
        return f"<RunFile {self.path}>"

    @property
    def home(self) -> str:
        """Processes that execute the same source have the same definitions, and so the same home."""
        return f"run-{hashlib.sha256(self.source).hexdigest()[:16]}"

    def execute(self) -> None:
        """Executes it as `python FILE` would, and registers it under its own name, so that importing that does not execute it again. Raises
        what the file raises."""
        module = become_main(self.home)
        module.__file__ = str(self.path)
        sys.modules["__mp_main__"] = module
        if self.path.stem.isidentifier():
            sys.modules.setdefault(self.path.stem, module)
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def become_main(home: str) -> ModuleType:
    """Makes an empty `__main__`, which stands for the `__main__` of that home from now on."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    pickling.settle_at(home)
    return module
