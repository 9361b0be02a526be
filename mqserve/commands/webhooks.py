"""`mqserve webhooks`: what receivers of webhooks need to know."""

from __future__ import annotations

import os

import click

from ..broker.errors import MQServeError
from ..broker.settings import read_secret
from ..broker.values.webhook_signing import written
from .endings import one_sentence
from .options import namespace_option, read_settings


@click.group()
def webhooks() -> None:
    """Webhooks tell receivers of the ends of jobs."""


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
