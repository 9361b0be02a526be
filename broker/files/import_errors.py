"""Explains why a replica cannot import what was deployed to it, and says the mend."""

from __future__ import annotations

import importlib.machinery
import posixpath
import socket
import sys
from pathlib import Path

from .manifest import Folder
from .transfer import Restored


def shadowed(restored: Restored) -> str:
    """Returns an error message if a module beside the user's code has the name of one that was loaded from elsewhere, else ''."""
    for top in dict.fromkeys(name.partition(".")[0] for name in restored.manifest.modules):
        loaded = getattr(sys.modules.get(top), "__file__", None)
        if not loaded or top == "mqserve" or any(Path(loaded).is_relative_to(root) for root in restored.roots):
            continue
        ours = [file for path in restored.paths for file in (path / f"{top}.py", path / top / "__init__.py") if file.exists()]
        if ours and not _is_copy(Path(loaded), ours[0]):
            return (
                f"the module {top!r} beside the code has the name of one that a replica has loaded already, from {loaded}: "
                "give yours another name"
            )
    return ""


def _is_copy(loaded: Path, ours: Path) -> bool:
    """Whether the module is the deployed one, from its place on the machine that deployed it: a process may have imported it before."""
    return loaded.name == ours.name and loaded.read_bytes() == ours.read_bytes()


def mend_of(error: ImportError, restored: Restored) -> str:
    """Returns the cause and the mend, or '' for an ImportError that says enough itself."""
    if isinstance(error, ModuleNotFoundError):
        return _why_missing(error.name or "", restored)
    if error.path and error.path.endswith((".so", ".pyd")) and any(Path(error.path).is_relative_to(root) for root in restored.roots):
        return f"it is compiled for another machine or another Python than {sys.executable} on {socket.gethostname()}: build it for that"
    return ""


def _why_missing(name: str, restored: Restored) -> str:
    for folder in restored.manifest.folders:
        for path in folder.paths:
            if why := _why_missing_in(folder, posixpath.join(path, name.replace(".", "/"))):
                return why
    origins = ", ".join(folder.origin for folder in restored.manifest.folders)
    return (
        f"it is neither installed for {sys.executable} on {socket.gethostname()} nor among the files that travelled from {origins}: "
        "install it there or by actor_options pip, or put it beside the code"
    )


def _why_missing_in(folder: Folder, module: str) -> str:
    """`module` is its path in the folder, without a suffix. Returns '' if it never was there."""
    for left_out in folder.left_out:
        if left_out.keeps_back(module):
            return f"{folder.origin}/{left_out.path} did not travel, since {left_out.why}: {left_out.mend}"
    for file in folder.files:
        if file.path.startswith(f"{module}.") and file.path.endswith((".so", ".pyd")):
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            return (
                f"{folder.origin}/{file.path} is compiled for another Python than this replica's, which takes {suffix}: build it for "
                "that, or give the backend the right interpreter by actor_options python"
            )
    return ""
