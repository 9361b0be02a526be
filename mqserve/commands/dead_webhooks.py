"""Webhooks that were given up: which there are, and what becomes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from ..broker.dead_letters import DeadLetter
from ..broker.errors import BadEnvelope, BadValue, MQServeError, UnknownBackend
from ..broker.process.printable import printable
from ..broker.queue import DeadLetters
from ..broker.settings import Settings
from ..broker.webhooks import Webhook
from ..connections import Connections, open_connections
from .dead import EXCEPT_HELD
from .printing import print_json, print_sentence, when
from .status_table import fitting_table, make_console, print_table

ASK_ABOVE = 10

Act = Callable[[Connections, DeadLetter], Awaitable[None]]


async def list_webhooks(settings: Settings, limit: int, *, as_json: bool, console: Console | None = None) -> int:
    """Prints them as a table, or as JSON, one per line."""
    console = console or make_console()
    waiting, elsewhere, facts = 0, False, list[dict[str, Any]]()
    with suppress(UnknownBackend):
        async with _given_up(settings, limit) as (_, letters):
            waiting, elsewhere = letters.waiting, letters.is_read_elsewhere
            facts = [_facts(letter) async for letter in letters]
    facts.sort(key=lambda fact: fact["since_ms"])
    if as_json:
        return print_json(console, facts)
    if not facts:
        return print_sentence(console, _none(elsewhere))
    title = "Webhooks that were given up" + (f", {len(facts)} of {waiting}" if waiting > len(facts) else "")
    rows = [
        (fact["id"], when(fact["since_ms"]), fact["job"], fact["type"], fact["receiver"], str(fact["tries"]), fact["error"])
        for fact in facts
    ]
    columns = ("id", "first try", "job", "event", "receiver", "tries", "error")
    cells = [[Text(printable(word)) for word in row] for row in rows]
    print_table(console, fitting_table(console, title, columns, cells, ("tries", "first try", "event", "receiver", "job")))
    return 0


async def retry_webhooks(settings: Settings, ids: tuple[str, ...], *, everything: bool, yes: bool) -> int:
    """Sends each again, under its id, for another day. Raises BadValue for too many, MQServeError for an unknown id, and the broker's
    error for the first one that it does not take."""

    async def retry(connections: Connections, letter: DeadLetter) -> None:
        webhook = Webhook.from_bytes(letter.body)
        await connections.queue.webhooks.declare()
        await connections.queue.webhooks.send(replace(webhook, since_ms=connections.store.now_ms(), tries=0, error=""))

    return await _settle(settings, ids, everything, yes, retry, "retry", "sent again")


async def drop_webhooks(settings: Settings, ids: tuple[str, ...], *, everything: bool, yes: bool) -> int:
    """Removes each for good. Raises BadValue for too many, and MQServeError for an unknown id."""

    async def drop(connections: Connections, letter: DeadLetter) -> None:
        pass

    return await _settle(settings, ids, everything, yes, drop, "drop", "dropped")


@asynccontextmanager
async def _given_up(settings: Settings, at_most: int | None = None) -> AsyncIterator[tuple[Connections, DeadLetters]]:
    """Raises UnknownBackend where no controller has ever sent webhooks."""
    async with open_connections(settings, "webhooks") as connections, connections.queue.webhooks.dead(at_most) as letters:
        yield connections, letters


async def _settle(settings: Settings, ids: tuple[str, ...], everything: bool, yes: bool, act: Act, verb: str, done: str) -> int:
    if bool(ids) == everything:
        raise BadValue("name them by their ids, as `mqserve webhooks list` shows them, or use --all")
    seen: list[str] = []
    kept: list[str] = []
    elsewhere = False
    try:
        async with _given_up(settings) as (connections, letters):
            elsewhere = letters.is_read_elsewhere
            if everything and letters.waiting > ASK_ABOVE and not yes:
                raise BadValue(f"{letters.waiting} webhooks were given up: add --yes to {verb} them all")
            async for letter in letters:
                if not everything and letter.name not in ids:
                    continue
                seen.append(letter.name)
                try:
                    await act(connections, letter)
                except BadEnvelope as error:
                    kept.append(f"{printable(letter.name)} stays: {error}")
                else:
                    await letters.remove(letter)
    except UnknownBackend:
        pass  # there is none
    missing = [f"no webhook {printable(name)} was given up: see `mqserve webhooks list`" for name in sorted(set(ids).difference(seen))]
    told = f"{len(seen) - len(kept)} {done}"
    if kept or missing:
        raise MQServeError("; ".join([told, *kept, *missing]))
    return print_sentence(None, f"{told}." if seen else _none(elsewhere))


def _none(is_read_elsewhere: bool) -> str:
    return f"No webhooks were given up{EXCEPT_HELD if is_read_elsewhere else ''}."


def _facts(letter: DeadLetter) -> dict[str, Any]:
    """Returns what is known of one. Only controllers may write them, but a later version may have others."""
    try:
        webhook = Webhook.from_bytes(letter.body)
        said = msgspec.json.decode(webhook.body, type=_Said)
    except (BadEnvelope, msgspec.MsgspecError) as error:
        webhook, said = Webhook(0, letter.id, "", "", 0, error=str(error)), _Said()
    return {
        "id": letter.name,
        "since_ms": webhook.since_ms,
        "job": said.data.id,
        "type": said.type,
        "url": webhook.url,
        "receiver": webhook.receiver,
        "tries": webhook.tries,
        "error": webhook.error,
    }


class _Job(msgspec.Struct, frozen=True):
    id: str = ""


class _Said(msgspec.Struct, frozen=True):
    """Of the body of a webhook, what operators are shown."""

    type: str = ""
    data: _Job = _Job()
