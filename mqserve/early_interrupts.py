"""Handles Ctrl-C while the command line imports, which takes half a second: the process ends at once, without a traceback.

It is imported before all else. In other programs it does nothing.
"""

import os
import signal
import sys
from itertools import pairwise


def _is_command_line() -> bool:
    if sys.argv[:1] == ["-m"]:  # while `python -m mqserve` looks for its module
        return ("-m", "mqserve") in pairwise(sys.orig_argv)
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "mqserve"


def _end_quietly(number: int, frame: object) -> None:
    os._exit(128 + number)


if _is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_quietly)
