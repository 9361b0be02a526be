"""Packs a backend's code for the distributed form: by name, together with its files; by value if it has no importable name.

A replica that imports a file has each definition once, as the program has. Definitions of the program's own `__main__` have
no importable name, unless `mqserve run` executed the file: replicas then execute it as their own `__main__`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from cloudpickle import cloudpickle as internals
from msgspec.structs import replace

from ..errors import BadValue, NotEncodable
from ..files import roots
from ..files.manifest import Files, read_folders
from ..files.stale_modules import has_changed
from ..files.transfer import save_files
from ..store import Store
from ..store_keys import StoreKeys
from . import code, definitions, pickling
from .code import Code, CodeHere
from .codecs import encode_value
from .main_module import RunFile
from .signing import Signer

logger = logging.getLogger(__name__)


class Packed(NamedTuple):
    """Code and the files that travel with it."""

    code: Code | CodeHere
    files: Files | None = None


async def save(store: Store, keys: StoreKeys, packed: Packed) -> str:
    """Writes the files first, so that a replica that finds the code finds them. Returns the hash of the code."""
    if packed.files is not None:
        await save_files(store, keys, packed.files)
    return await code.save(store, keys, packed.code)


def pack_backend(target: object, args: tuple[Any, ...], signer: Signer, run_file: RunFile | None = None) -> Packed:
    """`run_file` is the program's `__main__`, if replicas may execute it.

    Raises NotEncodable, with the way out, if the target cannot travel; BadValue if its folder cannot.
    """
    name = code.name_of(target)
    args_type, packed_args = encode_value(list(args), signer, code.CLAIM)
    modules = _modules_of_values(args)
    record = Code(name, args_type=args_type, args=packed_args)
    if isinstance(target, str):
        return _pack_import_string(record, target, modules, signer)
    if (by_name := code.installed_name(target)) and not modules:
        return Packed(replace(record, target=by_name).with_seal(signer))
    if not signer:
        raise NotEncodable(
            f"{name} would travel with its files or by value, which is signed, and there is no key: set MQSERVE_SECRET_KEY (the same for "
            f"all processes of the instance), or name importable code by a string such as 'package.module:{name}'"
        )
    if by_name := by_name or _own_name(target, run_file):
        record = replace(record, target=by_name)
        modules.add(by_name.partition(":")[0])
    else:
        payload, named = _pickle(target, name, run_file)
        modules |= named
        record = replace(record, sealed=signer.seal(payload, code.CLAIM))
    return _with_files(record, modules, signer, run_file)


def _with_files(record: Code, modules: set[str], signer: Signer, run_file: RunFile | None) -> Packed:
    if run_file is not None:
        modules |= roots.names_in(sys.modules["__main__"])
    folders = _folders(modules, run_file)
    if not folders:
        return Packed(replace(record, home=definitions.home()).with_seal(signer))
    loaded = tuple(name for root in roots.reach_of(modules) for name in roots.modules_in(root))
    _check_unchanged(loaded, run_file)
    files = read_folders(folders, loaded)
    _check_travels(modules, files)
    record = replace(record, files=files.sha256)
    if run_file is None:
        return Packed(replace(record, home=definitions.home()).with_seal(signer), files)
    where = run_file.path.absolute().relative_to(files.roots[0]).as_posix()
    if all(file.path != where for file in files.manifest.folders[0].files):
        raise _does_not_travel(where, files, 0)
    return Packed(replace(record, run_file=f"0/{where}").with_seal(signer), files)


def _pack_import_string(record: Code, target: str, modules: set[str], signer: Signer) -> Packed:
    """Finds the module without importing it. Replicas may have the code themselves, so a folder that cannot travel stays behind with a
    warning."""
    module, _ = code.split(target)
    record = replace(record, target=target)
    root = roots.root_of_name(module)
    if root is None or not signer:
        return Packed(record.with_seal(signer))
    try:
        roots.check_root(root, f"the module {module}")
        folders = {**_folders(modules, None), root: ("",)}
        files = read_folders(folders, tuple(roots.modules_in(root)))
    except BadValue as error:
        logger.warning("%s goes by its name alone, so replicas have to have it: %s", target, error)
        return Packed(record.with_seal(signer))
    return Packed(replace(record, files=files.sha256).with_seal(signer), files)


def _own_name(target: Any, run_file: RunFile | None) -> str:
    """Returns the import string of a definition in one of the user's files, else ''."""
    module = sys.modules.get(getattr(target, "__module__", "") or "")
    if module is None or not hasattr(target, "__qualname__") or not definitions.is_found_by_name(target, module):
        return ""
    is_importable = run_file is not None if module.__name__ == "__main__" else roots.root_of(module) is not None
    return f"{module.__name__}:{target.__qualname__}" if is_importable else ""


def _pickle(target: object, name: str, run_file: RunFile | None) -> tuple[bytes, set[str]]:
    def is_importable(module: str) -> bool:
        found = sys.modules.get(module)
        if module == "__main__" or found is None:
            return module == "__main__" and run_file is not None
        return roots.root_of(found) is not None or roots.is_installed(found)

    try:
        return pickling.dumps_code(target, is_importable, _own_modules())
    except pickling.CannotTravel as error:
        raise NotEncodable(f"{name} cannot travel to its replicas: {error}") from error
    except Exception as error:
        culprit = _culprit(target, set())
        what = f"{culprit}, which does not pickle" if culprit else "it does not pickle"
        raise NotEncodable(
            f"{name} cannot travel to its replicas: {what} ({error}); keep such objects out of globals and closures, make them in the "
            "constructor or on first use, or put the code into a module beside the program, which replicas import"
        ) from error


