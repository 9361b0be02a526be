"""The log of a detached instance: whose it is, and that it is bounded and loses nothing, however many write to it in whichever way."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mqserve.controller import detached_log
from mqserve.controller.detached_log import TendedLog, open_log
from tests.children import MANY_THREADS, in_a_child, wait_for_exit
from tests.instances import CommandLine, wait_until
from tests.ports import free_port

pytestmark = MANY_THREADS

FILE_BYTES = 20_000
WRITERS, LINES = 4, 1_500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "mqserve" / "shop.log"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = open_log(path)
    try:
        yield fd
    finally:
        os.close(fd)


def files_of(path: Path) -> list[Path]:
    return [file for file in path.parent.iterdir() if not file.name.endswith(".lock")]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(fd: int, line: str) -> None:
    os.write(fd, f"{line}\n".encode())


def test_it_is_its_owners_alone_and_so_is_its_folder(path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(path):
            assert (mode_of(path), mode_of(path.parent)) == (0o600, 0o700)
    finally:
        os.umask(before)


def test_one_that_an_earlier_version_made_for_everybody_becomes_its_owners(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch(0o644)
    with opened(path):
        assert mode_of(path) == 0o600


def test_no_line_is_lost_or_doubled_while_several_processes_write_and_tend_it(path: Path) -> None:
    with opened(path) as fd:
        writers = []
        for writer in range(WRITERS):
            if not (pid := os.fork()):
                try:
                    tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES, files=40)
                    for number in range(LINES):
                        write(fd, f"{writer}:{number} {'x' * 40}")
                        tended.tend()
                finally:
                    os._exit(0)
            writers.append(pid)
        assert [wait_for_exit(pid) for pid in writers] == [0] * WRITERS
    found = Counter(line.split()[0] for file in files_of(path) for line in file.read_text().splitlines())
    assert found == Counter(f"{writer}:{number}" for writer in range(WRITERS) for number in range(LINES))
    assert len(files_of(path)) > 5 and all(mode_of(file) == 0o600 for file in files_of(path))


def test_the_newest_lines_stand_in_the_current_file_and_the_older_ones_in_the_next(path: Path) -> None:
    with opened(path) as fd:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        for number in range(40):
            write(fd, f"{number} {'x' * 5_000}")
            tended.tend()
    ages = [[int(line.split()[0]) for line in file.read_text().splitlines()] for file in sorted(files_of(path), reverse=True)]
    numbers = [number for age in ages for number in age]
    assert len(ages) == 5 and numbers == list(range(numbers[0], 40))


def test_what_cannot_follow_writes_to_files_that_can_be_seen_and_are_bounded(path: Path) -> None:
    with opened(path) as fd, opened(path) as left_behind:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        for _ in range(300):
            write(fd, "x" * 1_000)
            os.write(left_behind, b"y" * 7_000)
            tended.tend()
            assert size_of(path) <= 5 * 2 * FILE_BYTES + 10_000
        assert os.fstat(left_behind).st_ino in [file.stat().st_ino for file in files_of(path)]
        assert len(files_of(path)) == 5


def test_a_flood_is_cut_and_the_file_says_so(path: Path) -> None:
    with opened(path) as fd:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        os.write(fd, b"x" * 100_000)
        tended.tend()
        write(fd, "after the flood")
    older = path.with_name("shop.log.1")
    assert path.read_text() == "after the flood\n"
    assert older.stat().st_size < FILE_BYTES + 100 and "was cut" in older.read_text()


@pytest.mark.parametrize("way", ["removed", "renamed"])
def test_a_file_that_an_operator_puts_away_is_followed_by_a_new_one(path: Path, way: str) -> None:
    with opened(path) as fd:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        if way == "removed":
            path.unlink()
        else:
            path.rename(path.with_name("kept"))
        tended.tend()
        write(fd, "here")
    assert path.read_text() == "here\n" and mode_of(path) == 0o600


def test_an_output_that_is_not_the_log_or_no_more_is_left_alone(path: Path) -> None:
    reading, writing = os.pipe()
    with opened(path) as fd, opened(path) as redirected:
        tended = TendedLog(path, (fd, redirected, writing), file_bytes=FILE_BYTES)
        assert tended.outputs == sorted((fd, redirected))
        os.dup2(writing, redirected)
        os.write(fd, b"x" * FILE_BYTES * 2)
        tended.tend()
        write(fd, "to the log")
        write(redirected, "elsewhere")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "elsewhere\n"
    assert path.read_text() == "to the log\n"


@pytest.mark.parametrize("steps", range(6))
def test_a_process_that_is_killed_while_it_puts_files_away_leaves_them_to_the_next(path: Path, steps: int) -> None:
    with opened(path) as fd:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        for number in range(24):
            write(fd, f"{number} {'x' * 5_000}")
            tended.tend()
        write(fd, f"24 {'x' * FILE_BYTES}")

        def die_after(steps: int) -> None:
            renamed = Path.rename
            done: list[Path] = []

            def rename(self: Path, target: Path) -> Path:
                if len(done) == steps:
                    os._exit(9)
                done.append(self)
                return renamed(self, target)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "rename", rename)
                tended.tend()

        if not (pid := os.fork()):
            die_after(steps)
            os._exit(0)
        assert wait_for_exit(pid) == 9
        tended.tend()
        write(fd, "25 after")
        tended.tend()
    assert path.read_text().endswith("25 after\n")
    numbers = [int(line.split()[0]) for file in files_of(path) for line in file.read_text().splitlines()]
    assert Counter(numbers) == Counter(set(numbers)) and {24, 25} <= set(numbers)
    assert len(files_of(path)) <= 6


def test_a_child_that_is_forked_while_its_parent_tends_the_log_does_not_lock_it(path: Path) -> None:
    with opened(path) as fd:
        tended = TendedLog(path, (fd,), file_bytes=FILE_BYTES)
        os.write(fd, b"x" * FILE_BYTES * 2)
        in_a_child(tended.tend)
        assert path.stat().st_size == 0
        os.write(fd, b"x" * FILE_BYTES * 2)
        tended.tend()
        write(fd, "follows")
    assert path.read_text() == "follows\n"


def test_a_detached_instance_keeps_its_log_whatever_its_handlers_and_their_children_print(
    distributed_shell: CommandLine, namespace: str, tmp_path: Path
) -> None:
    shell = distributed_shell.with_variables(XDG_STATE_HOME=str(tmp_path / "state"))
    path = tmp_path / "state" / "mqserve" / f"{namespace}.log"
    assert shell.run("start", "--port", str(free_port())).returncode == 0
    script = f"""
import time
import mqserve as serve

def flood(request):
    import os, time
    if request.data == "fail":
        raise ValueError("after the flood")
    if request.data == "fork" and not os.fork():
        until = time.monotonic() + 30
        while time.monotonic() < until:
            print("y" * 100_000, flush=True)
            time.sleep(0.02)
        os._exit(0)
    print("x" * {detached_log.FILE_BYTES}, flush=True)

client = serve.connect()
client.create_backend("flood", flood)
client.create_endpoint("flood", backend="flood")
handle = client.get_handle("flood")
handle.remote("fork").result(30)
for _ in range(6):
    handle.remote("print").result(30)
    time.sleep(1)
"""
    try:
        ran = shell.python(script)
        assert ran.returncode == 0, ran.stderr
        wait_until(lambda: len(files_of(path)) == 5)
        wait_until(lambda: size_of(path) < 5 * 2 * detached_log.FILE_BYTES)
        ask = 'import mqserve as serve; serve.get_handle("flood").remote("fail").result(30)'
        assert "after the flood" in shell.python(ask).stderr
        wait_until(lambda: any("after the flood" in file.read_text() for file in files_of(path)))
        assert all(mode_of(file) == 0o600 for file in files_of(path))
    finally:
        shell.run("shutdown")
