"""Large results of jobs as files: nothing but the body that was written comes back, and nothing leads out of the folder."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from mqserve.broker import result_files
from mqserve.broker.errors import BadValue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.result_bodies import with_body
from mqserve.broker.result_files import NO_FILES, PIECE_BYTES, BodyGone, NotWritten, ResultFiles, Unreadable
from mqserve.broker.results import BodyFile, Result
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys

pytestmark = pytest.mark.anyio

BODY = os.urandom(PIECE_BYTES + 1)
LATER_MS = int((time.time() + 3600) * 1000)


@pytest.fixture
def files(tmp_path: Path) -> ResultFiles:
    return ResultFiles(tmp_path, "tests")


def names(tmp_path: Path, folder: str = "tests") -> list[str]:
    return sorted(entry.name for entry in (tmp_path / folder).iterdir())


async def all_of(files: ResultFiles, future_id: str, file: BodyFile) -> list[bytes]:
    body = await files.open(future_id, file)
    try:
        return [piece async for piece in body.pieces()]
    finally:
        body.close()


async def test_a_body_is_read_whole_and_in_pieces(files: ResultFiles) -> None:
    file = await files.put("a", BODY, LATER_MS)
    assert file == BodyFile(len(BODY), sha256(BODY).digest())
    assert await files.read("a", file) == BODY
    pieces = await all_of(files, "a", file)
    assert b"".join(pieces) == BODY and len(pieces) == 2


async def test_results_have_files_of_their_own_whatever_their_ids_are(files: ResultFiles, tmp_path: Path) -> None:
    for future_id in ("../../etc/passwd", "b/../../x", "\0", "\udcff", "x" * 1000):
        assert await files.read(future_id, await files.put(future_id, BODY, LATER_MS)) == BODY
    assert len(names(tmp_path)) == 5 and all(len(name) == 129 for name in names(tmp_path))
    assert names(tmp_path, "") == ["tests"]


async def test_only_the_owner_reads_the_files_unless_the_folder_says_otherwise(files: ResultFiles, tmp_path: Path) -> None:
    await files.put("a", BODY, LATER_MS)
    folder = tmp_path / "tests"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / names(tmp_path)[0]).stat().st_mode & 0o777 == 0o600
    folder.chmod(0o750)
    await files.put("a", BODY, LATER_MS)
    assert (folder / names(tmp_path)[0]).stat().st_mode & 0o777 == 0o640


async def test_a_file_that_is_gone_or_changed_is_told_apart(files: ResultFiles, tmp_path: Path) -> None:
    file = await files.put("a", BODY, LATER_MS)
    path = tmp_path / "tests" / names(tmp_path)[0]
    for damage in (BODY[:-1], BODY[:-1] + bytes([BODY[-1] ^ 1]), b"", BODY + b"more"):
        path.write_bytes(damage)
        for read in (files.read, files.open):
            if read == files.open and damage.startswith(BODY):
                continue  # what is behind the body is not sent
            with pytest.raises(Unreadable, match="is not what its replica wrote"):
                await read("a", file)
    path.unlink()
    path.mkdir()
    for read in (files.read, files.open):
        with pytest.raises(Unreadable, match="Is a directory"):
            await read("a", file)
    path.rmdir()
    for read in (files.read, files.open):
        with pytest.raises(BodyGone, match="is gone from the result store") as raised:
            await read("a", file)
        assert raised.value.status == 410
    with pytest.raises(Unreadable, match="set MQSERVE_RESULT_STORE"):
        await NO_FILES.read("a", file)


async def test_a_result_in_the_store_leads_to_its_file(files: ResultFiles) -> None:
    store, keys = EmbeddedStore("tests", files), StoreKeys("tests")
    result = Result.from_bytes(Result(ref="file", file=await files.put("a", BODY, LATER_MS)).to_bytes())
    whole = await with_body(store, keys, "a", result)
    assert (whole.body, whole.ref, whole.file) == (BODY, "", None)
    with pytest.raises(BodyGone):
        await with_body(store, keys, "another", result)


async def test_what_cannot_be_written_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path / "not there", "tests")
    with pytest.raises(NotWritten, match="No such file or directory"):
        await files.put("a", BODY, LATER_MS)
    assert "make the folder" in await files.trouble()
    assert names(tmp_path, "") == []
    (tmp_path / "tests").write_text("no folder")
    with pytest.raises(NotWritten, match="Not a directory"):
        await ResultFiles(tmp_path, "tests").put("a", BODY, LATER_MS)
    assert (await NO_FILES.trouble(), await ResultFiles(tmp_path, "others").trouble()) == ("", "")
    assert names(tmp_path, "others") == []


async def test_a_full_disk_is_told_and_keeps_no_part(files: ResultFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(NotWritten, match="No space left on device"):
        await files.put("a", BODY, LATER_MS)
    assert names(tmp_path) == []


async def test_a_folder_that_hangs_is_told(files: ResultFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await files.put("a", BODY, LATER_MS)
    goes_on = threading.Event()
    monkeypatch.setattr(result_files, "_BUDGET_S", 0.05)
    monkeypatch.setattr(result_files, "_PROBE_BUDGET_S", 0.05)
    for _ in range(result_files._AT_ONCE):
        with pytest.raises(TimeoutError):
            await files._in_thread(goes_on.wait)
    with pytest.raises(NotWritten, match="it does not answer"):
        await files.put("b", BODY, LATER_MS)
    for read in (files.read, files.open):
        with pytest.raises(Unreadable, match="it does not answer"):
            await read("a", file)
    assert "it does not answer" in await files.trouble()
    goes_on.set()
    monkeypatch.undo()
    assert await files.read("a", file) == BODY


def test_a_process_ends_while_the_folder_hangs(tmp_path: Path) -> None:
    program = """
