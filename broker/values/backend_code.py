"""Packs a backend's code for the distributed form: by name, together with its files; by value if it has no importable name.

A replica that imports a file has each definition once, as the program has. Definitions of the program's own `__main__` have
no importable name, unless `mqserve run` executed the file: replicas then execute it as their own `__main__`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from cloudpickle import cloudpickle as internals
from msgspec.structs import replace

from ..errors import BadValue, NotEncodable
from ..files import folders, roots
from ..files.manifest import Files, read_folders
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


async def save(store: Store, keys: StoreKeys, *packed: Packed) -> None:
    """Writes the files first, so that a replica that finds the code finds them. Backends of one program mostly have the same files, which
    are written once."""
    for files in {one.files.sha256: one.files for one in packed if one.files is not None}.values():
        await save_files(store, keys, files)
    for one in packed:
        await code.save(store, keys, one.code)


def pack_backend(
    target: object, args: tuple[Any, ...], signer: Signer, run_file: RunFile | None = None, *, factory: bool = False, has_app: bool = False
) -> Packed:
    """`run_file` is the program's `__main__`, if replicas may execute it. `factory` says that the target is to be called for an app, and
    `has_app` that it is one, or a class that has one, which goes by name only: apps do not pickle.

    Raises NotEncodable, with the way out, if the target cannot travel; BadValue if its folder cannot.
    """
    name = code.name_of(target)
    args_type, packed_args = encode_value(list(args), signer, code.CLAIM)
    modules = _modules_of_values(args)
    record = Code(name, args_type=args_type, args=packed_args, factory=factory)
    if isinstance(target, str):
        return _pack_import_string(record, target, modules, signer)
    if (by_name := code.installed_name(target) or code.name_of_object(target, _is_installed)) and not modules:
        return Packed(replace(record, target=by_name).with_seal(signer))
    if not signer:
        raise NotEncodable(
            f"{name} would travel with its files or by value, which is signed, and there is no key: set MQSERVE_SECRET_KEY (the same for "
            f"all processes of the instance), or name importable code by a string such as 'package.module:{name}'"
        )
    if by_name := by_name or _own_name(target, run_file):
        record = replace(record, target=by_name)
        modules.add(by_name.partition(":")[0])
    elif has_app:
        raise NotEncodable(
            f"{name} cannot travel to its replicas: an ASGI app does not pickle, and no module of yours has this one under a name that a "
            "replica can import. Put it into a module beside the program, or give a function that makes it (factory=True)"
        )
    else:
        payload, named = _pickle(target, name, run_file)
        modules |= named
        record = replace(record, sealed=signer.seal(payload, code.CLAIM))
    return _with_files(record, modules, signer, run_file)


def _with_files(record: Code, modules: set[str], signer: Signer, run_file: RunFile | None) -> Packed:
    if run_file is not None:
        modules |= roots.names_in(sys.modules["__main__"])
    files = _read_files(modules, run_file) if record.sealed else folders.read_files(modules, run_file)
    if files is None:
        return Packed(replace(record, home=definitions.home()).with_seal(signer))
    record = replace(record, files=files.sha256)
    if run_file is None:
        return Packed(replace(record, home=definitions.home()).with_seal(signer), files)
    return Packed(replace(record, run_file=folders.name_of_file(run_file.path, files)).with_seal(signer), files)


def _read_files(modules: set[str], run_file: RunFile | None) -> Files | None:
    """Adds the program's own folder, if the program imports modules from it: it may send their objects later. That folder stays behind,
    with a warning, if it cannot travel."""
    beside = _beside_the_program() - modules
    try:
        return folders.read_files(modules | beside, run_file)
    except BadValue as error:
        if not beside:
            raise
        files = folders.read_files(modules, run_file)
        logger.warning("the modules beside the program do not travel, so replicas cannot open their objects: %s", error)
        return files


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
        files = read_folders(folders.with_root(folders.folders_of(modules, None), root), tuple(roots.modules_in(root)))
    except BadValue as error:
        logger.warning("%s goes by its name alone, so replicas have to have it: %s", target, error)
        return Packed(record.with_seal(signer))
    return Packed(replace(record, files=files.sha256).with_seal(signer), files)


def _own_name(target: Any, run_file: RunFile | None) -> str:
    """Returns the import string of a definition, or of an object that has a name, in one of the user's files, else ''."""
    if not hasattr(target, "__qualname__"):
        return code.name_of_object(target, lambda module: _is_importable(module, run_file))
    module = sys.modules.get(getattr(target, "__module__", "") or "")
    if module is None or not definitions.is_found_by_name(target, module):
        return ""
    return f"{module.__name__}:{target.__qualname__}" if _is_importable(module, run_file) else ""


def _is_installed(module: ModuleType) -> bool:
    return module.__name__ != "__main__" and roots.is_installed(module)


def _is_importable(module: ModuleType, run_file: RunFile | None) -> bool:
    return run_file is not None if module.__name__ == "__main__" else roots.root_of(module) is not None


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


def _beside_the_program() -> set[str]:
    """Returns the modules that the program has imported from the folder of its own file."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return set()
    folder = Path(file).absolute().parent
    try:
        roots.check_root(folder, file)
    except BadValue:
        return set()
    return set(roots.modules_in(folder))


def _own_modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType) and roots.root_of(module) is not None]


def _modules_of_values(args: tuple[Any, ...]) -> set[str]:
    """Returns the user's modules that constructor arguments name."""
    _, named = pickling.dumps_code(args, lambda module: False)
    return {name for name in named if roots.root_of(sys.modules.get(name)) is not None}


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