def _own_modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType) and roots.root_of(module) is not None]


def _modules_of_values(args: tuple[Any, ...]) -> set[str]:
    """Returns the user's modules that constructor arguments name."""
    _, named = pickling.dumps_code(args, lambda module: False)
    return {name for name in named if roots.root_of(sys.modules.get(name)) is not None}


# The folders.


def _folders(modules: set[str], run_file: RunFile | None) -> dict[Path, tuple[str, ...]]:
    """Maps each folder to the paths in it that go on `sys.path`: the run file's folder first, the others in the order of `sys.path`. Raises
    BadValue for a folder that cannot travel, if the target lies in it."""
    needed = {roots.root_of(sys.modules.get(name)) for name in modules}
    found: dict[Path, list[str]] = {}
    if run_file is not None:
        root = roots.root_of_file(run_file.path)
        roots.check_root(root, str(run_file.path))
        beside = run_file.path.absolute().parent.relative_to(root).as_posix()
        found[root] = ["", beside] if beside != "." else [""]
    for root, module in sorted(roots.reach_of(modules).items(), key=lambda one: _place_on_path(one[0])):
        try:
            roots.check_root(root, f"the module {module}")
        except BadValue:
            if root in needed:
                raise
            continue
        _add(found, root)
    return {root: tuple(dict.fromkeys(paths)) for root, paths in found.items()}


def _add(found: dict[Path, list[str]], root: Path) -> None:
    """Adds a folder; one that lies inside another becomes a path of that one."""
    for outer, paths in found.items():
        if root.is_relative_to(outer):
            inside = root.relative_to(outer).as_posix()
            return paths.append("" if inside == "." else inside)
    for inner in [inner for inner in found if inner.is_relative_to(root)]:
        if next(iter(found)) == inner:
            return  # the run file's folder stays the first one, and keeps its paths
    found[root] = [""]


def _place_on_path(root: Path) -> int:
    paths = [str(Path(path).absolute()) for path in sys.path]
    return paths.index(str(root)) if str(root) in paths else len(paths)


def _check_unchanged(loaded: Iterable[str], run_file: RunFile | None) -> None:
    """Raises BadValue if replicas would run other code than this program has."""
    changed = [str(sys.modules[name].__file__) for name in loaded if has_changed(sys.modules[name])]
    if run_file is not None and RunFile.read(run_file.path) != run_file:
        changed.append(str(run_file.path))
    if changed:
        raise BadValue(
            f"{', '.join(changed)} changed since this program imported it, so replicas would run other code than this program has: "
            "start the program again"
        )


def _check_travels(modules: Iterable[str], files: Files) -> None:
    """Raises BadValue if an ignore file keeps back the module that is deployed."""
    for name in modules:
        module = sys.modules.get(name)
        root = roots.root_of(module)
        if module is None or root is None or module.__file__ is None:
            continue
        for number, outer in enumerate(files.roots):
            if root.is_relative_to(outer):
                where = Path(module.__file__).absolute().relative_to(outer).as_posix()
                if all(file.path != where for file in files.manifest.folders[number].files):
                    raise _does_not_travel(where, files, number)


def _does_not_travel(where: str, files: Files, number: int) -> BadValue:
    root = files.roots[number]
    why = next(
        (why for path, why in files.manifest.folders[number].left_out if where == path or where.startswith(f"{path}/")),
        "its name is that of a secret, a cache or an environment",
    )
    return BadValue(
        f"{root / where} is deployed, and does not travel: {why}; take it back by a line !{where} in {root / '.mqserveignore'}, or move it"
    )


# What keeps code from travelling.


def _culprit(target: Any, seen: set[int]) -> str:
    """Returns words such as "it uses the global 'lock' (a _thread.lock)", or '' if each value that the target uses pickles by itself."""
    seen.add(id(target))
    for how, value in _captures(target):
        if id(value) in seen:
            continue
        try:
            pickling.dumps_by_value(value)
        except Exception:
            if isinstance(value, FunctionType | type) and (deeper := _culprit(value, seen)):
                return f"it uses {how}, and {deeper.replace('it uses', 'that uses', 1)}"
            kind = type(value)
            return f"it uses {how} (a {kind.__module__}.{kind.__qualname__})"
    return ""


def _captures(target: Any) -> Iterator[tuple[str, Any]]:
    """Yields (description, value) of what a pickled function or class takes with it."""
    if isinstance(target, type):
        for name, value in vars(target).items():
            if name not in ("__dict__", "__weakref__"):
                yield f"the attribute {name!r} of {target.__qualname__}", value
        return
    function = getattr(target, "__func__", target)
    if not isinstance(function, FunctionType):
        return
    for name in internals._extract_code_globals(function.__code__):
        if name in function.__globals__ and not isinstance(function.__globals__[name], ModuleType):
            yield f"the global {name!r}", function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the variable {name!r} of the function around it", cell.cell_contents
        except ValueError:  # not set yet
            continue