import asyncio, time
from pathlib import Path
from mqserve.broker import result_files

result_files._BUDGET_S = 0.05
files = result_files.ResultFiles(Path("."), "tests")
files._read = lambda *_: time.sleep(3600)
try:
    asyncio.run(files.read("a", None))
except result_files.Unreadable as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    assert "it does not answer" in ended.stdout


async def test_what_has_expired_is_swept_and_nothing_of_others(files: ResultFiles, tmp_path: Path) -> None:
    file = await files.put("a", BODY, LATER_MS)
    other = await files.put("b", BODY, LATER_MS - 1_800_000)
    foreign, part, old_part = (tmp_path / "tests" / name for name in ("readme.txt", f"{'0' * 32}.part", f"{'1' * 32}.part"))
    for path in (foreign, part, old_part):
        path.write_text("")
    os.utime(foreign, (0, 0))
    os.utime(old_part, (0, 0))
    assert await files.sweep(LATER_MS - 900_000) == 2
    assert foreign.exists() and part.exists() and not old_part.exists()
    assert await files.read("a", file) == BODY
    with pytest.raises(BodyGone):
        await files.read("b", other)
    await files.drop("a", file)
    await files.drop("a", file)
    assert await files.sweep(LATER_MS + 1) == 0


async def test_runs_that_end_alike_write_at_the_same_time(files: ResultFiles, tmp_path: Path) -> None:
    written = await asyncio.gather(*(files.put("a", BODY, LATER_MS) for _ in range(20)))
    assert len(set(written)) == len(names(tmp_path)) == 1


@pytest.mark.parametrize(
    "text", ["/mnt/results", "s3://bucket/results", "file://host/results", "file:", "file:///", "file://results", "file:results"]
)
def test_the_setting_names_a_folder(text: str) -> None:
    with pytest.raises(BadValue, match="file:///mnt/mqserve-results"):
        Settings.read({"MQSERVE_RESULT_STORE": text})


def test_the_setting_goes_to_every_child() -> None:
    urls = {"MQSERVE_BROKER_URL": "amqp://localhost", "MQSERVE_STORE_URL": "redis://localhost", "MQSERVE_SECRET_KEY": "k" * 32}
    settings = Settings.read({**urls, "MQSERVE_RESULT_STORE": "file:///mnt/a%20folder"})
    assert settings.result_folder == Path("/mnt/a folder")
    for child in (settings.for_proxy(), settings.for_replica()):
        assert Settings.read(child.to_env()).result_folder == Path("/mnt/a folder")
