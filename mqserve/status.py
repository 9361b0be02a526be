"""`mqserve status`: what runs, where, since when, and what is wrong, as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .broker.printable import INDENT, printable_lines
from .broker.settings import Settings, masked
from .controller import lease
from .controller.state import SILENT_AFTER_S, Beat, Desired, Observed, read_beats
from .links import Links, open_links

PIPE_WIDTH = 240
_KINDS = ("node", "proxy", "replica")


async def show_status(settings: Settings, console: Console | None = None) -> int:
    """Prints; the exit code is 1 for an instance without a controller that leads it. Raises InstanceError when there is none."""
    console = console or make_console()
    async with open_links(settings, "status") as links:
        held = await lease.read_instance(links.store, links.keys)
        desired = Desired.from_bytes(await links.store.get(links.keys.desired))
        observed = Observed.from_bytes(await links.store.get(links.keys.observed))
        beats = list(read_beats(await links.store.fields(links.keys.beats)).values())
        now_ms = links.store.now_ms()
        age_s = (now_ms - held.at) / 1000
        is_led = age_s < lease.LAPSED_AFTER_S
        owner = "detached" if held.detached else f"started by {_shown(held.owner)}"
        _print(console, Text.assemble("Instance ", (settings.namespace, "bold"), f", {owner}"))
        _print(console, Text.assemble("Controller ", *_leader(held, age_s)))
        _print(console, Text(f"Broker {masked(settings.broker_url)}, store {masked(settings.store_url)}\n"))
        console.print(_members(beats, now_ms))
        console.print(await _backends(links, desired, observed, beats, now_ms))
        console.print(_endpoints(desired))
        living = [beat for beat in beats if beat.state != "failed" and now_ms - beat.at < SILENT_AFTER_S * 1000]
        waiting = {beat.id: words for beat in living if (words := beat.refused or beat.error)}
        undone = {name: f"the last roll-out was undone: {b.rolled_back}" for name, b in desired.backends.items() if b.rolled_back}
        for name, problem in [*undone.items(), *waiting.items(), *observed.problems.items()]:
            _print(console, Text.assemble((_shown(name), "red"), f": {_shown(problem)}"))
    return 0 if is_led else 1


def _print(console: Console, line: Text) -> None:
    """Of texts, here and in the tables: names, routes and URLs may have brackets, which would be taken for markup."""
    console.print(line, soft_wrap=True)


def _shown(text: str) -> str:
    """Documents, beats and errors in them may be of another version, or of somebody else who may write to the store."""
    return printable_lines(text, INDENT)


def _leader(held: lease.InstanceLease, age_s: float) -> tuple[str | tuple[str, str], ...]:
    if age_s >= lease.LAPSED_AFTER_S:
        missing = f" for {age_s:.0f} s: traffic goes on, nothing is replaced or scaled; start one with `mqserve controller`"
        return ("missing", "red"), missing
    return ((_shown(held.leader), "green"), " leads") if held.leader else (("starting", "yellow"),)


def make_console() -> Console:
    """As wide as the terminal; in a pipe wide enough for one line a row, since `grep` reads lines."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _members(beats: list[Beat], now_ms: int) -> Table:
    table = make_table("Nodes, proxies and replicas", "kind", "id", "state", "where", "running", "served", "last beat")
    for beat in sorted(beats, key=_place):
        age_s = (now_ms - beat.at) / 1000
        state = beat.state if age_s < SILENT_AFTER_S or beat.state == "failed" else "gone"
        where = beat.url or (f"on {beat.node}" if beat.node else f"{beat.host}, process {beat.pid}")
        name = f"{beat.id} (external)" if beat.external else beat.id
        counts = (str(beat.running), str(beat.served)) if beat.kind == "replica" else ("", "")
        _add_row(table, beat.kind, name, _colored(state), where, *counts, f"{max(0.0, age_s):.0f} s ago")
    return table


def _place(beat: Beat) -> tuple[int, str, str]:
    """Among the members; another version's may be of a kind that this one does not know."""
    return _KINDS.index(beat.kind) if beat.kind in _KINDS else len(_KINDS), beat.kind, beat.id


async def _backends(links: Links, desired: Desired, observed: Observed, beats: list[Beat], now_ms: int) -> Table:
    table = make_table("Backends", "backend", "code", "ready", "wanted", "waiting", "state")
    for name, backend in desired.backends.items():
        mine = [beat for beat in beats if beat.kind == "replica" and beat.backend == name]
        ready = sum(beat.state == "ready" and now_ms - beat.at < SILENT_AFTER_S * 1000 for beat in mine)
        depths = [await links.queue.depth(name, generation) or 0 for generation in observed.queues.get(name, ())]
        wanted = backend.config.num_replicas
        state = "failing" if name in observed.problems else "ready" if ready >= wanted else "starting"
        _add_row(
            table, name, f"{backend.code_name} (version {backend.version})", str(ready), str(wanted), str(sum(depths)), _colored(state)
        )
    return table


def _endpoints(desired: Desired) -> Table:
    table = make_table("Endpoints", "endpoint", "route", "methods", "traffic")
    for name, endpoint in desired.endpoints.items():
        traffic = ", ".join(f"{backend} {weight:.0%}" for backend, weight in endpoint.traffic.items())
        traffic += "".join(f", shadow {backend} {part:.0%}" for backend, part in endpoint.shadows.items())
        _add_row(table, name, endpoint.route or "(handles only)", " ".join(endpoint.methods), traffic)
    return table


def make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        numeric = column in ("ready", "wanted", "waiting", "running", "served")
        table.add_column(
            column,
            justify="right" if numeric else "left",
            header_style="dim",
            no_wrap=column in ("kind", "state", "last beat"),
            overflow="fold",  # an id or a URL that is cut is of no use
        )
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in cells))


def _colored(state: str) -> Text:
    return Text(_shown(state), {"ready": "green", "starting": "yellow", "draining": "yellow"}.get(state, "red"))
