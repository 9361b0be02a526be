"""What strangers send, and what user code raises, stands in logs and on terminals without passing for anything else."""

import logging
import re
import sys
from typing import Any

import httpx
import pytest

import mqserve as serve
from mqserve.broker.process.printable import printable, printable_lines
from mqserve.commands import logs
from tests.instances import CommandLine, started
from tests.ports import free_port

EVIL = "a\r\n23:59:59 [1] ERROR mqserve.FORGED: the key is 1234\x1b[31mred\x1b]0;title\x07\x9b2J\u202e\u2028\x7f"
FORGED = "23:59:59 [1] ERROR"
LINE = re.compile(r"\d\d:\d\d:\d\d \[\d+\] [A-Z]+ ")


def is_harmless(text: str) -> bool:
    """Each line is printable, and begins like one of ours or is indented."""
    lines = text.rstrip("\n").split("\n")
    return all(line.isprintable() and (LINE.match(line) or line.startswith("    ")) for line in lines) and f"\n{FORGED}" not in text


def formatted(message: str, *arguments: object, **more: Any) -> str:
    record = logging.LogRecord("mqserve.tests", logging.ERROR, __file__, 1, message, arguments, more.pop("exc_info", None), **more)
    return logs.LineFormatter().format(record)


# The form of a line.


def test_what_is_printable_stays_as_it_is() -> None:
    assert printable("Größe: 5 µm, 数 🙂 [b]") == "Größe: 5 µm, 数 🙂 [b]"


def test_what_is_not_printable_is_escaped_and_stays_on_its_line() -> None:
    assert printable("a\r\n\x1b[31m\u202e\x7f\ud800") == r"a\r\n\x1b[31m\u202e\x7f\ud800"


def test_lines_stay_lines_where_they_are_meant() -> None:
    assert printable_lines("one\ntwo\r\n\x1b", "  ") == "one\n  two\\r\n  \\x1b"


def test_an_argument_of_a_stranger_does_not_end_the_line() -> None:
    assert is_harmless(formatted("request %s of %s failed", EVIL, EVIL))


def test_a_traceback_keeps_its_lines_and_forges_none() -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        text = formatted("request %s failed", "x", exc_info=sys.exc_info())
    assert is_harmless(text), text
    assert '\n      File "' in text and "\n    ValueError: a\\r\n    23:59:59" in text


def test_a_record_that_is_too_long_keeps_its_beginning_and_its_end() -> None:
    for middle in ("x" * 5_000_000, "\n" * 200_000, "\U000e0001" * 200_000, "数" * 100_000):
        text = formatted("it begins %s and ends", middle)
        assert len(text.encode()) <= logs.MAX_BYTES
        assert "it begins" in text and text.endswith("and ends") and "characters are left out" in text
        assert is_harmless(text)


def test_a_record_of_64_kib_is_not_cut() -> None:
    text = formatted("%s", "x" * 65_000)
    assert text.endswith("x" * 65_000)


# Our processes.


def test_whatever_user_code_logs_raises_or_leaves_to_its_threads_is_harmless_on_stderr(shell: CommandLine) -> None:
    file = shell.file(
        "app.py",
        f"""
import asyncio, logging, threading, warnings
import mqserve as serve

EVIL = {EVIL!r}

class Unraisable:
    def __del__(self):
        raise ValueError(EVIL)

def fail():
    raise ValueError(EVIL)

@serve.endpoint("/")
async def misbehave(request):
    logging.getLogger("theirs").warning("seen: %s", EVIL)
    logging.getLogger(EVIL).error("by its name")
    warnings.warn(EVIL)
    threading.Thread(target=fail).start()
    asyncio.get_running_loop().call_soon(fail)
    Unraisable()
    raise ValueError(EVIL)
""",
    )
    port = free_port()
    program = shell.start("run", file, "--port", str(port))
    program.wait_for("Serving on")
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 500
    for words in (
        "WARNING theirs",
        "ERROR a\\r",
        "py.warnings",
        "the thread ",
        "outside any request",
        "Unraisable.__del__",
        "of misbehave failed",
    ):
        program.wait_for(words)
    program.close()
    logged = (
        program.output[program.output.index("WARNING theirs") - len("23:59:59 [123456] ") :].partition("\n")[2].partition("\nDraining")[0]
    )
    assert is_harmless(logged), program.output


def test_an_error_of_a_command_is_harmless_on_a_terminal(shell: CommandLine) -> None:
    shell.file("app.py", f"raise ValueError({EVIL!r})")
    ran = shell.run("run", "app.py")
    first, *more = ran.stderr.rstrip("\n").split("\n")
    assert ran.returncode == 1 and first.startswith("Error: app.py does not import")
    assert all(line.isprintable() for line in (first, *more)) and all(line.startswith("    ") for line in more), ran.stderr


# Embedded, under a logging set-up of the user's own.


def test_ids_paths_and_errors_are_escaped_for_loggers_of_the_users_own(caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: serve.Request) -> None:
        raise ValueError(request.path_params["text"] + "\x1b[2J")

    with started() as client, caplog.at_level(logging.INFO):
        client.create_backend("fail", fail)
        client.create_endpoint("fail", backend="fail", route="/fail/{text:path}")
        assert httpx.get(f"{client.http_url()}/fail/%1b%5b31m%e2%80%ae").status_code == 500
    assert "of fail failed" in caplog.text and "\\x1b[31m\\u202e\\x1b[2J" in caplog.text
    assert "\x1b" not in caplog.text and "\u202e" not in caplog.text
