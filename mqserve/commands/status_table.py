"""Prints the facts of `mqserve status` for people: tables, and below them what is wrong or not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..broker.process.printable import INDENT, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from .status import BackendFacts, ControllerFacts, EndpointFacts, Facts, MemberFacts, ScheduleFacts, ServerFacts

Span = str | tuple[str, str]  # a text, or (text, style)

PIPE_WIDTH = 240
NOT_KNOWN = "?"
_WHOLE = frozenset(
    ("id", "status", "job", "last job", "schedule", "created", "died at", "first try", "next", "last", "runs", "attempts", "tries")
)  # of a table that fits: columns that never wrap
_LEAST_WIDTH = 12  # of any other column
_GAP = 2  # between columns
_NUMBERS = ("ready", "wanted", "jobs", "waiting", "dead", "running", "served")


def print_facts(console: Console, facts: Facts) -> None:
    owner = "detached" if facts.detached else f"started by {facts.started_by}"
    if facts.state == "unknown":
        owner = "nothing is known of it"
    _print(console, "Instance ", (facts.namespace, "bold"), f", {owner}", ", being shut down" if facts.state == "drains" else "")
    _print(console, "Controller ", *_leader(facts.controller))
    _print(console, "Broker ", *_server(facts.broker), ", store ", *_server(facts.store))
    console.print()
    if facts.state != "unknown":
        console.print(_members(facts.members))
        console.print(_backends(facts.backends))
        console.print(_endpoints(facts.endpoints))
        if facts.schedules:
            print_table(console, schedules_table(console, facts.schedules))
    if facts.here and facts.state == "unknown":
        _print(console, f"On this machine run: {', '.join(facts.here)}")
    for name, problem in facts.problems.items():
        _print(console, (name, "red"), f": {problem}")
    if facts.unknown:
        _print(console, ("Not known", "yellow"), f": {', '.join(facts.unknown)}")


def _print(console: Console, *spans: Span) -> None:
    console.print(_text(*spans), soft_wrap=True)


def _text(*spans: Span) -> Text:
    """Builds every printed text, without markup and with control codes escaped: names, routes and error messages may hold brackets, or
    codes that a terminal obeys."""
    styled = [(span, "") if isinstance(span, str) else span for span in spans]
    return Text.assemble(*((printable_lines(words, INDENT), style) for words, style in styled))


def _leader(controller: ControllerFacts) -> tuple[Span, ...]:
    match controller.state:
        case "leads":
            return (controller.id, "green"), " leads"
        case "starting":
            return (("starting", "yellow"),)
        case "missing":
            since = f" for {controller.silent_s or 0:.0f} s: traffic goes on, nothing is replaced or scaled; "
            return ("missing", "red"), since + "start one with `mqserve controller`"
        case _:
            return ("not known", "yellow"), ": the store does not say"


def _server(server: ServerFacts) -> tuple[Span, ...]:
    return (server.url,) if server.state == "up" else (f"{server.url} ", (server.state, "red"))


def make_console() -> Console:
    """Returns a console as wide as the terminal. For a pipe it is wide enough for one line per row, since `grep` reads lines."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _members(members: tuple[MemberFacts, ...]) -> Table:
    table = make_table("Members", "kind", "id", "state", "where", "running", "served", "last beat")
    for member in members:
        where = member.url or (f"on {member.node}" if member.node else f"{member.host}, process {member.pid}")
        name = f"{member.id} (external)" if member.external else member.id
        counts = (str(member.running), str(member.served)) if member.kind == "replica" else ("", "")
        state = _colored(member.state) if member.state != "unknown" else (f"{member.said} {NOT_KNOWN}", "yellow")
        _add_row(table, member.kind, name, state, where, *counts, f"{member.silent_s:.0f} s ago")
    return table


def _backends(backends: tuple[BackendFacts, ...]) -> Table:
    have_jobs = any(backend.jobs for backend in backends)
    table = make_table("Backends", "backend", "code", "dead", "ready", "wanted", *(["jobs"] if have_jobs else []), "waiting", "state")
    for backend in backends:
        jobs = [_count(backend.jobs)] if have_jobs else []
        counts = (_count(backend.dead_letters), str(backend.ready), str(backend.wanted), *jobs, _count(backend.waiting))
        _add_row(table, backend.name, f"{backend.code} (version {backend.version})", *counts, _colored(backend.state))
    return table


def _count(number: int | None) -> str:
    return NOT_KNOWN if number is None else str(number)


def _endpoints(endpoints: tuple[EndpointFacts, ...]) -> Table:
    table = make_table("Endpoints", "endpoint", "route", "methods", "traffic")
    for endpoint in endpoints:
        traffic = ", ".join(f"{backend} {weight:.0%}" for backend, weight in endpoint.traffic.items())
        traffic += " → ".join(endpoint.stages)
        traffic += "".join(f", shadow {backend} {part:.0%}" for backend, part in endpoint.shadows.items())
        _add_row(table, endpoint.name, _route(endpoint), " ".join(endpoint.methods), traffic)
    return table


def schedules_table(console: Console, schedules: Sequence[ScheduleFacts]) -> Table:
    rows: list[list[Text]] = []
    for schedule in schedules:
        upcoming: Span = ("paused", "yellow") if schedule.paused else _time(schedule.next_at)
        times = f"{schedule.cron} ({schedule.timezone})"
        cells: tuple[Span, ...] = (schedule.name, schedule.endpoint, times, upcoming, _time(schedule.last_at), schedule.last_job)
        rows.append([*map(_text, cells)])
    columns = ("schedule", "endpoint", "cron", "next", "last", "last job")
    return fitting_table(console, "Schedules", columns, rows, ("last", "last job", "endpoint"))


def _time(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC" if at is not None else "-"


def _route(endpoint: EndpointFacts) -> str:
    if endpoint.route is None:
        return "(handles only)"
    return f"{endpoint.route.rstrip('/')}/…" if endpoint.prefix else endpoint.route


def make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in _NUMBERS else "left",
            header_style="dim",
            no_wrap=column in ("kind", "state", "last beat"),
            overflow="fold",  # never cut an id or a URL
        )
    return table


def fitting_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Text]], expendable: Sequence[str]) -> Table:
    """Returns a table whose ids, states and times never wrap, so that an id can be copied. In a terminal that is too narrow for that,
    these columns are left out, in this order; where that is not enough, the lines are longer than the terminal (`print_table`)."""
    widths = [max(cell_len(text) for text in (name, *(row[at].plain for row in rows))) for at, name in enumerate(columns)]
    least = {name: width if name in _WHOLE else min(width, _LEAST_WIDTH) for name, width in zip(columns, widths, strict=True)}

    def needed() -> int:
        return sum(least.values()) + _GAP * (len(least) - 1)

    for name in expendable if console.is_terminal else ():
        if needed() <= console.width:
            break
        del least[name]
    table = make_table(title, *least)
    for column in table.columns:
        column.no_wrap = column.header in _WHOLE
    if needed() > console.width:
        table.width = needed()
    for row in rows:
        table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in least))
    return table


def print_table(console: Console, table: Table) -> None:
    console.print(table, crop=False)


def _add_row(table: Table, *cells: Span) -> None:
    table.add_row(*map(_text, cells))


def _colored(state: str) -> Span:
    return state, {"ready": "green", "starting": "yellow", "draining": "yellow", "unknown": "yellow"}.get(state, "red")
