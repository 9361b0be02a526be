"""Writes files into the store and restores them on another machine. Chunks that the store already has are not sent again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadSignature, BadValue
from ..store import WRONG_TYPE, Store
from ..store_keys import CODE_TTL_S, StoreKeys
from .cache import MANIFEST, Entry, cache_folder, remove_unused
from .manifest import File, Files, Folder, Manifest

_AT_ONCE = 4  # chunks on their way, so that a slow store is given few MiB at a time


@dataclass(frozen=True, slots=True)
class Restored:
    """Files restored on this machine. `roots` are the folders of the manifest, in its order."""

    manifest: Manifest
    roots: tuple[Path, ...]

    @property
    def paths(self) -> list[Path]:
        """The folders that go on `sys.path`."""
        return [root / path for root, folder in zip(self.roots, self.manifest.folders, strict=True) for path in folder.paths]


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
    return Manifest.from_bytes(await _load(store, keys, sha256, "the list of files"))


async def restore_files(store: Store, keys: StoreKeys, sha256: str) -> Restored:
    """Restores a manifest's files in this machine's cache, unless they are there. Raises BadValue if a chunk is missing, BadSignature if a
    hash differs."""
    cache = await asyncio.to_thread(cache_folder)
    entry = Entry(cache, sha256)
    await asyncio.to_thread(entry.use)
    if not entry.is_whole:
        await asyncio.to_thread(remove_unused, cache)
        manifest = await load_manifest(store, keys, sha256)
        with entry.making() as made:
            await _write(store, keys, manifest, made)
            (made / MANIFEST).write_bytes(manifest.to_bytes())
    manifest = Manifest.from_bytes((entry.folder / MANIFEST).read_bytes())
    return Restored(manifest, tuple(_folder_of(entry.folder, number) for number in range(len(manifest.folders))))


def _folder_of(entry: Path, number: int) -> Path:
    return entry / str(number)


async def _write(store: Store, keys: StoreKeys, manifest: Manifest, made: Path) -> None:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def fetch(root: Path, folder: Folder, file: File) -> None:
        async with turn:
            path = root / file.path
            if not path.is_relative_to(root) or ".." in path.parts:
                raise BadValue(f"a file of {folder.origin} is named {file.path!r}, which leads out of its folder")
            content = [await _load(store, keys, chunk, f"a part of {folder.origin}/{file.path}") for chunk in file.chunks]
            await asyncio.to_thread(_write_file, path, content, file.executable)

    for number, folder in enumerate(manifest.folders):
        root = _folder_of(made, number)
        root.mkdir()
        await _all(fetch(root, folder, file) for file in folder.files)


def _write_file(path: Path, content: list[bytes], executable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(content)
    if executable:
        path.chmod(0o700)


async def _load(store: Store, keys: StoreKeys, sha256: str, what: str) -> bytes:
    raw = await store.get_large(keys.code(sha256))
    if raw is None or raw == WRONG_TYPE:
        raise BadValue(f"{what} is not in the store ({sha256[:12]}): deploy the code again")
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise BadSignature(f"{what} in the store is not what was deployed: its hash differs")
    return raw


async def _all(work: Iterable[object]) -> None:
    """Awaits all of them; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]  # type: ignore[call-overload]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
