"""`mqserve dead`: lists dead letters, retries them and drops them. No command opens a pickle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from ..broker.dead_letters import DeadLetter
from ..broker.envelope import Envelope, endpoint_key
from ..broker.errors import BadEnvelope, BadValue, MQServeError, UnknownBackend
from ..broker.jobs import UNENDED_TTL_S, facts_of
from ..broker.pipelines import Plan
from ..broker.process.printable import printable
from ..broker.queue import DeadLetters, fate_of
from ..broker.queue_names import ENDPOINTS, check_name
from ..broker.settings import Settings
from ..broker.values.header_seals import BackendSeals, Seal
from ..connections import Connections, open_connections
from ..controller.endpoint_jobs import check_published
from ..controller.state.documents import Desired
from ..controller.state.reading import read_desired, read_observed
from ..replicas.admission import NOT_STARTED
from ..replicas.trust import SenderTrust
from .printing import print_json, print_sentence, when
from .status_table import fitting_table, make_console, print_table

ASK_ABOVE = 10
EXCEPT_HELD = ", except those that another command holds"
PREVIEW_BYTES = 1000
CONFIRM_BUDGET_S = 10.0
_BODY_KEPT_MS = 60_000  # added to the deadline, as senders do for bodies and replicas for marks


class Selection(NamedTuple):
    """The dead letters that a command is about."""

    names: frozenset[str]
    everything: bool

    @classmethod
    def read(cls, names: tuple[str, ...], everything: bool) -> Selection:
        """Parses the arguments. Raises BadValue for both ids and `--all`, and for neither."""
        if bool(names) == everything:
            raise BadValue("name them by their ids, as `mqserve dead list` shows them, or use --all")
        return cls(frozenset(names), everything)

    def name_of(self, letter: DeadLetter) -> str:
        """Returns the name that selected the letter, or an empty string. An id with unprintable characters is also selected by its
        printed form."""
        if self.everything:
            return letter.name
        return next((name for name in (letter.name, printable(letter.name)) if name in self.names), "")


async def list_dead(settings: Settings, backend: str, limit: int, *, as_json: bool, console: Console | None = None) -> int:
    """Prints the dead letters as a table, or as JSON, one per line. Raises UnknownBackend."""
    console = console or make_console()
    async with _dead_letters(settings, backend, limit) as (_, letters):
        waiting, elsewhere = letters.waiting, letters.is_read_elsewhere
        facts = [_facts(letter) async for letter in letters]
    facts.sort(key=lambda fact: fact["died_at_ms"])
    if as_json:
        return print_json(console, facts)
    if not facts:
        return print_sentence(console, _none(backend, elsewhere))
    title = f"Dead letters of {backend}" + (f", {len(facts)} of {waiting}" if waiting > len(facts) else "")
    rows = [(fact["id"], when(fact["died_at_ms"]), str(len(fact["attempts"])), fact["reason"]) for fact in facts]
    cells = [[Text(printable(word)) for word in row] for row in rows]
    print_table(console, fitting_table(console, title, ("id", "died at", "attempts", "reason"), cells, ("attempts", "died at")))
    return 0


async def show_dead(settings: Settings, backend: str, name: str, *, as_json: bool, console: Console | None = None) -> int:
    """Prints all that is known of a dead letter; of each, if several have the name. Raises UnknownBackend, BadValue for an unknown id."""
    console = console or make_console()
    selection = Selection.read((name,), False)
    async with _dead_letters(settings, backend) as (connections, letters):
        found = [await _all_facts(connections, letter) async for letter in letters if selection.name_of(letter)]
    if not found:
        raise BadValue(_no_such(backend, name))
    if as_json:
        return print_json(console, found)
    for fact in found:
        for key, value in fact.items():
            _print_fact(console, key, value)
        console.print()
    return 0


async def retry_dead(settings: Settings, backend: str, selection: Selection, *, yes: bool, console: Console | None = None) -> int:
    """Publishes each letter again under its id, as if it had never run, and then removes it; prints how many.

    A retry that is killed in between leaves the letter, too: the request may then run once more, but is not lost. Raises UnknownBackend,
    BadValue for an unknown id and for too many, and the broker's error for the first message that it does not take.
    """
    async with _dead_letters(settings, backend) as (connections, letters):
        desired = read_desired(await connections.store.get(connections.keys.desired))
        retry: Callable[[DeadLetter], Awaitable[None]] = partial(_retry_at_endpoint, connections, desired)
        if backend != ENDPOINTS:
            retry = await _retry_at_backend(connections, settings, desired, backend)
        told = await _settle(backend, letters, selection, retry, "retry", "retried", yes)
    return print_sentence(console, told)


async def drop_dead(settings: Settings, backend: str, selection: Selection, *, yes: bool, console: Console | None = None) -> int:
    """Removes each letter for good; prints how many. Raises UnknownBackend, BadValue for an unknown id and for too many."""

    async def drop(letter: DeadLetter) -> None:
        pass

    async with _dead_letters(settings, backend) as (_, letters):
        told = await _settle(backend, letters, selection, drop, "drop", "dropped", yes)
    return print_sentence(console, told)


@asynccontextmanager
async def _dead_letters(settings: Settings, backend: str, at_most: int | None = None) -> AsyncIterator[tuple[Connections, DeadLetters]]:
    if backend != ENDPOINTS:
        check_name(backend, "a backend")
    async with open_connections(settings, "dead") as connections, connections.queue.dead_letters(backend, at_most) as letters:
        yield connections, letters


async def _settle(
    backend: str,
    letters: DeadLetters,
    selection: Selection,
    act: Callable[[DeadLetter], Awaitable[None]],
    verb: str,
    done: str,
    yes: bool,
) -> str:
    if selection.everything and letters.waiting > ASK_ABOVE and not yes:
        raise BadValue(f"backend {backend!r} has {letters.waiting} dead letters: add --yes to {verb} them all")
    seen: list[str] = []
    kept: list[str] = []
    try:
        async for letter in letters:
            if name := selection.name_of(letter):
                try:
                    await act(letter)
                except _Keep as reason:
                    kept.append(f"{printable(name)} stays: {reason}")
                else:
                    await letters.remove(letter)
                seen.append(name)
    except MQServeError as error:
        raise MQServeError(f"{error}; {done} before that: {len(seen) - len(kept)}, and the rest are dead letters as before") from error
    missing = [_no_such(backend, printable(name)) for name in sorted(selection.names.difference(seen))]
    if kept or missing:
        raise MQServeError("; ".join([f"{done}: {len(seen) - len(kept)}", *kept, *missing]))
    return f"{len(seen)} {done}." if seen else _none(backend, letters.is_read_elsewhere)


class _Keep(Exception):
    """The reason why one letter stays, while others go on."""


async def _retry_at_backend(
    connections: Connections, settings: Settings, desired: Desired, backend: str
) -> Callable[[DeadLetter], Awaitable[None]]:
    senders = SenderTrust(settings)
    senders.demands_seals = read_observed(await connections.store.get(connections.keys.observed)).sealed
    if backend not in desired.backends:
        raise UnknownBackend(f"there is no backend {backend!r} to run them: deploy it first; dead letters are kept for seven days")
    config = desired.backends[backend].config
    timeout_ms = int(config.request_timeout_s * 1000)
    return partial(_retry, connections, senders, timeout_ms, config.delivery == "at_most_once", set())


async def _retry_at_endpoint(connections: Connections, desired: Desired, letter: DeadLetter) -> None:
    """Publishes a message to its endpoint again. What was wrong with any other but an unknown endpoint stays wrong."""
    if letter.endpoint not in desired.endpoints:
        raise _Keep(f"there is no endpoint {letter.endpoint!r}: create it first")
    try:
        check_published(letter.envelope(), connections.settings.namespace)
    except BadEnvelope as error:
        raise _Keep(f"no endpoint takes it, even if it is sent again: {error}") from error
    if letter.id:
        await connections.store.delete(*connections.keys.of_runs(endpoint_key(letter.endpoint, letter.id)))
    if failure := await fate_of(partial(connections.queue.republish, letter), CONFIRM_BUDGET_S):
        raise failure


async def _retry(
    connections: Connections, senders: SenderTrust, timeout_ms: int, once: bool, forgotten: set[str], letter: DeadLetter
) -> None:
    seals = connections.settings.header_seals.of(letter.backend)
    envelope = _check(letter, senders, seals)
    future_id = envelope.future_id(letter.backend) or letter.name
    kept_ms = UNENDED_TTL_S * 1000 if letter.is_job else timeout_ms + _BODY_KEPT_MS
    if envelope.header.ref:
        await _keep_body(connections, connections.keys.body(envelope.id), kept_ms)
    if future_id not in forgotten:  # of two letters with one id, the second must find the first one's result
        await connections.store.delete(*connections.keys.of_runs(future_id))
        if once:  # otherwise a replica would assume that the request was started before
            await connections.store.set(connections.keys.start(future_id), NOT_STARTED, ttl_ms=kept_ms)
        forgotten.add(future_id)
        if envelope.header.job is not None and envelope.header.job.stage is not None:  # its pipeline, which ended with it, goes on
            plan = Plan.opened(envelope.header.job.stage.plan, connections.settings.signer)
            await connections.store.delete(*connections.keys.of_runs(plan.id))
    renewed = letter.renewed(connections.store.now_ms() + timeout_ms, seals)
    if error := await fate_of(partial(connections.queue.republish, renewed), CONFIRM_BUDGET_S):
        raise error
    if letter.is_job and envelope.id:
        await _note_job(connections, letter.backend, future_id, renewed.envelope(seals))


async def _note_job(connections: Connections, backend: str, future_id: str, envelope: Envelope) -> None:
    """Writes the record of a job that waits again; without one nobody would know of it until it begins."""
    facts = facts_of(backend, envelope, connections.store.now_ms())
    noted: asyncio.Future[bool | Exception] = asyncio.get_running_loop().create_future()
    connections.store.jobs.add_then(future_id, facts, noted.set_result)
    await noted


def _check(letter: DeadLetter, senders: SenderTrust, seals: BackendSeals | None) -> Envelope:
    """Parses the letter as replicas do. Raises _Keep for a letter that they would set aside again: its id and keys may be another
    sender's, and published by an operator it might pass for the operator's."""
    try:
        envelope = letter.envelope(seals)
        senders.check_header(envelope)
        senders.check_pickle(envelope)
    except BadEnvelope as error:
        raise _Keep(f"no replica would run it, even if it is sent again: {error}") from error
    if seals is None and letter.has_seal and envelope.header.claims:
        raise _Keep("it has to be sealed anew: set MQSERVE_SECRET_KEY for this command, too")
    return envelope


async def _keep_body(connections: Connections, key: str, kept_ms: int) -> None:
    body = await connections.store.get_large(key)
    if body is None:
        raise _Keep("its body, of more than 1 MiB, was kept in the store until its deadline and is gone, so nothing can run it: drop it")
    await connections.store.set(key, body, ttl_ms=kept_ms)


def _facts(letter: DeadLetter) -> dict[str, Any]:
    attempts = [{"replica": run.replica, "started_ms": run.started_ms, "ended": run.ended} for run in letter.death.attempts]
    return {"id": letter.name, "died_at_ms": letter.death.died_at_ms, "reason": letter.death.reason, "attempts": attempts}


async def _all_facts(connections: Connections, letter: DeadLetter) -> dict[str, Any]:
    """Returns all facts about a letter, except an HTTP request's headers and query (only its size): they hold cookies and keys."""
    properties, body = letter.properties, letter.body
    facts = _facts(letter) | {"backend": letter.backend, "traceback": letter.death.traceback}
    names = ("content_type", "content_encoding", "reply_to", "correlation_id", "priority", "message_type", "app_id", "timestamp")
    facts |= {name: str(value) for name in names if (value := getattr(properties, name))}
    facts["headers"] = {str(name): str(value) for name, value in (properties.headers or {}).items() if name not in ("mq", "mq-seal")}
    if letter.endpoint:
        facts["endpoint"] = letter.endpoint
    seals = connections.settings.header_seals.of(letter.backend)
    try:
        envelope = letter.envelope(seals)
    except BadEnvelope as error:
        facts["mq"] = str(error)
    else:
        header, meta = envelope.header, envelope.header.meta
        facts["sent_by"] = {"http": "HTTP", "handle": "a handle"}.get(header.origin, "an AMQP client")
        if header.claims and seals is not None:
            facts["seal"] = envelope.seal.value
        if header.origin == "http":
            facts["request"] = f"{meta.method} {meta.path}"
            if meta.query:
                facts["query_bytes"] = len(meta.query)
        facts |= {name: value for name, value in (("endpoint", meta.endpoint), ("method", meta.call)) if value}
        if header.ref and (seals is None or envelope.seal is Seal.VALID):
            stored = await connections.store.get_large(connections.keys.body(letter.id))
            facts["body_in_store"] = stored is not None
            body = stored or b""
    facts |= {"body_bytes": len(body), "body": body[:PREVIEW_BYTES].decode(errors="backslashreplace")}
    return facts


def _print_fact(console: Console, key: str, value: Any) -> None:
    name = key.removesuffix("_ms").replace("_", " ")
    if key == "died_at_ms":
        value = when(value)
    elif key == "attempts":
        value = "\n".join(f"{when(run['started_ms'])}  {printable(run['replica'])}: {printable(run['ended'])}" for run in value)
    elif key == "headers":
        value = "\n".join(f"{printable(header)}: {printable(text)}" for header, text in value.items())
    if value not in ("", None):
        lines = [printable(line) for line in str(value).splitlines()]
        shown = lines[0] if len(lines) == 1 else "".join(f"\n    {line}" for line in lines)
        console.print(Text.assemble((f"{name}: ", "dim"), shown), highlight=False, soft_wrap=True)


def _none(backend: str, is_read_elsewhere: bool) -> str:
    return f"Backend {backend!r} has no dead letters{EXCEPT_HELD if is_read_elsewhere else ''}."


def _no_such(backend: str, name: str) -> str:
    return f"backend {backend!r} has no dead letter {name!r}: see `mqserve dead list`; another command may hold it"
