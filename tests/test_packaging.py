"""What ships: the wheel's folders, the links in mqserve/, the image and the compose file."""

import ast
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mqserve

ROOT = Path(__file__).parent.parent
PARTS = ("broker", "proxy", "replicas", "controller")
COMMANDS = {"run", "start", "node", "proxy", "replica", "controller", "status", "shutdown"}

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE_TEXT = (ROOT / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def test_every_package_folder_goes_into_the_wheel() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    rooms = [folder for folder in (ROOT / "mqserve").iterdir() if folder.is_dir() and not folder.is_symlink()]
    inits = [init for folder in (*rooms, *(ROOT / part for part in PARTS)) for init in folder.rglob("__init__.py")]
    found = [init.parent.relative_to(ROOT).parts for init in inits]
    assert set(listed) == {"mqserve", *(".".join(folder if folder[0] == "mqserve" else ("mqserve", *folder)) for folder in found)}


@pytest.mark.parametrize("part", PARTS)
def test_no_module_imports_a_folder_by_its_bare_name(part: str) -> None:
    """It works from the root, and makes a second copy of every class. Ruff bans it everywhere but here."""
    imported = {(file.name, name.split(".")[0]) for file in (ROOT / part).rglob("*.py") for name in absolute_imports(file)}
    assert not {(file, name) for file, name in imported if name in PARTS}


def absolute_imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize("part", PARTS)
def test_the_link_to_each_folder_is_relative(part: str) -> None:
    assert os.readlink(ROOT / "mqserve" / part) == f"../{part}"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout, so nothing is committed here")
def test_the_link_to_each_folder_is_committed_as_a_link(part: str) -> None:
    # safe.directory: the checkout may belong to another user than the one who tests it
    command = ["git", "-c", "safe.directory=*", "ls-files", "--stage", f"mqserve/{part}"]
    entry = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert entry.startswith("120000 "), f"git holds mqserve/{part} as {entry!r}, not as a link (mode 120000)"


def test_the_package_says_the_version_it_is_released_as() -> None:
    assert mqserve.__version__ == PYPROJECT["project"]["version"]


def test_compose_runs_two_proxies_a_controller_and_a_node() -> None:
    assert sorted(service["command"][0] for service in OURS.values()) == ["controller", "node", "proxy", "proxy"]


@pytest.mark.parametrize("name", OURS)
def test_a_composed_command_is_one_the_command_line_has(name: str) -> None:
    assert OURS[name]["command"][0] in COMMANDS


@pytest.mark.parametrize("name", SERVICES)
def test_a_composed_service_says_whether_it_is_healthy(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


_FROM_ENV = r"\$\{\w+:(?:\?[^}]+|-)\}"  # needed, with what to do; or empty unless it is set


def test_compose_holds_no_secret() -> None:
    secret = re.compile(r"PASS|SECRET|KEY|TOKEN")
    literals = [
        f"{service}: {name}"
        for service, settings in SERVICES.items()
        for name, value in settings.get("environment", {}).items()
        if secret.search(name) and not re.fullmatch(_FROM_ENV, value)
    ]
    passwords_in_urls = re.findall(r"://[^/@\s]*:(?!\$\{)[^/@\s]+@", COMPOSE_TEXT)
    passwords_of_users = re.findall(r'"password": "(?!\$\{)|user \S+ on (?!>\$\{)', COMPOSE_TEXT)
    assert not literals and not passwords_in_urls and not passwords_of_users


def test_every_dollar_is_one_that_compose_reads() -> None:
    assert not re.findall(r"\$.{0,20}", re.sub(rf"\$\$|{_FROM_ENV}", "", COMPOSE_TEXT))


def test_every_config_is_inside_the_file_and_mounted() -> None:
    configs: dict[str, dict[str, str]] = yaml.safe_load(COMPOSE_TEXT)["configs"]
    mounted = {config["source"] for service in SERVICES.values() for config in service.get("configs", ())}
    assert mounted == {name for name, config in configs.items() if config["content"]}


def test_the_example_environment_defines_what_compose_asks_for() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE_TEXT))
    defined = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert asked <= defined, f".env.example lacks {asked - defined}"


def test_the_image_holds_the_package_and_the_four_folders_it_links_to() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    copied = {source.rstrip("/") for line in lines for source in shlex.split(line)[1:-1]}
    assert copied >= {"mqserve", *PARTS, "pyproject.toml"}
