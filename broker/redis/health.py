"""What a process knows of its store: whether it answers, and whether it takes writes. It learns that from the outcome of every call,
without asking."""

from __future__ import annotations

import math
import time

from .refusals import REFUSED_WRITES, is_access_refused, refusal_code

RECONNECT_S = 2.9  # a little less than a call may take, so that the first failed call to a hanging server already counts
NOTED_FOR_S = 600.0  # long enough for an operator to see it
REFUSED_FOR_S = 3.0  # an older refusal says nothing any more, since members write every second


class StoreHealth:
    """The health of the store, as this process sees it. Its texts are fit for strangers: no address, no user."""

    def __init__(self) -> None:
        self._down_since = -math.inf  # monotonic; inf while it answers
        self._why_down = ""
        self._refused_at = -math.inf  # monotonic: the last refused write
        self.refused_since = math.inf  # monotonic: the first refused write since the last one that was taken
        self._why_refused = ""
        self.written_at = -math.inf  # monotonic: the last write that was taken
        self._odd_keys: dict[str, tuple[float, str]] = {}  # key -> (monotonic, time of day) when it was last found with another type

    def __repr__(self) -> str:
        return f"<StoreHealth {self.trouble or 'well'}>"

    @property
    def connected(self) -> bool:
        """False once the store has been away for longer than a reconnect takes."""
        return time.monotonic() - self._down_since < RECONNECT_S

    @property
    def refusal(self) -> str:
        """Why the store answers but takes no writes; empty while it takes them, and while this process writes nothing."""
        return self._why_refused if time.monotonic() - self._refused_at < REFUSED_FOR_S else ""

    @property
    def trouble(self) -> str:
        """Why no result can be recorded now; empty while one can."""
        if self._down_since == math.inf and self._refused_at == -math.inf:  # fast path: a proxy asks this before each request
            return ""
        return self.refusal or ("" if self.connected else self._why_down)

    @property
    def noted(self) -> str:
        """A sentence for operators about keys that had another type lately."""
        since = time.monotonic() - NOTED_FOR_S
        self._odd_keys = {key: met for key, met in self._odd_keys.items() if met[0] > since}
        return "; ".join(
            f"{key} was of another type than mqserve keeps there at {at}, so another program writes there: redis-cli DEL {key} mends it, "
            "unless members have done so already"
            for key, (_, at) in self._odd_keys.items()
        )

    def note(self, key: str) -> bool:
        """Notes that a key had another type; returns whether that is news."""
        _ = self.noted
        is_news = key not in self._odd_keys
        if is_news:
            self._odd_keys[key] = (time.monotonic(), time.strftime("%H:%M:%S"))
        return is_news

    def answered(self) -> None:
        self._down_since = math.inf

    def wrote(self) -> None:
        """Notes a successful write."""
        self.answered()
        self._refused_at, self.refused_since = -math.inf, math.inf
        self.written_at = time.monotonic()

    def took_a_write(self) -> None:
        """Notes that another process's write succeeded: the store no longer refuses ours either."""
        if self._refused_at > -math.inf:
            self._refused_at, self.refused_since = -math.inf, math.inf

    def failed(self, error: BaseException, since: float, *, writing: bool = False) -> None:
        """Notes that a call that began at `since` failed. A server that refuses something does answer."""
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
