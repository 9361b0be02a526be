"""Steady load and random faults on a distributed instance of its own: `python -m tests.faults.soak --seconds 300`.

Ends with a table of what was injected and what became of each request, and with status 1 where that is not as promised.
"""

import argparse
import asyncio
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.soak import leaks
from tests.faults.soak.backends import REPLICAS, word_in_refusal
from tests.faults.soak.chaos import KINDS, Chaos, plan, recovery_s
from tests.faults.soak.cluster import Client, Cluster, running_cluster
from tests.faults.soak.jobs import Kept, compare, counts_of, enter_firings, read_jobs, unended
from tests.faults.soak.ledger import End, Entry, Fault, Ledger, judge, runs_of, told
from tests.faults.soak.load import DIRECT_JOB, HANDLE_SHARE, Load, follow_client, read_results
from tests.instances import new_namespace
from tests.run_tests import ensure_servers

DEPLOY_S = 90.0
SETTLE_S = 60.0
COLLECT_S = 60.0  # what direct publishes get to be answered after the load
SHUTDOWN_S = 60.0
TELL_EVERY_S = 5.0
JOB_KINDS = ("job", "submit", DIRECT_JOB)
SHOWN = 30  # findings; more of the same say no more


@dataclass(frozen=True, slots=True)
class Options:
    seconds: float = 300
    rate: float = 60
    faults: int = 20
    seed: int = 1
    only: tuple[str, ...] = tuple(KINDS)


@dataclass(slots=True)
class Outcome:
    ledger: Ledger
    faults: list[Fault]
    runs: dict[int, list[str]]
    jobs: dict[str, Kept]
    began: float
    findings: list[str]


async def soak(options: Options, folder: Path, console: Console) -> Outcome:
    """Everything, from servers to their end; what was found stands in the outcome."""
    async with running_cluster(folder, new_namespace("soak")) as cluster:
        client = await Client.start(cluster)
        try:
            tally = Path(str((await client.until("deployed", DEPLOY_S))["tally"]))
            baseline = await _settled(cluster)
            console.print(f"{REPLICAS} replicas, 2 controllers, 2 nodes, 2 proxies are there; seed {options.seed}")
            outcome = Outcome(Ledger(), [], {}, {}, time.monotonic(), [])
            await _load(options, cluster, client, outcome, console)
            outcome.findings += await leaks.until_quiet(lambda: unended(cluster))
            outcome.jobs = await read_jobs(cluster)
            outcome.runs = runs_of(await asyncio.to_thread(_lines, tally))
            outcome.findings += enter_firings(outcome.ledger, outcome.runs, outcome.jobs, outcome.faults)
            outcome.findings += outcome.ledger.findings + judge(outcome.ledger.entries.values(), outcome.faults, outcome.runs)
            outcome.findings += await _compare_with_store(cluster, outcome)
            sent_as_jobs = [entry for entry in outcome.ledger.entries.values() if entry.kind in JOB_KINDS]
            outcome.findings += compare(sent_as_jobs, outcome.jobs, outcome.faults)
            outcome.findings += await _look_for_leaks(cluster, baseline)
            outcome.findings += await _shut_down(cluster, client)
            outcome.findings += cluster.findings + leaks.in_logs([*cluster.logs(), ("client", client.log.read_text())])
            return outcome
        finally:
            await client.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


async def _settled(cluster: Cluster) -> dict[str, set[int]]:
    """The connections of each role, once all processes have theirs."""
    before: dict[str, set[int]] = {}
    until = time.monotonic() + SETTLE_S
    while (now := leaks.broker_baseline(cluster)) != before or any(0 in counts for role, counts in now.items() if role != "node"):
        if time.monotonic() > until:
            raise TimeoutError(f"after {SETTLE_S:g} s these are the connections of each role: {now}")
        before = now
        await asyncio.sleep(1)
    return now


async def _load(options: Options, cluster: Cluster, client: Client, outcome: Outcome, console: Console) -> None:
    chance = random.Random(options.seed)
    ledger, chaos = outcome.ledger, Chaos(cluster, random.Random(options.seed + 1))
    outcome.faults = chaos.faults
    load = Load(cluster, ledger, chance)
    async with asyncio.TaskGroup() as tasks:
        minding = [tasks.create_task(work) for work in (cluster.supervise(), load.keep_direct(), _tell(outcome, chaos, console))]
        client.tell(f"load {options.rate * HANDLE_SHARE} {options.seconds} {options.seed}")
        async with asyncio.TaskGroup() as working:
            working.create_task(load.run(options.rate * (1 - HANDLE_SHARE), options.seconds))
            working.create_task(follow_client(client, ledger))
            working.create_task(chaos.run(plan(chance, options.faults, options.seconds, options.only)))
        await _collect(ledger, chaos.faults)
        for task in minding:
            task.cancel()
    outcome.findings += chaos.findings


