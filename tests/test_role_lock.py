"""The role of a detached instance is one process's at a time, and nobody's once that has ended."""

import subprocess
import sys
from pathlib import Path

import pytest

import mqserve as serve
from mqserve.instance.role_lock import Role, RoleLock, check_folder, is_played, played_here

WHICH = "ns", "i1", Role.NODE


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "mqserve"


def test_a_lock_is_one_holders_until_that_lets_go() -> None:
    one, other = RoleLock.open(*WHICH), RoleLock.open(*WHICH)
    assert one.take() and one.take() and not other.take()
    assert RoleLock.open("ns", "i1", Role.SUPERVISOR).take() and RoleLock.open("ns", "i2", Role.NODE).take()
    one.close()
    assert other.take()
    other.close()


def test_a_lock_that_is_handed_on_is_free_when_the_process_that_has_it_is_killed() -> None:
    mine, watching = RoleLock.open(*WHICH), RoleLock.open(*WHICH)
    assert mine.take()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[mine.fd])
    mine.close()
    assert not watching.take() and is_played(*WHICH)
    child.kill()
    child.wait()
    assert watching.take()
    watching.close()
    assert not is_played(*WHICH)


def test_who_has_a_lock_next_reads_what_the_last_one_wrote() -> None:
    first = RoleLock.open(*WHICH)
    assert first.take()
    first.write(b"a long word")
    first.write(b"word")
    first.close()
    second = RoleLock.open(*WHICH)
    assert second.read() == b"word"
    second.close()


def test_a_look_at_a_role_that_nobody_ever_played_makes_no_file(state_folder: Path) -> None:
    assert not is_played(*WHICH) and not state_folder.exists()


def test_what_is_played_here_is_known_by_namespace(state_folder: Path) -> None:
    locks = [
        RoleLock.open("ns", "i1", Role.NODE),
        RoleLock.open("ns", "i2", Role.SUPERVISOR),
        RoleLock.open("ns-other", "i3", Role.CONTROLLER),
    ]
    assert all(lock.take() for lock in locks)
    RoleLock.open("ns", "i1", Role.CONTROLLER).close()  # left by one that ended
    (state_folder / "ns.log.lock").touch()
    assert played_here("ns") == ["supervisor", "node"] and played_here("nobody") == []
    for lock in locks:
        lock.close()


def test_a_look_whether_locks_can_be_had_leaves_none(state_folder: Path) -> None:
    check_folder("ns")
    assert list(state_folder.iterdir()) == []


def test_a_folder_that_is_a_file_gets_a_sentence(state_folder: Path) -> None:
    state_folder.write_text("in the way")
    with pytest.raises(serve.InstanceError, match=rf"{state_folder} cannot be used .*set XDG_STATE_HOME"):
        RoleLock.open(*WHICH)
