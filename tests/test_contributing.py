"""CONTRIBUTING.md, held to the code: its commands work, and what it names is there."""

import json
import re
import signal
import sys

import pytest

from tests.instances import FORMS, ROOT, CommandLine
from tests.servers import START_DEADLINE_S

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
NAMED = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL).replace("\n", " "))
PYTEST, KEPT_SERVERS = ".venv/bin/python -m pytest ", ".venv/bin/python -m tests.kept_servers"


def test_every_command_is_of_a_kind_that_is_tested_here() -> None:
    assert [line for line in COMMANDS if not line.startswith(("make ", PYTEST)) and line != KEPT_SERVERS] == []


def test_every_target_of_make_is_one() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for text in [*COMMANDS, *NAMED] if text.startswith("make ") for word in text.split()[1:] if "=" not in word}
    assert targets
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith(PYTEST)])
def test_a_command_of_pytest_selects_tests(command: str) -> None:
    where, *chosen = command.removeprefix(PYTEST).split(" -k ")
    assert (ROOT / where).exists()
    assert all(word in FORMS or re.fullmatch(r"row_\d\d", word) for word in chosen)


def test_every_file_that_is_named_is_there() -> None:
    names = {name for name in NAMED if re.fullmatch(r"[\w./]+(\.\w+|/)", name)}
    assert len(names) > 20
    assert {name for name in names if not (ROOT / name).exists()} == set()


def test_every_variable_that_is_named_is_read_somewhere() -> None:
    """README.md and docs/ list them all, which `tests/test_docs.py` holds to the code."""
    listed = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    variables = set(re.findall(r"MQSERVE_[A-Z_]+", TEXT))
    assert variables and {name for name in variables if name not in listed} == set()


@pytest.mark.usefixtures("broker_url", "store_url")  # without these programs it is skipped
def test_the_kept_servers_answer_under_the_names_they_print_and_end_with_ctrl_c(shell: CommandLine) -> None:
    kept = shell.with_variables(PYTHONPATH=str(ROOT)).start_program([sys.executable, *KEPT_SERVERS.split()[1:]])
    kept.wait_for("MQSERVE_SECRET_KEY", deadline_s=2 * START_DEADLINE_S)
    told = dict(re.findall(r"(MQSERVE_\w+)='(.*?)'", kept.output))
    assert told["MQSERVE_BROKER_URL"] == told["MQSERVE_TEST_BROKER_URL"] and told["MQSERVE_STORE_URL"] == told["MQSERVE_TEST_STORE_URL"]
    status = shell.with_variables(**{name: value for name, value in told.items() if "_TEST_" not in name}).run("status", "--json")
    facts = json.loads(status.stdout)
    assert (facts["broker"]["state"], facts["store"]["state"], facts["state"]) == ("up", "up", "none"), status
    kept.signal(signal.SIGINT)
    assert kept.wait() == 0, kept.output