async def _collect(ledger: Ledger, faults: list[Fault]) -> None:
    """Waits for the results of direct publishes; what has none then is lost, or dropped where that may be."""

    def may_be_forgotten(entry: Entry) -> bool:
        return any(fault.forgets and entry.sent <= fault.mended for fault in faults)

    began = time.monotonic()
    while waiting := [entry for entry in ledger.entries.values() if entry.end is None]:
        is_sure = any(entry.persistent and not may_be_forgotten(entry) for entry in waiting)
        if time.monotonic() > began + (COLLECT_S if is_sure else COLLECT_S / 3):
            break
        await asyncio.sleep(0.5)
    for entry in waiting:
        if may_be_forgotten(entry):
            ledger.end(entry, End.DROPPED, time.monotonic(), "forgotten")
        elif entry.persistent:
            ledger.end(entry, End.LOST, time.monotonic())
        else:
            ledger.end(entry, End.DROPPED, time.monotonic(), "dropped")


async def _compare_with_store(cluster: Cluster, outcome: Outcome) -> list[str]:
    """What stands in the store is what was heard, of each request that anybody can name."""
    found = []
    entries = [entry for entry in outcome.ledger.entries.values() if entry.key and entry.end in (End.ANSWERED, End.USER_ERROR, End.EXPIRED)]
    for entry, result in zip(entries, await read_results(cluster, entries), strict=True):
        if entry.end is End.EXPIRED:
            was_away = any("Redis" in fault.kind and fault.overlaps(entry.sent, entry.ended) for fault in outcome.faults)
            if result is not None and result.get("status", 200) != 504 and not was_away:
                found.append(f"{told(entry)}, and its result is another: {str(result)[:200]}")
        elif result is None and any(fault.forgets and entry.sent <= fault.mended for fault in outcome.faults):
            continue
        elif result is None:
            found.append(f"{told(entry)}, and its result is gone from the store")
        else:
            found += _compare(entry, result, outcome)
    return found


def _compare(entry: Entry, result: dict[str, object], outcome: Outcome) -> list[str]:
    error = result.get("error")
    if (error is not None) != (entry.end is End.USER_ERROR):
        return [f"{told(entry)}, and its result is another: {str(result)[:200]}"]
    if isinstance(error, dict):
        word = word_in_refusal(entry.number, error["message"])
        if word not in outcome.runs.get(entry.number, ()) or entry.words - {word}:
            return [f"{told(entry)}, and its result is of another run: {word}, not {entry.words}"]
    elif any(word.encode() not in bytes(result["body"]) for word in entry.words):  # type: ignore[call-overload]
        return [f"{told(entry)}, and its result is of another run than {entry.words}: {str(result)[:200]}"]
    return []


async def _look_for_leaks(cluster: Cluster, baseline: dict[str, set[int]]) -> list[str]:
    async def check() -> list[str]:
        return [*await leaks.processes(cluster), *await leaks.connected(cluster, baseline), *await leaks.queues(cluster)]

    return await leaks.until_quiet(check) + await leaks.keys(cluster)


async def _shut_down(cluster: Cluster, client: Client) -> list[str]:
    """Ends the instance, then its processes: nothing of it stays but results."""
    client.tell("shutdown")
    for member in cluster.members:
        member.is_meant_to_end = True
    await client.until("down", SHUTDOWN_S)
    found = await leaks.until_quiet(lambda: _first_end(cluster))
    for member in cluster.members:
        if not member.program.ended:
            member.program.signal(signal.SIGTERM)
    for member in cluster.members:
        await cluster.wait_ended(member)
        if code := member.program.wait():
            found.append(f"{member.name} ended with {code} after the shutdown:\n{member.program.output[-2000:]}")

    async def check() -> list[str]:
        left = [f"process {pid}, a {role}, outlived the shutdown" for pid, role in cluster.processes().items()]
        standing = [getattr(cluster.keys, name) for name in ("desired", "observed", "instance", "leader", "beats")]
        return left + [f"key {key} outlived the shutdown" for key in standing if await cluster.redis.exists(key)]

    return found + await leaks.until_quiet(check)


