"""What became of each request: sent once, ended once, and judged by what was broken at the time."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

LATE_REDELIVERY_S = 5.0
SESSION = "talk"  # the kind of a WebSocket session
FIRING = "firing"  # the kind of a schedule's job
HANDLE_KINDS = ("handle", "submit")
JOB_S = 60.0  # in which a job ends, once it was accepted: longer than any server is away
REDIAL_S = 4.0  # a handle's process dials for itself, and may do so later than the proxies by which a recovery is told


class End(StrEnum):
    """How a request may end. The first five are fine, where they are allowed."""

    ANSWERED = "answered"
    USER_ERROR = "user error"  # of the backend that raises
    EXPIRED = "expired"  # 504: its time was spent
    FAILED = "failed"  # another status, or no connection
    DROPPED = "dropped"  # a transient message that a restarted broker forgot, or a result that an emptied store did
    HANGING = "hanging"
    LOST = "lost"


@dataclass(eq=False, slots=True)
class Fault:
    """One thing that was broken, in monotonic seconds; `recovered` is infinite until it is, or for ever.

    `allows`: what a request may say of it; `sessions`: with which status or code a session may end.
    """

    kind: str
    target: str = ""
    allows: frozenset[str] = frozenset()
    sessions: frozenset[str] = frozenset()
    proxy: str = ""  # only requests that went by this proxy
    drains: bool = False  # what was there before it began must not be hurt, but for sessions
    forgets: bool = False  # the results that stood in the store are gone
    began: float = 0.0
    mended: float = 0.0
    recovered: float = float("inf")

    def overlaps(self, since: float, until: float) -> bool:
        return since <= self.recovered and until >= self.began

    def excuses(self, entry: "Entry", detail: str) -> bool:
        since = entry.sent - (REDIAL_S if entry.kind in HANDLE_KINDS else 0)
        is_session = entry.kind == SESSION
        if detail not in (self.sessions if is_session else self.allows) or not self.overlaps(since, entry.ended):
            return False
        if self.drains and not is_session and entry.sent < self.began - 0.2:
            return False
        return not self.proxy or self.proxy == entry.proxy


@dataclass(eq=False, slots=True)
class Entry:
    """One request. `key`: the name of its result in the store; `accepted`: when the broker confirmed it."""

    number: int
    kind: str
    backend: str
    sent: float
    proxy: str = ""
    key: str = ""
    persistent: bool = False
    accepted: float = 0.0
    end: End | None = None
    detail: str = ""
    ended: float = 0.0
    words: set[str] = field(default_factory=set)  # one for each run whose answer was heard


class Ledger:
    """Entered by tasks and threads; a request that ends twice is a finding like any other."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.findings: list[str] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Ledger of {len(self.entries)}, {self.counts()}>"

    def send(self, entry: Entry) -> Entry:
        with self._lock:
            if entry.number in self.entries:
                self.findings.append(f"the soak gave number {entry.number} twice")
            self.entries[entry.number] = entry
        return entry

    def end(self, entry: Entry, end: End, now: float, detail: str = "") -> None:
        with self._lock:
            if entry.end is not None:
                self.findings.append(f"{told(entry)} ended again, as {end} {detail}")
                return
            entry.end, entry.detail, entry.ended = end, detail, now

    def hear(self, entry: Entry, read: Callable[[], str]) -> None:
        """Notes which run an answer is of; a wrong one is a finding."""
        try:
            entry.words.add(read())
        except (ValueError, KeyError, TypeError) as error:
            self.findings.append(f"{entry.kind} to {entry.backend}, number {entry.number}: a wrong answer: {error}")

    def counts(self) -> Counter[str]:
        return Counter(str(entry.end) if entry.end else "open" for entry in list(self.entries.values()))


def told(entry: Entry) -> str:
    how = f"{entry.end} {entry.detail}".strip() if entry.end else "open"
    return f"{entry.kind} to {entry.backend}, number {entry.number} ({how})"


def judge(entries: Iterable[Entry], faults: Sequence[Fault], runs: Mapping[int, Sequence[str]]) -> list[str]:
    """What must not have happened. `runs`: the words of all runs of a number, as the handlers noted them."""
    return [finding for entry in entries for finding in _judge(entry, faults, runs.get(entry.number, ()))]


def _judge(entry: Entry, faults: Sequence[Fault], runs: Sequence[str]) -> Iterable[str]:
    match entry.end:
        case None:
            yield f"{told(entry)} never ended"
        case End.HANGING | End.LOST:
            yield told(entry)
        case End.EXPIRED | End.FAILED | End.DROPPED if not any(fault.excuses(entry, entry.detail) for fault in faults):
            yield f"{told(entry)}, and nothing was broken that allows it (from {entry.sent:.1f} to {entry.ended:.1f})"
        case End.USER_ERROR if entry.backend != "raising":
            yield f"{told(entry)}, of a backend that does not raise"
        case End.ANSWERED | End.USER_ERROR if not runs:
            yield f"{told(entry)} and never run"
    if len(entry.words) > 1:
        yield f"{told(entry)} has {len(entry.words)} different answers"
    if not entry.words <= set(runs):
        yield f"{told(entry)} has the answer of a run that never was"
    if len(runs) > 1 and not any(fault.overlaps(entry.sent, (entry.ended or entry.sent) + LATE_REDELIVERY_S) for fault in faults):
        yield f"{told(entry)} ran {len(runs)} times, and nothing was broken"


def runs_of(lines: Iterable[str]) -> dict[int, list[str]]:
    """By number, the words of its runs: from the lines of the tally."""
    runs: dict[int, list[str]] = defaultdict(list)
    for line in lines:
        number, _, word = line.split(" ")
        runs[int(number)].append(word)
    return runs
