"""Tallies for handlers to write to, in whatever process they run: one line per entry in a file."""

import os
import uuid
from pathlib import Path


class Tally:
    """What was noted so far, in order; `note` is atomic across processes and threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"tally-{uuid.uuid4().hex[:8]}"
        self._path.touch()

    def __repr__(self) -> str:
        return f"<Tally of {len(self)}: {self.lines[:20]}>"

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()

    def note(self, word: object = "") -> None:
        line = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(line, f"{word}\n".encode())
        finally:
            os.close(line)
