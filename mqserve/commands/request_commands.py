"""The commands about requests: dead letters."""

from __future__ import annotations

import click

from ..broker.process.lifeline import run as run_loop
from .endings import one_sentence
from .options import distributed, json_option, namespace_option, with_options


@click.group()
def dead() -> None:
    """List, show, retry and drop dead letters, the messages that were set aside."""


selection_options = [
    click.argument("backend"),
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    click.option("--all", "everything", is_flag=True, help="Every dead letter of the backend."),
    click.option("--yes", is_flag=True, help="Required with --all for more than 10 dead letters."),
]


@dead.command("list")
@click.argument("backend")
@namespace_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The largest number to list, oldest first.")
@json_option
@one_sentence
def list_dead(backend: str, namespace: str | None, limit: int, as_json: bool) -> int:
    """List the dead letters of BACKEND."""
    from . import dead as letters

    return run_loop(letters.list_dead(distributed(namespace, "dead list"), backend, limit, as_json=as_json))


@dead.command("show")
@click.argument("backend")
@click.argument("message_id", metavar="ID")
@namespace_option
@json_option
@one_sentence
def show_dead(backend: str, message_id: str, namespace: str | None, as_json: bool) -> int:
    """Show all that is known of one dead letter."""
    from . import dead as letters

    return run_loop(letters.show_dead(distributed(namespace, "dead show"), backend, message_id, as_json=as_json))


@dead.command("retry")
@with_options(selection_options)
@namespace_option
@one_sentence
def retry_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Send dead letters to BACKEND again, under their ids and as if they had never run."""
    from . import dead as letters

    selection = letters.Selection.read(ids, everything)
    return run_loop(letters.retry_dead(distributed(namespace, "dead retry"), backend, selection, yes=yes))


@dead.command("drop")
@with_options(selection_options)
@namespace_option
@one_sentence
def drop_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Drop dead letters of BACKEND for good."""
    from . import dead as letters

    selection = letters.Selection.read(ids, everything)
    return run_loop(letters.drop_dead(distributed(namespace, "dead drop"), backend, selection, yes=yes))
