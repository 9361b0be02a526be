"""The leader removes large results that have expired, and says so where it cannot."""

import asyncio
from pathlib import Path

import pytest

from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.result_files import ResultFiles
from mqserve.controller import sweeps
from mqserve.controller.sweeps import Sweeps

pytestmark = pytest.mark.anyio


async def until(condition: object) -> None:
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


class Counted(ResultFiles):
    """Counts its sweeps."""

    sweeps = 0

    async def sweep(self, now_ms: int) -> int:
        self.sweeps += 1
        return await super().sweep(now_ms)


async def test_expired_results_go_until_the_lead_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SWEEP_EVERY_S", 0.01)
    store = EmbeddedStore("tests", files := Counted(tmp_path, "tests"))
    kept = await store.files.put("kept", b"kept", store.now_ms() + 60_000)
    await store.files.put("expired", b"expired", store.now_ms() - 1)
    sweeping = Sweeps(store)
    sweeping.go_on()
    sweeping.go_on()
    folder = tmp_path / "tests"
    await until(lambda: len(list(folder.iterdir())) == 1)
    assert await store.files.read("kept", kept) == b"kept"
    await sweeping.stop()
    begun = files.sweeps
    await asyncio.sleep(0.1)  # ten sweeps
    assert files.sweeps == begun > 0


async def test_a_folder_that_is_missing_is_a_problem_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SWEEP_EVERY_S", 0.01)
    sweeping = Sweeps(EmbeddedStore("tests", ResultFiles(tmp_path / "later", "tests")))
    sweeping.go_on()
    await until(lambda: "No such file" in sweeping.problems.get("the result store", ""))
    (tmp_path / "later").mkdir()
    await until(lambda: not sweeping.problems)
    await sweeping.stop()


async def test_nothing_is_swept_without_a_folder() -> None:
    sweeping = Sweeps(EmbeddedStore("tests"))
    sweeping.go_on()
    assert "stopped" in repr(sweeping)
    await sweeping.stop()
