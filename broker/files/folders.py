"""Collects the folders that travel with a backend: those of its modules and of the modules that these use, and the run file's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from ..errors import BadValue
from . import roots
from .ignored import IGNORE_FILE, line_for
from .manifest import Files, read_folders
from .stale_modules import has_changed

Folders = dict[Path, tuple[str, ...]]
"""Folder -> the paths in it that go on `sys.path`, in the order in which they stand there."""


class ExecutedFile(Protocol):
    """The program's `__main__`, if replicas may execute it, and what it was when the program executed it."""

    @property
    def path(self) -> Path: ...
    @property
    def source(self) -> bytes: ...


def read_files(modules: set[str], run_file: ExecutedFile | None) -> Files | None:
    """Returns None if there is no folder. Raises BadValue if the folder of one of the modules cannot travel, an ignore file keeps back its
    file, or replicas would run other code than this program has."""
    found = folders_of(modules, run_file)
    if not found:
        return None
    loaded = tuple(name for root in roots.folders_reached(modules) for name in roots.modules_in(root))
    _check_unchanged(loaded, run_file)
    files = read_folders(found, loaded)
    for name in modules:
        module = sys.modules.get(name)
        if module is not None and roots.root_of(module) is not None:
            name_of_file(Path(str(module.__file__)), files)
    return files


def folders_of(modules: set[str], run_file: ExecutedFile | None) -> Folders:
    """Returns the run file's folder first, the others in the order of `sys.path`. Raises BadValue for a folder that cannot travel, if one
    of the modules lies in it."""
    needed = {roots.root_of(sys.modules.get(name)) for name in modules}
    found: Folders = {}
    if run_file is not None:
        path = run_file.path.absolute()
        root = roots.root_of_file(path)
        roots.check_root(root, str(path))
        beside = _inside(root, path.parent)
        found[root] = (beside, "") if beside else ("",)  # as Python has it: what lies beside the file comes first
    for root, module in sorted(roots.folders_reached(modules).items(), key=lambda one: _place_on_path(one[0])):
        try:
            roots.check_root(root, f"the module {module}")
        except BadValue:
            if root in needed:
                raise
            continue
        found = with_root(found, root)
    for name in sorted(name for name in modules if name not in sys.modules):  # what a function imports when it is called
        if (later := roots.root_of_name(name)) is not None:
            roots.check_root(later, f"the module {name}")
            found = with_root(found, later)
    return found


def with_root(folders: Folders, root: Path) -> Folders:
    """Adds a folder that goes on `sys.path`, as the last one. If one lies inside another, the outer one travels, with both as its paths."""
    outer = next((folder for folder in folders if root.is_relative_to(folder)), root)
    merged: dict[Path, list[str]] = {}
    for folder, paths in (*folders.items(), (root, ("",))):
        if folder.is_relative_to(outer):
            merged.setdefault(outer, []).extend(_inside(outer, folder / path) for path in paths)
        else:
            merged[folder] = [*paths]
    return {folder: tuple(dict.fromkeys(paths)) for folder, paths in merged.items()}


def name_of_file(path: Path, files: Files) -> str:
    """Returns the name of a deployed file: '<number of its folder>/<path in it>'. Raises BadValue if it does not travel."""
    path = path.absolute()
    for number, (root, folder) in enumerate(zip(files.roots, files.manifest.folders, strict=True)):
        if not path.is_relative_to(root):
            continue
        where = _inside(root, path)
        if folder.has(where):
            return f"{number}/{where}"
        for left_out in folder.left_out:
            if left_out.keeps_back(where):
                raise BadValue(f"{path} is deployed, and does not travel: {left_out.why}; {left_out.mend}, or move it")
        raise BadValue(
            f"{path} is deployed, and does not travel: an ignore file names it, or its name is that of a secret; take it back by a line "
            f"{line_for(where)} in {root / IGNORE_FILE}, or give it another name"
        )
    raise BadValue(f"{path} is deployed, and lies in none of the folders that travel: {roots.WAY_OUT}")


def _inside(root: Path, path: Path) -> str:
    where = path.relative_to(root).as_posix()
    return "" if where == "." else where


def _place_on_path(root: Path) -> int:
    paths = [str(Path(path).absolute()) for path in sys.path]
    return paths.index(str(root)) if str(root) in paths else len(paths)


def _check_unchanged(loaded: Iterable[str], run_file: ExecutedFile | None) -> None:
    """Raises BadValue if replicas would run other code than this program has."""
    changed = [str(sys.modules[name].__file__) for name in loaded if has_changed(sys.modules[name])]
    if run_file is not None and not _is_as_executed(run_file):
        changed.append(str(run_file.path))
    if changed:
        raise BadValue(
            f"{', '.join(changed)} changed since this program imported it, so replicas would run other code than this program has: "
            "start the program again"
        )


def _is_as_executed(run_file: ExecutedFile) -> bool:
    try:
        return run_file.path.read_bytes() == run_file.source
    except OSError:
        return False