async def _first_end(cluster: Cluster) -> list[str]:
    ended = [member for member in cluster.controllers if member.program.ended]
    return [] if ended else ["the leading controller did not end with the instance"]


async def _tell(outcome: Outcome, chaos: Chaos, console: Console) -> None:
    told_faults = 0
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        news = ", ".join(f"{fault.kind} ({fault.target})" if fault.target else fault.kind for fault in chaos.faults[told_faults:])
        told_faults = len(chaos.faults)
        counts = outcome.ledger.counts()
        line = ", ".join(f"{counts[name]} {name}" for name in ("open", *End) if counts[name])
        console.print(
            f"{time.monotonic() - outcome.began:4.0f} s  {len(outcome.ledger.entries):6} sent: {line}{'  <- ' + news if news else ''}"
        )


def report(outcome: Outcome, console: Console) -> None:
    injected = Table("at", "fault", "what", "lasted", "recovered after", title="What was injected")
    for fault in outcome.faults:
        lasted = f"{fault.mended - fault.began:.1f} s"
        injected.add_row(f"{fault.began - outcome.began:.0f} s", fault.kind, fault.target, lasted, f"{recovery_s(fault):.1f} s")
    console.print(injected)

    by_kind: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in outcome.ledger.entries.values():
        by_kind[entry.kind].append(entry)
    ended = Table("requests", "sent", *End, "ran twice", title="What became of them")
    for kind, entries in [*sorted(by_kind.items()), ("all", list(outcome.ledger.entries.values()))]:
        ends = Counter(entry.end for entry in entries)
        twice = sum(len(outcome.runs.get(entry.number, ())) > 1 for entry in entries)
        ended.add_row(kind, str(len(entries)), *(str(ends[end] or "-") for end in End), str(twice or "-"))
        if len(entries) != sum(ends[end] for end in End):
            outcome.findings.append(f"{kind}: {len(entries)} were sent, and {ends} ended")
    console.print(ended)
    counts = counts_of(outcome.jobs)
    console.print(f"{len(outcome.jobs)} jobs in the store: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    details = Counter(f"{entry.kind}: {entry.detail}" for entry in outcome.ledger.entries.values() if entry.detail)
    if details:
        console.print("of those: " + ", ".join(f"{count} {detail}" for detail, count in details.most_common()))

    if rerun := [entry for entry in outcome.ledger.entries.values() if len(outcome.runs.get(entry.number, ())) > 1]:
        when = ", ".join(f"{entry.kind} at {entry.sent - outcome.began:.0f} s" for entry in rerun[:SHOWN])
        console.print(f"sent when, of those that ran twice: {when}")

    for finding in outcome.findings[:SHOWN]:
        console.print(f"✗ {finding}", markup=False, style="red")
    if len(outcome.findings) > SHOWN:
        console.print(f"… and {len(outcome.findings) - SHOWN} more")
    if not outcome.findings:
        console.print("Nothing accepted was lost, nothing was answered twice, nothing hung, nothing leaked.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=300, help="of load [300]")
    parser.add_argument("--rate", type=float, default=60, help="requests per second in total [60]")
    parser.add_argument("--faults", type=int, help="how many [one in 15 seconds]")
    parser.add_argument("--seed", type=int, help="of load and faults [random]")
    parser.add_argument(
        "--only", action="append", choices=list(KINDS), metavar="FAULT", help=f"one of: {', '.join(KINDS)}; may be repeated"
    )
    given = parser.parse_args()
    faults = max(1, round(given.seconds / 15)) if given.faults is None else given.faults
    seed = random.randrange(10_000) if given.seed is None else given.seed
    options = Options(given.seconds, given.rate, faults, seed, tuple(given.only or KINDS))
    for name in ("aio_pika", "aiormq"):  # they log each lost connection as an error, with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ensure_servers()
    console = Console(width=140, soft_wrap=True)
    console.print(f"seed {options.seed}: {options.faults} faults in {options.seconds:g} s, {options.rate:g} requests per second")
    with tempfile.TemporaryDirectory(prefix="mqserve-soak-") as folder:
        outcome = asyncio.run(soak(options, Path(folder), console))
        report(outcome, console)
        if outcome.findings:
            kept = Path(tempfile.mkdtemp(prefix="mqserve-soak-logs-"))
            for log in Path(folder).iterdir():
                with suppress(OSError):
                    log.rename(kept / log.name)
            console.print(f"the processes' logs and the tally are in {kept}")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
