"""A backend's own Python: an interpreter given by path, or packages laid over the node's own environment.

An overlay is a virtual environment that sees the node's packages (mqserve among them) behind its own. It is built once per node and
content, under a lock, and shared by all replicas with the same requirements.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from ..broker.errors import BackendFailed, BadSignature
from ..broker.values.signing import SealScope, Signer
from .state.resources import ActorOptions

logger = logging.getLogger(__name__)

BUILD_BUDGET_S = 15 * 60.0
CHECK_BUDGET_S = 60.0
_ASK_AGAIN_S = 0.2


def seal_environment(options: ActorOptions, backend: str, signer: Signer) -> ActorOptions:
    """Returns the options with a seal over requirements and interpreter, since they run code on the nodes. Without a key they are
    returned unchanged."""
    if not (signer and (options.python or options.pip)):
        return options
    return msgspec.structs.replace(options, seal=signer.seal(b"", _claim(options, backend)))


def check_environment(options: ActorOptions, backend: str, signer: Signer) -> None:
    """Raises BadSignature if this node has a key and no key holder sealed this Python for the backend."""
    if not (signer and (options.python or options.pip)):
        return
    try:
        signer.open(options.seal, _claim(options, backend))
    except BadSignature as error:
        raise BadSignature(
            f"python and pip in the actor_options of backend {backend!r} are not sealed by a key of this instance, but set by an earlier "
            "version, by a client without MQSERVE_SECRET_KEY, or by whoever may write to the store: deploy it again with its actor_options"
        ) from error


def _claim(options: ActorOptions, backend: str) -> SealScope:
    content = msgspec.msgpack.encode([options.python, options.pip])
    return SealScope("code", backend, hashlib.sha256(content).hexdigest(), "environment")


async def find_python(options: ActorOptions) -> str:
    """Returns the interpreter for the replica. Raises BackendFailed, with the installer's own message, if it cannot be provided."""
    if options.python:
        await _check(options.python)
        return options.python
    if options.pip:
        return await _build(options.pip)
    return sys.executable


def overlay_folder(requirements: Sequence[str]) -> Path:
    """The folder of the overlay with these requirements; its name is a hash of its content."""
    root = (
        os.environ.get("MQSERVE_ENVIRONMENTS")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqserve" / "environments"
    )
    content = "\n".join([sys.executable, sys.version, *sorted(requirements)])
    return Path(root) / hashlib.sha256(content.encode()).hexdigest()[:16]


async def _check(python: str) -> None:
    if not os.access(python, os.X_OK):
        raise BackendFailed(f"actor_options python {python!r} is no interpreter on this node: install it there, or mend the path")
    code, said = await _call([python, "-c", "import mqserve"], CHECK_BUDGET_S, f"the interpreter {python!r} does not run")
    if code:
        last = (said.splitlines() or ["no reason was given"])[-1]
        raise BackendFailed(f"the interpreter {python!r} cannot import mqserve ({last}): install mqserve in that environment too")


async def _build(requirements: Sequence[str]) -> str:
    folder = overlay_folder(requirements)
    python, done = folder / "bin" / "python", folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(folder.with_suffix(".lock")):
        if not done.exists():
            logger.warning("building a Python environment with %s", ", ".join(map(_name_of, requirements)))
            await _remove(folder)
            try:
                await _install(folder, python, requirements)
            except BaseException:
                await _remove(folder)
                raise
            done.touch()
    return str(python)


async def _remove(folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _name_of(requirement: str) -> str:
    """The requirement as it may be shown: a URL may hold a password."""
    named = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*(?![A-Za-z0-9._+-]*:/)", requirement.strip())
    return named[0] if named else "a package by its place"


async def _install(folder: Path, python: Path, requirements: Sequence[str]) -> None:
    uv = shutil.which("uv")
    with NamedTemporaryFile("w", prefix="mqserve-", suffix=".txt") as file:  # in a file, since every process list shows arguments
        file.write("\n".join(requirements) + "\n")
        file.flush()
        if uv:
            await _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
            await _run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", file.name])
        else:
            await _run([sys.executable, "-m", "venv", str(folder)])
            await _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", file.name])
    # addsitedir rather than a bare path, because editable installations there have .pth files of their own.
    places = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    lines = [f"import site; site.addsitedir({place!r})" for place in dict.fromkeys(places)]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "_mqserve_node.pth").write_text("\n".join(lines) + "\n")


async def _run(command: Sequence[str]) -> None:
    code, said = await _call(command, BUILD_BUDGET_S, "the Python environment cannot be built")
    if code:
        reason = re.sub(r"://[^/@\s]+@", "://***@", "\n".join(said.splitlines()[-8:]))
        raise BackendFailed(f"the Python environment cannot be built: `{' '.join(command[:4])} …` said\n{reason}")


async def _call(command: Sequence[str], budget_s: float, otherwise: str) -> tuple[int, str]:
    """Returns (exit code, output). No process of it is left on return, also after a cancellation."""
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT, start_new_session=True)
    except OSError as error:
        raise BackendFailed(f"{otherwise}: {error}") from error
    try:
        async with asyncio.timeout(budget_s):
            said, _ = await process.communicate()
        return process.returncode or 0, said.decode(errors="replace").strip()
    except TimeoutError:
        raise BackendFailed(f"{otherwise}: `{command[0]}` took longer than {budget_s:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Lets one process at a time build an overlay. It polls the lock, because a thread that blocks on it could not be cancelled."""
    with path.open("w") as lock:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(_ASK_AGAIN_S)
        yield
