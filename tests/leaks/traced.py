"""What a process keeps: the bytes that tracemalloc knows of after a collection, and the pages it holds.

`python -m tests.leaks.traced COMMAND…` is `mqserve COMMAND…`, which writes that into $TRACED_FILE whenever it gets SIGUSR1.
"""

import gc
import os
import re
import signal
import sys
import time
import tracemalloc
import urllib.parse
from pathlib import Path
from typing import NamedTuple

FILE_VARIABLE = "TRACED_FILE"
_TOLD_WITHIN_S = 60.0


class Kept(NamedTuple):
    """In bytes; without what Python keeps up to a limit of its own: compiled patterns and split URLs, some 500 of each, and 4,096 names in
    the cache of attributes, which pamqp fills with a new string for each field of a frame."""

    traced: int
    resident: int


def kept_here() -> Kept:
    re.purge()
    urllib.parse.clear_cache()  # type: ignore[attr-defined]
    sys._clear_type_cache()
    for _ in range(3):  # what a finalizer lets go is collected by the next one
        gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Kept(tracemalloc.get_traced_memory()[0], resident)


def kept_by(pid: int, file: Path) -> Kept:
    """Asks a process that runs this module."""
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + _TOLD_WITHIN_S
    while not file.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"process {pid} did not say within {_TOLD_WITHIN_S:g} s what it keeps")
        time.sleep(0.01)
    traced, resident = file.read_text().split()
    return Kept(int(traced), int(resident))


def _tell(number: int, frame: object) -> None:
    kept, file = kept_here(), Path(os.environ[FILE_VARIABLE])
    file.with_suffix(".new").write_text(f"{kept.traced} {kept.resident}")
    file.with_suffix(".new").rename(file)


if __name__ == "__main__":
    tracemalloc.start()
    signal.signal(signal.SIGUSR1, _tell)
    from mqserve.commands.cli import main

    sys.argv[0] = "mqserve"
    main()
