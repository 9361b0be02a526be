"""`mqserve call` and `mqserve jobs watch`: one request or job of a handle, and what becomes of it."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..broker.errors import BadValue, MQServeError, UnknownEndpoint
from ..broker.failures import describe
from ..broker.jobs import EventKind, JobState
from ..broker.process.interrupts import Interrupts
from ..broker.process.printable import printable
from ..broker.settings import Settings
from ..client.client import Client
from ..client.futures import Future
from ..client.handle import Handle
from ..client.jobs import JobEvent
from ..client.session import open_client
from .endings import FAILED
from .printing import print_json


def call_endpoint(settings: Settings, endpoint: str, data: str) -> int:
    """Sends a request and prints its answer. Ctrl-C cancels it."""
    value = _parsed(data)
    with joined(settings) as client:
        ref = _handle(client, endpoint).remote(value)
        try:
            _print_answer(_value_of(ref))
        except KeyboardInterrupt:
            ref.cancel()
            raise
    return 0


def call_later(settings: Settings, endpoint: str, data: str, interrupts: Interrupts, *, tag: str, delay_s: float) -> int:
    """Sends a job, and shows what happens to it until it has ended. Prints its id on standard error and its answer on standard output."""
    value = _parsed(data)
    with joined(settings) as client:
        job = _handle(client, endpoint).options(tag=tag, delay_s=delay_s).submit(value)
        interrupts.first = f"\nJob {job.id} goes on: `mqserve jobs watch {job.id}` shows it again, `mqserve jobs cancel {job.id}` ends it."
        click.echo(f"Job {job.id}", err=True)
        _watch((event for event in job.events() if event.kind is not EventKind.CHUNK), Console(stderr=True))  # the answer has the chunks
        _print_answer(_value_of(job))
    return 0


def _handle(client: Client, endpoint: str) -> Handle:
    """Raises UnknownEndpoint, with the names of the endpoints that there are."""
    try:
        return client.get_handle(endpoint)
    except UnknownEndpoint as error:
        raise UnknownEndpoint(" ".join([str(error), *error.__notes__])) from error


def watch_by_id(settings: Settings, job_id: str, interrupts: Interrupts, *, as_json: bool) -> int:
    """Shows what happens to a job until it has ended. Raises the reason of one that has not succeeded."""
    with joined(settings) as client:
        client.sender.only_plain = True  # a job of any sender is watched: its result is not unpickled
        job = client.job(job_id)
        job.status()  # raises UnknownJob
        interrupts.first = "\nThe job goes on."
        if as_json:
            for event in job.events():
                print_json(Console(), [_facts(event)])
        else:
            _watch(_by_lines(job.events()), Console())
        if job.status().state is JobState.SUCCEEDED:
            return 0
        job.result()  # raises why, which gets one sentence
        return FAILED


@contextmanager
def joined(settings: Settings) -> Iterator[Client]:
    client = open_client(settings, None)
    try:
        yield client
    finally:
        client.close()


def _parsed(data: str) -> Any:
    """Returns the value of `--data`. Raises BadValue for what is no JSON."""
    if data.startswith("@"):
        try:
            data = sys.stdin.read() if data == "@-" else Path(data[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadValue(f"{data[1:]} cannot be read: {error}") from error
    try:
        return json.loads(data)
    except ValueError as error:
        raise BadValue(f"--data is no JSON ({error}): write texts in double quotes, or @FILE for the content of a file") from error


def _value_of(ref: Future) -> Any:
    """Raises an exception of the handler as one of ours, so that it gets one sentence."""
    try:
        return ref.result()
    except MQServeError:
        raise
    except Exception as error:
        raise MQServeError(f"the handler raised {describe(error).words}") from error


def _print_answer(answer: Any) -> None:
    """Prints text and bytes as they are, else JSON, else what Python shows of it."""
    if isinstance(answer, bytes):
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()
    elif isinstance(answer, str):
        click.echo(answer)
    elif answer is not None:
        try:
            click.echo(json.dumps(answer, ensure_ascii=False))
        except (TypeError, ValueError):
            click.echo(repr(answer))


def _watch(events: Iterable[JobEvent], console: Console) -> None:
    """Shows a bar in a terminal, and a line for each event elsewhere."""
    with _teller(console) as tell:
        for event in events:
            tell(event)


def _by_lines(events: Iterable[JobEvent]) -> Iterator[JobEvent]:
    """Yields an event for each line of what the job yields, since nothing less can be shown above a bar, and the others as they are."""
    rest, latest = "", None
    for event in events:
        if event.kind is EventKind.CHUNK:
            *lines, rest = (rest + _told(event, after=rest)).split("\n")
            latest = event
            yield from (replace(event, text=line) for line in lines)
            continue
        if event.kind is EventKind.STATE and latest is not None and rest:
            yield replace(latest, text=rest)
            rest = ""
        yield event


@contextmanager
def _teller(console: Console) -> Iterator[Callable[[JobEvent], None]]:
    if not console.is_terminal:
        yield lambda event: click.echo(_line(event), file=console.file)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=None, words="")

        def tell(event: JobEvent) -> None:
            if event.kind is EventKind.STATE:
                bar.update(task, description=str(event.state))
                if event.state is JobState.SUCCEEDED:  # whatever the handler said last
                    bar.update(task, total=1.0, completed=1.0)
            elif event.kind is EventKind.PROGRESS:
                bar.update(task, total=1.0, completed=event.fraction or 0.0, words=printable(event.text))
            else:
                bar.console.print(printable(event.text), markup=False, highlight=False)

        yield tell


def _line(event: JobEvent) -> str:
    at = "" if event.at is None else f"{event.at:%H:%M:%S} "
    fraction = "" if event.fraction is None else f"{event.fraction:.0%}"
    words = " ".join(word for word in (event.state or "", fraction, printable(event.text)) if word)
    return f"{at}{words}"


def _told(chunk: JobEvent, after: str) -> str:
    if chunk.cut:
        return ("\n" if after else "") + "(only the result has the rest)\n"
    return f"({len(chunk.data)} B)\n" if chunk.data else chunk.text


def _facts(event: JobEvent) -> dict[str, Any]:
    at = None if event.at is None else event.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    facts: dict[str, Any] = {"seq": event.seq, "event": event.kind.value, "at": at}
    facts |= {"status": event.state, "fraction": event.fraction, "text": event.text}
    if event.kind is EventKind.CHUNK:
        facts |= {"base64": b64encode(event.data).decode(), "offset": event.offset, "cut": event.cut or None}
    return {name: value for name, value in facts.items() if value not in ("", None)}
