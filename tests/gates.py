"""Gates for handlers to wait at, in whatever process they run: files, so that handlers need nothing but this module."""

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Gate:
    """Closed until `open`. Handlers `pass_through` it; the test sees how many came to it, and how many were there at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"gate-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir()

    def __repr__(self) -> str:
        return f"<Gate {'open' if self._open_file.exists() else 'closed'}, {self.came} came>"

    @property
    def came(self) -> int:
        return len(list(self._folder.glob("came-*")))

    @property
    def names(self) -> list[str]:
        """The names that `pass_through` was told, in no order."""
        return [path.read_text() for path in self._folder.glob("came-*")]

    def open(self) -> None:
        self._open_file.touch()

    def pass_through(self, name: str = "") -> None:
        self._arrive(name)
        while not self._open_file.exists():
            time.sleep(0.005)

    async def pass_through_async(self, name: str = "") -> None:
        self._arrive(name)
        while not self._open_file.exists():
            await asyncio.sleep(0.005)

    @property
    def _open_file(self) -> Path:
        return self._folder / "open"

    def _arrive(self, name: str) -> None:
        arrival = uuid.uuid4().hex
        (self._folder / f"new-{arrival}").write_text(name)
        (self._folder / f"new-{arrival}").rename(self._folder / f"came-{arrival}")


def work_behind(gate: Gate) -> Callable[[Any], int]:
    """A handler that returns its process id; a POST waits at the gate."""

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through()
        return os.getpid()

    return work
