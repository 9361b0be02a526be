"""How files arrive on another machine, and what keeps the cache there whole, private and small."""

import asyncio
import collections
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mqserve.broker.errors import BadEnvelope, BadSignature, BadValue
from mqserve.broker.files import cache
from mqserve.broker.files.cache import Entry, cache_folder, remove_unused
from mqserve.broker.files.manifest import File, Files, Folder, Manifest
from mqserve.broker.files.transfer import Restored, restore_files, save_files
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.test_files import read, write

SHA = "a1" * 32


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mqserve-code"


async def saved(store: Store, keys: StoreKeys, folder: Path) -> Files:
    files = read(write(folder, app_DOT_py="x = 1\n", shop__prices_DOT_py="PRICE = 21\n"))
    await save_files(store, keys, files)
    return files


# How it arrives.


@pytest.mark.anyio
async def test_files_arrive_in_the_cache_as_they_were(store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path) -> None:
    large = bytes(range(256)) * 5000  # more than a chunk
    write(tmp_path / "code", app_DOT_py="x = 1\n", data__large_DOT_bin=large, data__empty="")
    (tmp_path / "code" / "app.py").chmod(0o755)
    files = read(tmp_path / "code")
    await save_files(store, keys, files)
    assert max([len(await store.get(keys.code(chunk)) or b"") for chunk in files.manifest.chunks]) <= 1024 * 1024
    restored = await restore_files(store, keys, files.sha256)
    (arrived,) = restored.roots
    assert arrived.is_relative_to(code_cache)
    assert (arrived / "data" / "large.bin").read_bytes() == large
    assert (arrived / "data" / "empty").read_bytes() == b""
    assert os.access(arrived / "app.py", os.X_OK)
    await store.delete(keys.code(files.sha256), *map(keys.code, files.manifest.chunks))
    assert (await restore_files(store, keys, files.sha256)).roots == restored.roots  # from the cache


@pytest.mark.anyio
async def test_what_was_changed_in_the_store_is_not_taken(store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path) -> None:
    files = read(write(tmp_path / "code", app_DOT_py="x = 1\n"))
    await save_files(store, keys, files)
    (chunk,) = files.manifest.chunks
    await store.set(keys.code(chunk), b"x = 2\n")
    with pytest.raises(BadSignature, match="not what was deployed"):
        await restore_files(store, keys, files.sha256)
    await store.delete(keys.code(chunk))
    with pytest.raises(BadValue, match=r"app\.py is not in the store .* deploy the code again"):
        await restore_files(store, keys, files.sha256)
    assert not (code_cache / files.sha256).exists()


@pytest.mark.parametrize(
    "files",
    [
        (File("../../out.py", 0, ()),),
        (File("/etc/cron.d/out", 0, ()),),
        (File("pkg/../../out.py", 0, ()),),
        (File("", 0, ()),),
        (File("app.py", 1, ("../secret",)),),
    ],
)
@pytest.mark.anyio
async def test_a_list_that_leads_out_of_its_folder_is_refused(
    store: Store, keys: StoreKeys, files: tuple[File, ...], code_cache: Path
) -> None:
    made = Files(Manifest((Folder("/somewhere", files),)), ())
    await store.set(keys.code(made.sha256), made.raw)
    with pytest.raises(BadEnvelope, match=r"does not parse .* deploy the code again"):
        await restore_files(store, keys, made.sha256)


def test_paths_and_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    for path in ("../src", "/usr/lib", "src/.."):
        with pytest.raises(BadEnvelope):
            Manifest.from_bytes(Manifest((Folder("/somewhere", (), paths=(path,)),)).to_bytes())
    Manifest.from_bytes(Manifest((Folder("/somewhere", (), paths=("", "src/..app", "a b")),)).to_bytes())
    with pytest.raises(BadEnvelope, match="is not the hash of a list of files"):
        Entry(tmp_path, "../../home")
    restored = Restored(Manifest((Folder("/somewhere", (File("app.py", 0, ()),)),)), (tmp_path,))
    assert restored.find("0/app.py") == tmp_path / "app.py"
    for name in ("0/../app.py", "1/app.py", "-1/app.py", "app.py", "0//app.py"):
        with pytest.raises(BadEnvelope, match="not among those that travelled"):
            restored.find(name)


@pytest.mark.anyio
async def test_a_file_of_another_size_than_the_list_says_is_refused(
    store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path
) -> None:
    files = await saved(store, keys, tmp_path / "code")
    (folder,) = files.manifest.folders
    shorter = Folder(folder.origin, tuple(msgspec.structs.replace(file, size=3) for file in folder.files))
    made = Files(Manifest((shorter,)), ())
    await store.set(keys.code(made.sha256), made.raw)
    with pytest.raises(BadSignature, match="its size differs"):
        await restore_files(store, keys, made.sha256)


