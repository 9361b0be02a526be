"""compose.yaml without containers: its users on servers of our own, its services as plain processes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.instances import ROOT, CommandLine, Program
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ, PrivateRedis

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
ROLES = ("controller", "node", "proxy", "replica", "client")


def dot_env() -> dict[str, str]:
    """What an operator would fill in; what may be empty is."""
    names = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    optional = re.findall(r"\$\{(\w+):-\}", (ROOT / "compose.yaml").read_text())
    return {name: "" if name in optional else secrets.token_hex(32) for name in names}


def interpolated(text: str, env: Mapping[str, str]) -> str:
    """As Compose does it: `${NAME:?why}`, `${NAME:-}` and `$$`."""
    return re.sub(r"\$\$|\$\{(\w+)(?::[?-][^}]*)?\}", lambda found: env[found[1]] if found[1] else "$", text)


def configured(name: str, env: Mapping[str, str]) -> str:
    """The content of one of its `configs`."""
    return interpolated(COMPOSE["configs"][name]["content"], env)


class Composed:
    """The services that are ours, on the two servers."""

    def __init__(self, folder: Path, broker: PrivateRabbitMQ, store: PrivateRedis, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.broker = broker
        self.store = store
        self.env = env
        self.ports: dict[str, int] = {}
        self.programs: dict[str, Program] = {}

    def url(self, kind: str, role: str) -> str:
        """Of a role's user on RabbitMQ (`amqp`) or Redis (`redis`)."""
        where = f"{self.broker.port}/" if kind == "amqp" else f"{self.store.port}/0"
        return f"{kind}://mqserve-{role}:{self.env[f'MQSERVE_{role.upper()}_PASSWORD']}@127.0.0.1:{where}"

    def shell(self, role: str) -> CommandLine:
        """The command line of somebody who has one role's two URLs, and the key."""
        return CommandLine(
            self.folder,
            MQSERVE_BROKER_URL=self.url("amqp", role),
            MQSERVE_STORE_URL=self.url("redis", role),
            MQSERVE_SECRET_KEY=self.env["MQSERVE_SECRET_KEY"],
        )

    def start(self, service: str) -> Program:
        """One service with its own command and environment, but for hosts and ports."""
        settings = COMPOSE["services"][service]
        variables = {name: self._located(interpolated(value, self.env)) for name, value in settings["environment"].items()}
        command = ["127.0.0.1" if word == "0.0.0.0" else word for word in settings["command"]]
        for flag in ("--port", "--metrics-port"):
            if flag in command:
                self.ports[service] = free_port()
                command[command.index(flag) + 1] = str(self.ports[service])
        self.programs[service] = CommandLine(self.folder, **variables, MQSERVE_VERBOSE="1").start(*command)
        return self.programs[service]

    def _located(self, value: str) -> str:
        if value.startswith("file://"):
            (results := self.folder / "results").mkdir(exist_ok=True)
            return results.as_uri()
        return value.replace("@rabbitmq:5672", f"@127.0.0.1:{self.broker.port}").replace("@redis:6379", f"@127.0.0.1:{self.store.port}")

    def outputs(self) -> str:
        return "\n".join(program.output for program in self.programs.values())

    def close(self) -> None:
        for program in reversed(self.programs.values()):
            program.close()
