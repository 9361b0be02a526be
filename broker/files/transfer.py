"""Writes files into the store and restores them on another machine. Chunks that the store already has are not sent again."""

from __future__ import annotations

import asyncio
import glob
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadEnvelope, BadSignature, BadValue
from ..store import WRONG_TYPE, Store
from ..store_keys import CODE_TTL_S, StoreKeys
from .cache import Entry, Place, cache_folder, places_in, remove_unused, roots_in
from .manifest import Files, Manifest

_AT_ONCE = 4  # chunks on their way, so that a slow store is given few MiB at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """Files restored on this machine. `roots` are the folders of the manifest, in its order."""

    manifest: Manifest
    roots: tuple[Path, ...]

    @property
    def paths(self) -> list[Path]:
        """The folders that go on `sys.path`."""
        return [root / path for root, folder in zip(self.roots, self.manifest.folders, strict=True) for path in folder.paths]

    @property
    def origins(self) -> set[str]:
        """The same folders on the machine that deployed the code, as `sys.path` has them there."""
        return {str(Path(folder.origin, path)) for folder in self.manifest.folders for path in folder.paths}

    def find(self, name: str) -> Path:
        """Returns where the file is that a record names as '<number of the folder>/<path in it>'. Raises BadEnvelope if the manifest has no
        such file."""
        number, _, path = name.partition("/")
        if number.isdecimal() and int(number) < len(self.roots) and self.manifest.folders[int(number)].has(path):
            return self.roots[int(number)] / path
        raise BadEnvelope(f"the file {name!r} is not among those that travelled with the code: deploy the code again")


async def save_files(store: Store, keys: StoreKeys, files: Files) -> None:
    """Writes the manifest last, so that a reader who finds it finds its chunks."""
    sources = files.sources()
    missing = await store.extend([keys.code(chunk) for chunk in sources], CODE_TTL_S * 1000)
    turn = asyncio.Semaphore(_AT_ONCE)

    async def send(chunk: str) -> None:
        async with turn:
            content = await asyncio.to_thread(files.read, chunk, sources[chunk])
            await store.put_if_absent(keys.code(chunk), content, ttl_ms=CODE_TTL_S * 1000)

    await _all(send(chunk) for chunk in sources if keys.code(chunk) in missing)
    await store.put_if_absent(keys.code(files.sha256), files.raw, ttl_ms=CODE_TTL_S * 1000)


async def load_manifest(store: Store, keys: StoreKeys, sha256: str) -> Manifest:
    """Raises BadValue if it is missing, BadSignature if its hash differs."""
    return Manifest.from_bytes(await _load_manifest(store, keys, sha256))


async def restore_files(store: Store, keys: StoreKeys, sha256: str) -> Restored:
    """Restores a manifest's files in this machine's cache, as far as they are not there unchanged. Raises BadValue if a chunk is missing or
    the cache cannot be used, BadSignature if a hash differs."""
    entry = Entry(await asyncio.to_thread(cache_folder), sha256)
    try:
        await asyncio.to_thread(entry.use)
        manifest, changed = await asyncio.to_thread(entry.check)
        if manifest is None or changed:
            async with entry.only_maker():
                manifest = await _make_whole(store, keys, entry)
    except OSError as error:
        raise BadValue(
            f"the cache of code on this machine cannot be used ({error.strerror}: {error.filename or entry.folder}): make room for it, or "
            "let MQSERVE_CODE_CACHE name a folder that this user may write"
        ) from error
    return Restored(manifest, entry.roots(manifest))


async def _make_whole(store: Store, keys: StoreKeys, entry: Entry) -> Manifest:
    """Makes the entry, or writes the files anew that are not what was deployed. Only one process at a time may do it."""
    manifest, changed = await asyncio.to_thread(entry.check)  # again, since another process may have made it meanwhile
    if manifest is not None:
        if changed:
            names = ", ".join(str(place.path) for place in changed[:3])
            logger.warning("%d files in the cache of code differ from what was deployed, and are restored: %s", len(changed), names)
            await _write(store, keys, changed)
            await asyncio.to_thread(_drop_compiled, changed)
        return manifest
    await asyncio.to_thread(remove_unused, entry.folder.parent)
    raw = await _load_manifest(store, keys, entry.sha256)
    manifest = Manifest.from_bytes(raw)
    with entry.new_folder(raw) as made:
        for root in roots_in(made, manifest):
            root.mkdir()
        await _write(store, keys, places_in(made, manifest))
    return manifest


async def _write(store: Store, keys: StoreKeys, places: list[Place]) -> None:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def fetch(place: Place) -> None:
        async with turn:
            what = f"{place.folder.origin}/{place.file.path}"
            content = [await _load(store, keys, chunk, f"a part of {what}") for chunk in place.file.chunks]
            if sum(map(len, content)) != place.file.size:
                raise BadSignature(f"{what} in the store is not what was deployed: its size differs")
            await asyncio.to_thread(_write_file, place, content)

    await _all(fetch(place) for place in places)


def _write_file(place: Place, content: list[bytes]) -> None:
    """Renames the written file into place, since a replica may be reading the one that lies there."""
    place.path.parent.mkdir(parents=True, exist_ok=True)
    number, written = tempfile.mkstemp(prefix=".new-", dir=place.path.parent)
    try:
        with open(number, "wb") as file:
            file.writelines(content)
        os.chmod(written, 0o700 if place.file.executable else 0o600)
        os.replace(written, place.path)
    except BaseException:
        os.unlink(written)
        raise


def _drop_compiled(places: list[Place]) -> None:
    """Python recognizes stale bytecode by whole seconds and size, so bytecode of what lay there before may look current."""
    for _, _, path in places:
        for compiled in (path.parent / "__pycache__").glob(f"{glob.escape(path.stem)}.*.pyc"):
            compiled.unlink(missing_ok=True)


async def _load_manifest(store: Store, keys: StoreKeys, sha256: str) -> bytes:
    return await _load(store, keys, sha256, "the list of files")


async def _load(store: Store, keys: StoreKeys, sha256: str, what: str) -> bytes:
    raw = await store.get_large(keys.code(sha256))
    if raw is None or raw == WRONG_TYPE:
        raise BadValue(f"{what} is not in the store ({sha256[:12]}): deploy the code again")
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise BadSignature(f"{what} in the store is not what was deployed: its hash differs")
    return raw


async def _all(work: Iterable[object]) -> None:
    """Awaits all of them; the first failure cancels the rest, which have ended when it is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]  # type: ignore[call-overload]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
