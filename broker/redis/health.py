"""What a process knows of its store: whether it answers, and whether it takes what is written. Learnt from every call, asked by nobody."""

from __future__ import annotations

import math
import time

from .refusals import REFUSED_WRITES, is_access_refused, refusal_code

RECONNECT_S = 2.9  # a little less than a call may take: of a server that hangs, the first call that fails says so
NOTED_FOR_S = 600.0  # an operator may look later
REFUSED_FOR_S = 3.0  # a write that was refused so long ago says nothing any more: members write every second


class StoreHealth:
    """Its words are for anybody: no address, no user."""

    def __init__(self) -> None:
        self._down_since = -math.inf  # monotonic; inf while it answers
        self._why_down = ""
        self._refused_at = -math.inf  # monotonic: the last write that was
        self.refused_since = math.inf  # monotonic: the first one after the last that was taken
        self._why_refused = ""
        self.written_at = -math.inf  # monotonic: the last write that was taken
        self._odd_keys: dict[str, tuple[float, str]] = {}  # when (monotonic) and at what time of day they were last met

    def __repr__(self) -> str:
        return f"<StoreHealth {self.trouble or 'well'}>"

    @property
    def connected(self) -> bool:
        """Not once it has been away for longer than a lost connection takes to come back."""
        return time.monotonic() - self._down_since < RECONNECT_S

    @property
    def refusal(self) -> str:
        """Why it takes no writes, though it answers; empty while it takes them, and while nothing is written."""
        return self._why_refused if time.monotonic() - self._refused_at < REFUSED_FOR_S else ""

    @property
    def trouble(self) -> str:
        """Why nothing can be recorded now; empty while all is well."""
        if self._down_since == math.inf and self._refused_at == -math.inf:  # a proxy asks this before each request
            return ""
        return self.refusal or ("" if self.connected else self._why_down)

    @property
    def noted(self) -> str:
        """Of keys that were of another type lately, for operators."""
        since = time.monotonic() - NOTED_FOR_S
        self._odd_keys = {key: met for key, met in self._odd_keys.items() if met[0] > since}
        return "; ".join(
            f"{key} was of another type than mqserve keeps there at {at}, so another program writes there: redis-cli DEL {key} mends it, "
            "where members have not done so"
            for key, (_, at) in self._odd_keys.items()
        )

    def note(self, key: str) -> bool:
        """That it was met of another type; whether that is news."""
        _ = self.noted
        is_news = key not in self._odd_keys
        if is_news:
            self._odd_keys[key] = (time.monotonic(), time.strftime("%H:%M:%S"))
        return is_news

    def answered(self) -> None:
        self._down_since = math.inf

    def wrote(self) -> None:
        """A write was taken."""
        self.answered()
        self._refused_at, self.refused_since = -math.inf, math.inf
        self.written_at = time.monotonic()

    def took_a_write(self) -> None:
        """Another process's, which says the same of ours."""
        if self._refused_at > -math.inf:
            self._refused_at, self.refused_since = -math.inf, math.inf

    def failed(self, error: BaseException, since: float, *, writing: bool = False) -> None:
        """A call that began at `since`. A server that refuses something answers."""
        code = refusal_code(error)
        if code in REFUSED_WRITES:
            self._refuses(REFUSED_WRITES[code].words)
        elif code == "NOPERM" and writing:
            self._refuses("it does not let this process write")
        elif code != "WRONGTYPE":
            self._down_since = min(self._down_since, since)
            self._why_down = _words_of(code, error)
            return
        self.answered()

    def _refuses(self, words: str) -> None:
        self._refused_at, self._why_refused = time.monotonic(), words
        self.refused_since = min(self.refused_since, self._refused_at)


def _words_of(code: str, error: BaseException) -> str:
    if code == "LOADING":
        return "it loads its data"
    return "it refuses this process's login or rights" if is_access_refused(error) else "it does not answer"
