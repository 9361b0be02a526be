"""A backend's own Python: an interpreter by its path, or packages laid over the node's own environment.

An overlay is a virtual environment that sees the node's packages (mqserve among them) behind its own. It is built once
per node and content, under a lock, and shared by all replicas that want the same.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..broker.errors import BackendFailed
from .resources import ActorOptions

logger = logging.getLogger(__name__)

BUILD_BUDGET_S = 15 * 60.0
CHECK_BUDGET_S = 60.0


async def find_python(options: ActorOptions) -> str:
    """The interpreter for the replica. Raises BackendFailed, with the installer's own words, when it cannot be had."""
    if options.python:
        await asyncio.to_thread(_check, options.python)
        return options.python
    if options.pip:
        return await asyncio.to_thread(_build, options.pip)
    return sys.executable


def overlay_folder(requirements: Sequence[str]) -> Path:
    """Where the overlay of these requirements lies; its name is its content."""
    root = (
        os.environ.get("MQSERVE_ENVIRONMENTS")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqserve" / "environments"
    )
    content = "\n".join([sys.executable, sys.version, *sorted(requirements)])
    return Path(root) / hashlib.sha256(content.encode()).hexdigest()[:16]


def _check(python: str) -> None:
    if not os.access(python, os.X_OK):
        raise BackendFailed(f"actor_options python {python!r} is no interpreter on this node: install it there, or mend the path")
    told = _call([python, "-c", "import mqserve"], CHECK_BUDGET_S, f"the interpreter {python!r} does not run")
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise BackendFailed(f"the interpreter {python!r} cannot import mqserve ({last}): install mqserve in that environment too")


def _build(requirements: Sequence[str]) -> str:
    folder = overlay_folder(requirements)
    python, done = folder / "bin" / "python", folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not done.exists():
            logger.warning("building a Python environment with %s", ", ".join(requirements))
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _install(folder, python, requirements)
            except BackendFailed:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            done.touch()
    return str(python)


def _install(folder: Path, python: Path, requirements: Sequence[str]) -> None:
    uv = shutil.which("uv")
    if uv:
        _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
        _run([uv, "pip", "install", "--quiet", "--python", str(python), *requirements])
    else:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    # addsitedir rather than a bare path: what is installed there as editable has .pth files of its own.
    places = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    lines = [f"import site; site.addsitedir({place!r})" for place in dict.fromkeys(places)]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "_mqserve_node.pth").write_text("\n".join(lines) + "\n")


def _run(command: Sequence[str]) -> None:
    told = _call(command, BUILD_BUDGET_S, "the Python environment cannot be built")
    if told.returncode:
        reason = "\n".join((told.stderr or told.stdout).strip().splitlines()[-8:])
        raise BackendFailed(f"the Python environment cannot be built: `{' '.join(command[-4:])}` said\n{reason}")


def _call(command: Sequence[str], budget_s: float, otherwise: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=budget_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendFailed(f"{otherwise}: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder per node and content."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