@pytest.mark.anyio
async def test_replicas_that_start_together_read_the_store_once(
    store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await saved(store, keys, tmp_path / "code")
    read_keys = collections.Counter[str]()
    get_large = store.get_large

    async def counted(key: str) -> bytes | None:
        read_keys[key] += 1
        return await get_large(key)

    monkeypatch.setattr(store, "get_large", counted)
    restored = await asyncio.gather(*(restore_files(store, keys, files.sha256) for _ in range(8)))
    assert len({one.roots for one in restored}) == 1
    assert read_keys == {keys.code(sha256): 1 for sha256 in (files.sha256, *files.manifest.chunks)}


# What was damaged is made whole.


@pytest.mark.parametrize("damage", ["emptied", "rewritten", "removed", "another list", "no list", "an empty entry"])
@pytest.mark.anyio
async def test_what_was_damaged_in_the_cache_is_restored(
    store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path, damage: str
) -> None:
    files = await saved(store, keys, tmp_path / "code")
    (root,) = (await restore_files(store, keys, files.sha256)).roots
    entry = code_cache / files.sha256
    match damage:
        case "emptied":
            (root / "app.py").write_text("")
        case "rewritten":
            (root / "app.py").write_text("x = 2\n")
            os.utime(root / "app.py", (0, 0))
        case "removed":
            shutil.rmtree(root / "shop")
        case "another list":
            (entry / ".manifest").write_bytes(Manifest((Folder("/somewhere", ()),)).to_bytes())
        case "no list":  # a process was killed while it removed the entry
            (entry / ".manifest").unlink()
        case _:
            shutil.rmtree(entry)
            entry.mkdir()
    assert (await restore_files(store, keys, files.sha256)).roots == (root,)
    assert (root / "app.py").read_text() == "x = 1\n"
    assert (root / "shop" / "prices.py").read_text() == "PRICE = 21\n"
    assert sorted(os.listdir(code_cache)) == [files.sha256, f"{files.sha256}.lock", f"{files.sha256}.making"]


@pytest.mark.anyio
async def test_what_replicas_write_beside_their_code_stays_when_a_file_is_restored(
    store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path
) -> None:
    files = await saved(store, keys, tmp_path / "code")
    (root,) = (await restore_files(store, keys, files.sha256)).roots
    write(root, app_DOT_py="x = 2\n", written_DOT_txt="mine", **{"__pycache__/app.cpython-311.pyc": b"of x = 2"})
    compiled = write(root / "__pycache__", **{"app.cpython-311.pyc": b"of x = 2"}) / "app.cpython-311.pyc"
    await restore_files(store, keys, files.sha256)
    assert (root / "app.py").read_text() == "x = 1\n"
    assert (root / "written.txt").read_text() == "mine"
    assert not compiled.exists()


@pytest.mark.anyio
async def test_a_cache_that_cannot_be_used_is_said_with_the_mend(
    store: Store, keys: StoreKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_cache: Path
) -> None:
    files = await saved(store, keys, tmp_path / "code")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/the/cache")

    monkeypatch.setattr(Entry, "new_folder", full)
    with pytest.raises(BadValue, match=r"No space left on device: /the/cache\): make room .* MQSERVE_CODE_CACHE"):
        await restore_files(store, keys, files.sha256)


# Where it is.


def test_a_chosen_folder_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadValue, match=re.escape(f"MQSERVE_CODE_CACHE is {tmp_path / 'file'}, and ") + ".*name a folder that this user"):
        cache_folder()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mqserve-code").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path))
    with pytest.raises(BadValue, match="is a link, which another user may have made"):
        cache_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a folder to another user")
def test_a_chosen_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mqserve-code").mkdir()
    os.chown(tmp_path / "mqserve-code", 12345, 12345)
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path))
    with pytest.raises(BadValue, match="belongs to another user"):
        cache_folder()


def test_a_process_without_a_usual_folder_makes_one_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.delenv("MQSERVE_CODE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"mqserve-code-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    cache._folder_of_this_process.cache_clear()
    try:
        assert cache_folder() == cache_folder() != tmp_path / f"mqserve-code-{os.getuid()}"
    finally:
        cache._folder_of_this_process.cache_clear()


# What goes again.


def test_the_cache_keeps_what_is_in_use_and_drops_what_nobody_used_for_a_day(code_cache: Path) -> None:
    folder = cache_folder()
    assert folder == code_cache
    used, unused = "ab" * 32, "cd" * 32
    for name in (used, unused):
        entry = Entry(folder, name)
        if name == used:
            entry.use()
        else:
            (folder / f"{unused}.lock").touch()
            (folder / f"{unused}.making").touch()
        with entry.new_folder(b"") as made:
            (made / "0").mkdir()
        os.utime(folder / f"{name}.lock", (0, 0))
    for half_made in (".new-x", ".old-x"):
        (folder / half_made).mkdir()
        os.utime(folder / half_made, (0, 0))
    remove_unused(folder)
    assert sorted(path.name for path in folder.iterdir()) == [used, f"{used}.lock"]


@pytest.mark.anyio
async def test_a_project_that_is_named_as_the_cache_keeps_its_files(
    store: Store, keys: StoreKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = write(tmp_path / "project", poetry_DOT_lock="x", poetry__lib_DOT_py="x", **{f"{SHA}_DOT_lock": "x"})
    (project / "mqserve-code" / "poetry").mkdir(parents=True)
    (project / "mqserve-code" / "poetry.lock").touch()
    (project / "mqserve-code").chmod(0o755)
    project.chmod(0o775)
    for path in (project, *project.rglob("*")):
        os.utime(path, (0, 0))
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(project))
    before = sorted(project.rglob("*"))
    files = await saved(store, keys, tmp_path / "code")
    await restore_files(store, keys, files.sha256)
    assert set(before) <= set(project.rglob("*"))
    assert project.stat().st_mode & 0o777 == 0o775
