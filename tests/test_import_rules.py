"""Who may know whom, as docs/design.md draws the house: no file imports upward, and there is no circle of imports anywhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("broker", "proxy", "replicas", "controller")

BROKER = {"broker", "broker.process", "broker.values", "broker.files", "broker.calls"}
MAY_KNOW = {
    "broker": {"broker", "broker.process", "broker.values"},
    "broker.process": {"broker.process"},
    "broker.values": {"broker.values", "broker.files", "broker.process"},
    "broker.files": {"broker.files", "broker.process"},
    "broker.rabbitmq": {"broker.rabbitmq", "broker", "broker.process", "broker.values"},
    "broker.redis": {"broker.redis", "broker", "broker.process", "broker.values"},
    "broker.memory": {"broker.memory", "broker", "broker.process", "broker.values"},
    "broker.calls": BROKER,
    "controller.state": {"controller.state", *BROKER},
    "controller": {"controller", "controller.state", *BROKER},
    "proxy": {"proxy", "controller.state", *BROKER},
    "replicas": {"replicas", "controller.state", *BROKER},
}
"""Room -> the rooms that its files import from. `mqserve` and its own rooms compose all of them, and are known by none."""

ALSO = {
    "broker.process": {"broker.errors", "broker.failures"},
    "broker.files": {"broker.errors", "broker.store", "broker.store_keys"},
    "broker.values": {"broker.errors", "broker.failures", "broker.store", "broker.store_keys"},
    "proxy": {"broker.rabbitmq.queue", "broker.redis.store"},
    "replicas": {"broker.rabbitmq.queue", "broker.redis.store", "broker.rabbitmq.connection"},
}
"""Single files beyond that: what everything leans on, and what a process of its own opens."""


def module_of(path: Path) -> str:
    """Such as `broker.redis.store`; `mqserve` and its own modules keep their first word."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for folder in ("mqserve", *FOLDERS) for path in (ROOT / folder).rglob("*.py")}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports_of(module: str) -> Iterator[str]:
    """The modules of ours that it imports when it runs; not those for its types alone."""
    package = room_of(module).split(".")
    for node in nodes_that_run(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = ["mqserve", *package] if package[0] != "mqserve" else package
            target = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                for name in (f"{target}.{alias.name}", target):
                    known = name if name in MODULES else name.removeprefix("mqserve.")
                    if known in MODULES:
                        yield known
                        break


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from nodes_that_run(node)


@pytest.mark.parametrize("room", MAY_KNOW)
def test_a_room_knows_only_those_below_it(room: str) -> None:
    found = {(module, known) for module in MODULES if room_of(module) == room for known in imports_of(module)}
    assert found
    strange = {(module, known) for module, known in found if room_of(known) not in MAY_KNOW[room] and known not in ALSO.get(room, ())}
    assert not strange


def test_each_room_has_a_rule() -> None:
    assert {room_of(module) for module in MODULES if not module.startswith("mqserve")} == set(MAY_KNOW)


def test_there_is_no_circle_of_imports() -> None:
    graph = {module: {known for known in imports_of(module) if known != module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


NOT_IN_A_REPLICA = {
    "mqserve.proxy", "mqserve.controller.node", "mqserve.controller.loop", "mqserve.instance.embedded",
    "uvicorn", "httptools", "h11", "psutil", "rich",
}  # fmt: skip


def test_a_replica_imports_nothing_that_only_other_processes_need() -> None:
    """Each of a fleet of replicas pays for its imports, in memory and in the time of its start."""
    program = "import sys, mqserve.commands.cli, mqserve.replicas.main; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert "mqserve.replicas.main" in imported
    assert not NOT_IN_A_REPLICA & {*imported}
