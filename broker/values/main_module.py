"""The program's `__main__` where it is not the file that Python was started with: a file under `mqserve run`, and in its replicas."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import pickling


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file that declares what is to be served, and so may be executed in each replica."""

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
        """All who execute the same file have the same definitions."""
        return f"run-{hashlib.sha256(self.source).hexdigest()[:16]}"

    def execute(self) -> None:
        """As `python FILE` would, but an `import` of its own name finds it, rather than execute it again. Raises what the file raises."""
        module = become_main(self.home)
        module.__file__ = str(self.path)
        sys.modules["__mp_main__"] = module
        if self.path.stem.isidentifier():
            sys.modules.setdefault(self.path.stem, module)
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def become_main(home: str) -> ModuleType:
    """An empty `__main__`, which stands for the one of that home from now on."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    pickling.settle_at(home)
    return module
