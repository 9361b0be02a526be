"""What is kept of each cycle of coming and going: nothing, in no process. Hundreds of cycles, each kind in a process of its own.

The measure is the median of all slopes between the lowest readings of fifty cycles each: an event loop that is about to be freed is
a quarter of a megabyte. It is not 0, since a result is kept for ten minutes, 350 bytes with its key.
"""

import faulthandler
import itertools
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.instances import ROOT, CommandLine, Program
from tests.leaks.traced import FILE_VARIABLE, Kept

pytestmark = pytest.mark.long

TRACED_LIMIT = 1024.0  # bytes a cycle
RESIDENT_LIMIT = 16 * 1024.0  # the allocator's own comings and goings are in it: up to 8 KiB on a busy machine, 0.1 on a quiet one


def go_through(
    shell: CommandLine, kind: str, count: int, others: dict[str, tuple[Program, Path]], deadline_s: float
) -> dict[str, list[Kept]]:
    """What each process kept after every tenth cycle."""
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test
    told = [str(word) for name, (program, file) in others.items() for word in (name, program.pid, file)]
    alone = shell.with_variables(PYTHONPATH=str(ROOT), MALLOC_ARENA_MAX="1")  # threads that come and go would leave glibc arenas half empty
    program = alone.start_program([sys.executable, "-m", "tests.leaks.cycles", kind, str(count), *told])
    assert program.wait(deadline_s) == 0, program.output
    kept: dict[str, list[Kept]] = defaultdict(list)
    for line in program.output.splitlines():
        match line.split():
            case [number, name, traced, resident] if number.isdecimal():
                kept[name].append(Kept(int(traced), int(resident)))
    return kept


def slope(values: list[int]) -> float:
    """Bytes a cycle; a value is that of ten cycles."""
    lowest = [min(values[start : start + 5]) for start in range(0, len(values), 5)]
    pairs = itertools.combinations(enumerate(lowest), 2)
    return statistics.median((second - first) / (50 * (later - earlier)) for (earlier, first), (later, second) in pairs)


def keeps_nothing(kept: dict[str, list[Kept]], *, settled: int, resident_limit: float = RESIDENT_LIMIT) -> None:
    """Once `settled` cycles have filled what is filled once."""
    assert "here" in kept and all(len(values) * 10 > 2 * settled for values in kept.values()), kept
    for name, values in kept.items():
        later = values[settled // 10 :]
        traced, resident = slope([value.traced for value in later]), slope([value.resident for value in later])
        assert traced < TRACED_LIMIT, f"{name} keeps {traced:.0f} traced bytes of each cycle"
        assert resident < resident_limit, f"{name} grows by {resident:.0f} bytes in each cycle, of which tracemalloc knows {traced:.0f}"


def traced(shell: CommandLine, name: str, *command: str) -> tuple[Program, Path]:
    """A command whose process can be asked what it keeps, and the file in which it says so."""
    file = shell.folder / f"{name}.kept"
    told = shell.with_variables(**{FILE_VARIABLE: str(file)})
    return told.start_program([sys.executable, "-m", "tests.leaks.traced", *command]), file


@pytest.mark.parametrize("kind", ["start", "deploy", "endpoint", "update"])
def test_a_process_with_an_embedded_instance_keeps_nothing(kind: str, shell: CommandLine) -> None:
    keeps_nothing(go_through(shell, kind, 500, {}, 900), settled=100)


@pytest.mark.parametrize("kind", ["deploy", "endpoint"])
def test_neither_controller_nor_proxy_nor_client_nor_node_keeps_anything(kind: str, distributed_shell: CommandLine) -> None:
    shell = distributed_shell
    members = {"controller": traced(shell, "controller", "controller")}
    members["proxy"] = traced(shell, "proxy", "proxy", "--port", "0")
    kept = go_through(shell, kind, 500, members, 1500)
    assert set(kept) == {"here", "controller", "proxy"}
    keeps_nothing(kept, settled=100)


def test_a_process_that_starts_and_ends_distributed_instances_keeps_nothing(distributed_shell: CommandLine) -> None:
    kept = go_through(distributed_shell, "start", 150, {}, 1500)
    keeps_nothing(kept, settled=50, resident_limit=64 * 1024.0)  # few cycles, of which each makes threads: malloc's gaps are most of it
