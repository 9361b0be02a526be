"""The options that several commands have, and the settings that they make. URLs and keys are environment variables only, so that no
process list shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..broker.errors import MQServeError
from ..broker.settings import Settings
from ..controller.state.documents import HttpOptions
from ..instance.starting import LOCATIONS, MAX_WORKERS


def read_settings(namespace: str | None) -> Settings:
    return Settings.read(namespace=namespace)


def distributed(namespace: str | None, command: str) -> Settings:
    settings = read_settings(namespace)
    if settings.embedded:
        raise MQServeError(
            f"`mqserve {command}` joins other processes over RabbitMQ and Redis: "
            "set MQSERVE_BROKER_URL (amqp://…) and MQSERVE_STORE_URL (redis://…)"
        )
    return settings


namespace_option = click.option(
    "--namespace", envvar="MQSERVE_NAMESPACE", metavar="NAME", help="The instance's name on broker and store [mqserve]."
)
http_options = [
    click.option("--host", envvar="MQSERVE_HTTP_HOST", default="127.0.0.1", show_default=True, help="Where proxies listen."),
    click.option(
        "--port", envvar="MQSERVE_HTTP_PORT", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one."
    ),
    click.option(
        "--location", envvar="MQSERVE_HTTP_LOCATION", type=click.Choice(LOCATIONS), default="HeadOnly", show_default=True,
        help="Which nodes run a proxy.",
    ),
    click.option(
        "--futures-path", envvar="MQSERVE_FUTURES_PATH", default=HttpOptions().futures_path, show_default=True,
        help="Where requests are found by their ids.",
    ),
    click.option("--debug", is_flag=True, envvar="MQSERVE_DEBUG", help="Show tracebacks in HTTP answers."),
    click.option(
        "--http-workers", envvar="MQSERVE_HTTP_WORKERS", type=click.IntRange(1, MAX_WORKERS), default=1, show_default=True,
        help="Proxies on each port: one for each core that HTTP may take.",
    ),
]  # fmt: skip


kept_options = [  # options that a keeper passes to the process that it starts: see supervisor.py
    click.option("--instance", hidden=True, default=""),
    click.option("--kept-by", hidden=True, default=""),
    click.option("--kept-node", hidden=True, default=""),
    click.option("--lock", hidden=True, type=int),
]


def http_settings(http_workers: int, **others: Any) -> dict[str, Any]:
    """Returns the `http_options` of `serve.start`."""
    return {"workers": http_workers, **others}


def with_options(options: list[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts, one object per line.")
