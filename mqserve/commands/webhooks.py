"""`mqserve webhooks`: what receivers of webhooks need to know, and those that were given up."""

from __future__ import annotations

import os
from typing import Any

import click

from ..broker.errors import MQServeError
from ..broker.process.lifeline import run as run_loop
from ..broker.settings import read_secret
from ..broker.values.webhook_signing import written
from .endings import one_sentence
from .options import distributed, json_option, namespace_option, read_settings, with_options


@click.group()
def webhooks() -> None:
    """Webhooks tell receivers of the ends of jobs: print their secret, and list, retry and drop those that were given up."""


@webhooks.command("secret")
@namespace_option
@one_sentence
def secret(namespace: str | None) -> int:
    """Print the secret by which receivers check the signatures: that of the environment, or the one that the instance's key makes."""
    settings = read_settings(namespace)
    if not (settings.callbacks.secret or read_secret(os.environ, "SECRET_KEY")):
        raise MQServeError("there is no secret: set MQSERVE_SECRET_KEY as the controllers have it, or MQSERVE_WEBHOOK_SECRET")
    click.echo(written(settings.webhook_secrets[0]))
    return 0


selection_options = [
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    click.option("--all", "everything", is_flag=True, help="Every webhook that was given up."),
    click.option("--yes", is_flag=True, help="Required with --all for more than 10."),
]


@webhooks.command("list")
@namespace_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The largest number to list, oldest first.")
@json_option
@one_sentence
def list_given_up(namespace: str | None, limit: int, as_json: bool) -> int:
    """List the webhooks that were given up, with the reasons. They are kept for seven days."""
    from . import dead_webhooks

    return run_loop(dead_webhooks.list_webhooks(distributed(namespace, "webhooks list"), limit, as_json=as_json))


@webhooks.command("retry")
@with_options(selection_options)
@namespace_option
@one_sentence
def retry_given_up(namespace: str | None, ids: tuple[str, ...], **options: Any) -> int:
    """Send webhooks that were given up again, under their ids."""
    from . import dead_webhooks

    return run_loop(dead_webhooks.retry_webhooks(distributed(namespace, "webhooks retry"), ids, **options))


@webhooks.command("drop")
@with_options(selection_options)
@namespace_option
@one_sentence
def drop_given_up(namespace: str | None, ids: tuple[str, ...], **options: Any) -> int:
    """Drop webhooks that were given up for good."""
    from . import dead_webhooks

    return run_loop(dead_webhooks.drop_webhooks(distributed(namespace, "webhooks drop"), ids, **options))
