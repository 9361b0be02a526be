"""Explains why a replica cannot import what was deployed to it, and says the mend."""

from __future__ import annotations

import importlib.machinery
import socket
import sys
from pathlib import Path

from .transfer import Restored


def shadowed(restored: Restored) -> str:
    """Returns an error message if a module beside the user's code has the name of one that was loaded from elsewhere, else ''."""
    for name in restored.manifest.modules:
        top = name.partition(".")[0]
        loaded = getattr(sys.modules.get(top), "__file__", None)
        if loaded and top != "mqserve" and not any(Path(loaded).is_relative_to(root) for root in restored.roots):
            if not any(Path(path, top).exists() or Path(path, f"{top}.py").exists() for path in restored.paths):
                continue
            return (
                f"the module {top!r} beside the code has the name of one that a replica has loaded already, from {loaded}: "
                "give yours another name"
            )
    return ""


def way_out(error: ImportError, restored: Restored) -> str:
    """Returns the cause and the mend, or '' for an ImportError that says enough itself."""
    if isinstance(error, ModuleNotFoundError):
        return _why_missing(error.name or "", restored)
    if error.path and error.path.endswith((".so", ".pyd")) and any(Path(error.path).is_relative_to(root) for root in restored.roots):
        return f"it is compiled for another machine or another Python than {sys.executable} on {socket.gethostname()}: build it for that"
    return ""


def _why_missing(name: str, restored: Restored) -> str:
    path = name.replace(".", "/")
    for folder in restored.manifest.folders:
        for left_out, why in folder.left_out:
            if left_out in (path, f"{path}.py") or path.startswith(f"{left_out}/"):
                return f"{folder.origin}/{left_out} did not travel, since {why}: take it back by a line !{left_out} in .mqserveignore"
        for file in folder.files:
            if file.path.startswith(f"{path}.") and file.path.endswith((".so", ".pyd")):
                suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
                return (
                    f"{folder.origin}/{file.path} is compiled for another Python than this replica's, which takes {suffix}: build it for "
                    "that, or give the backend the right interpreter by actor_options python"
                )
    origins = ", ".join(folder.origin for folder in restored.manifest.folders)
    return (
        f"it is neither installed for {sys.executable} on {socket.gethostname()} nor among the files that travelled from {origins}: "
        "install it there or by actor_options pip, or put it beside the code"
    )
