"""Tells the user's own modules from installed ones, and finds the folder (the root) that each is imported from."""

from __future__ import annotations

import functools
import importlib.machinery
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from ..errors import BadValue

_PACKAGES = {"site-packages", "dist-packages"}
_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
_OF_THE_SYSTEM = (
    "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys",
    "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/local/bin", "/usr/local/lib", "/usr/sbin", "/usr/share", "/var", "/var/lib",
    "/var/log", "/Applications", "/Library", "/System", "/Users", "/Volumes",
)  # fmt: skip
WAY_OUT = "move the code into a folder of its own"


@functools.cache
def _installed_places() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({*(Path(paths[name]) for name in ("purelib", "platlib", "stdlib", "platstdlib")), Path(site.getusersitepackages())})


def is_installed(module: ModuleType) -> bool:
    """Whether every machine with the same packages has the module: it is of the standard library, site-packages or mqserve."""
    if module.__name__.partition(".")[0] == "mqserve":
        return True
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ in sys.builtin_module_names
    return _is_installed_file(Path(file))


def _is_installed_file(file: Path) -> bool:
    return bool(_PACKAGES & set(file.parts)) or any(file.is_relative_to(place) for place in _installed_places())


def root_of(module: ModuleType | None) -> Path | None:
    """Returns the folder on `sys.path` that a module of the user was imported from. Returns None for other modules, and for those without a
    file."""
    file = getattr(module, "__file__", None)
    if module is None or not file or module.__name__ == "__main__" or getattr(module, "__spec__", None) is None or is_installed(module):
        return None
    path = Path(file).absolute()
    at = path.parent if path.stem == "__init__" else path
    words = module.__name__.split(".")
    if list(at.parts[-len(words) : -1]) != words[:-1] or at.name.partition(".")[0] != words[-1] or not path.is_file():
        return None  # a loader of somebody's own
    return at.parents[len(words) - 1]


def root_of_name(name: str) -> Path | None:
    """Like `root_of`, for a module that need not be imported yet."""
    top = name.partition(".")[0]
    if top in sys.modules:
        return root_of(sys.modules[top])
    spec = importlib.machinery.PathFinder.find_spec(top, [*sys.path, str(Path.cwd())])
    if spec is None or not spec.origin or not spec.has_location or _is_installed_file(Path(spec.origin)):
        return None
    path = Path(spec.origin).absolute()
    return path.parents[1] if spec.submodule_search_locations is not None else path.parent


def root_of_file(file: Path) -> Path:
    """Returns the root of a file that is run: its folder, or for one inside a package the first parent without `__init__.py`."""
    root = file.absolute().parent
    while (root / "__init__.py").is_file() and root != root.parent:
        root = root.parent
    return root


def check_root(root: Path, what: str) -> None:
    """Raises BadValue for a folder that holds more than the code of one program."""
    if _PACKAGES & set(root.parts):
        raise BadValue(f"{what} lies in {root}, where packages are installed, and those do not travel: {WAY_OUT}")
    real = root.resolve()
    try:
        home = Path.home()
    except RuntimeError:  # this user has none
        home = Path("/")
    if any(one.is_relative_to(folder) for one in (home, home.resolve()) for folder in (root, real)):
        whose = "your home folder" if real == home.resolve() else "the folder above your home folder"
    elif real in {folder.resolve() for folder in map(Path, (tempfile.gettempdir(), *_TEMPORARY))}:
        whose = "the folder of everybody's temporary files"
    elif real in {folder.resolve() for folder in map(Path, _OF_THE_SYSTEM)}:
        whose = "a folder of the system"
    else:
        return
    raise BadValue(f"{what} lies in {root}, {whose}, and a folder travels with all that is in it: {WAY_OUT}")


def folders_reached(modules: Iterable[str]) -> dict[Path, str]:
    """Maps each folder that replicas need to one module in it: the folders of these modules and of those whose values they use, and so
    on."""
    found: dict[Path, str] = {}
    waiting, seen = list(modules), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        root = root_of(sys.modules.get(name))
        if root is None:
            continue
        if root not in found:
            found[root] = name
            waiting += modules_in(root)  # what was imported from there before may be imported there again
        waiting += names_in(sys.modules[name])
    return found


def modules_in(root: Path) -> list[str]:
    """Returns the names of the user's modules that were imported from the folder, sorted."""
    modules = sys.modules.copy()  # list(….items()) makes tuples, so the collector may run in it, and a finalizer that imports a module
    return sorted(name for name, module in modules.items() if isinstance(module, ModuleType) and root_of(module) == root)


def names_in(module: ModuleType) -> set[str]:
    """Returns the names of the modules that define what a module has in it."""
    names = set[str]()
    for value in list(vars(module).values()):
        kind = type(value)
        with suppress(Exception):  # raised by an object that computes its attributes
            of_value = value.__name__ if issubclass(kind, ModuleType) else getattr(value, "__module__", None)
            names |= {name for name in (of_value, kind.__module__) if isinstance(name, str)}
    return names
