"""Building a backend's own Python: it can be stopped, and shows nobody a password. The installer is a script of the test's."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mqserve.broker.errors import BackendFailed
from mqserve.controller.environments import find_python, overlay_folder
from mqserve.controller.state.resources import ActorOptions

pytestmark = pytest.mark.anyio

REQUIREMENTS = ("colors==1.0", "shapes @ https://me:topsecret@example.org/shapes.whl", "git+https://topsecret@example.org/sounds")


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an installer of these lines of a shell on the path; returns where it notes its process and its arguments."""
    monkeypatch.setenv("MQSERVE_ENVIRONMENTS", str(tmp_path / "environments"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    noted = tmp_path / "noted"

    def put(lines: str) -> Path:
        script = tmp_path / "uv"
        script.write_text(f"#!/bin/sh\necho $$ $@ >> {noted}\n{lines}\n")
        script.chmod(0o700)
        return noted

    return put


async def test_a_build_that_is_cancelled_ends_with_all_it_started(uv: Callable[[str], Path]) -> None:
    noted = uv("mkdir -p $5; sleep 1000 & wait")
    building = asyncio.create_task(find_python(ActorOptions(pip=REQUIREMENTS)))
    async with asyncio.timeout(20):
        while not noted.exists() or not overlay_folder(REQUIREMENTS).exists():
            await asyncio.sleep(0.02)
    installer = psutil.Process(int(noted.read_text().split()[0]))
    sleeping = installer.children()
    building.cancel()
    done, _ = await asyncio.wait([building], timeout=10)
    assert done and building.cancelled()
    assert not overlay_folder(REQUIREMENTS).exists()
    psutil.wait_procs([installer, *sleeping], timeout=10)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in [installer, *sleeping])


async def test_who_waits_for_another_builder_can_be_told_to_end(uv: Callable[[str], Path]) -> None:
    noted = uv("sleep 1000")
    first, second = (asyncio.create_task(find_python(ActorOptions(pip=REQUIREMENTS))) for _ in range(2))
    async with asyncio.timeout(20):
        while not noted.exists():
            await asyncio.sleep(0.02)
    second.cancel()
    done, _ = await asyncio.wait([second], timeout=10)
    assert done
    first.cancel()
    await asyncio.wait([first])


async def test_the_installer_reads_the_requirements_and_nobody_is_shown_a_password(
    uv: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noted = uv(f'[ $1 = venv ] && exit 0; shift 5; cat $2 > {tmp_path}/read; echo "no wheel at https://me:topsecret@example.org"; exit 1')
    with pytest.raises(BackendFailed, match="no wheel at https://") as caught:
        await find_python(ActorOptions(pip=REQUIREMENTS))
    assert (tmp_path / "read").read_text().splitlines() == list(REQUIREMENTS)
    assert "topsecret" not in noted.read_text() + caplog.text + str(caught.value)
    assert "colors, shapes, a package by its place" in caplog.text
