"""The programs of RabbitMQ and Redis on this machine."""

import os
import shutil
from glob import glob
from pathlib import Path

HOW_TO_INSTALL = """\
Debian, Ubuntu:  sudo apt-get install rabbitmq-server redis-server
Fedora:          sudo dnf install rabbitmq-server redis
macOS:           brew install rabbitmq redis
or name servers that run: MQSERVE_TEST_BROKER_URL=amqp://… and MQSERVE_TEST_STORE_URL=redis://…"""


class ServerMissing(Exception):
    """The server's program is not on this machine; the message says what to install."""


def find_redis() -> Path:
    return _first_program("redis-server")


def find_rabbitmq() -> Path:
    """The server's own script: Debian's /usr/sbin/rabbitmq-server insists on the user `rabbitmq`."""
    return _first_program(
        "rabbitmq-server",
        "/usr/lib/rabbitmq/bin",
        "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
        "/opt/rabbitmq/sbin",
        "/opt/homebrew/opt/rabbitmq/sbin",
        "/usr/local/opt/rabbitmq/sbin",
    )


ERLANGS = ("/usr/lib/erlang/bin", "/usr/lib*/erlang/erts-*/bin", "/usr/local/lib/erlang/erts-*/bin")


def find_epmd() -> Path:
    return _first_program("epmd", *ERLANGS)


def find_erl_call() -> Path | None:
    """Not in every package of Erlang."""
    try:
        return _first_program("erl_call", *ERLANGS)
    except ServerMissing:
        return None


def missing_servers() -> list[str]:
    """What of RabbitMQ and Redis is not on this machine, by program name."""
    missing = []
    for find in (find_rabbitmq, find_redis):
        try:
            find()
        except ServerMissing as error:
            missing.append(str(error))
    return missing


def _first_program(name: str, *folders: str) -> Path:
    """The program in the folder that MQSERVE_TEST_SERVERS names, for other versions than the machine's; else in the first of the folders
    that has it, on PATH, or among the administrator's programs."""
    named = os.environ.get("MQSERVE_TEST_SERVERS")
    for folder in (*([named] if named else []), *folders):
        for path in glob(f"{folder}/{name}"):
            if os.access(path, os.X_OK):
                return Path(path)
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin")
    if found is None:
        raise ServerMissing(f"{name} is not installed")
    return Path(found)
