"""Turns Redis's refusals, untrusted certificates and a setting that breaks our promises into sentences for operators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from yarl import URL

from ..errors import RIGHTS_MEND
from ..process.tls import UNTRUSTED, UNTRUSTED_MEND
from ..settings import masked


class Refused(NamedTuple):
    """Why Redis takes no writes, in words fit for strangers, and the mend, for its operator."""

    words: str
    mend: str


FULL_FROM = 0.8  # of maxmemory
ROOM_AGAIN_BELOW = 0.75  # lower, so that jobs are not refused and taken in turn
REFUSED_WRITES = {
    "OOM": Refused("it is full", "raise its maxmemory, or take out what else is in it"),
    "READONLY": Refused("it is a read-only copy", "MQSERVE_STORE_URL must lead to the primary"),
    "MISCONF": Refused("it cannot save to its disk", "see its log, and mend the disk that it saves to"),
    "NOREPLICAS": Refused("it misses replicas of its own", "start them, or lower its min-replicas-to-write"),
}
DEMOTED = ("READONLY", "UNBLOCKED")
"""The codes by which a server says that another one is the primary: it refuses a write, and ends what blocks when it is demoted."""

_IN_A_SCRIPT = "The user executing the script"  # … may not do what it does
_CODE = re.compile(rf"(?:^|caused error: \(?['\"])({'|'.join([*REFUSED_WRITES, 'WRONGTYPE', 'UNBLOCKED'])})\b")  # the latter in a pipeline


def refusal_code(error: BaseException | None) -> str:
    """Redis's error code, such as OOM; empty if Redis refused nothing."""
    if not isinstance(error, RedisError):
        return ""
    if _IN_A_SCRIPT in str(error):
        return "NOPERM"
    found = _CODE.search(str(error))
    return getattr(error, "status_code", None) or (found[1] if found else "")


def key_of(error: BaseException) -> str:
    """The key that a WRONGTYPE error names; empty if it names none."""
    found = re.search(r"mqserve:[^\s'\")]+", str(error))
    return found[0] if found else ""


def store_refusal(error: BaseException, url: str) -> str:
    """Returns the sentence, or an empty string if Redis failed in another way."""
    user = URL(url).user or "default"
    if (refused := REFUSED_WRITES.get(code := refusal_code(error))) is not None:
        return f"Redis at {masked(url)} takes no writes ({code}), since {refused.words}: {refused.mend}"
    if UNTRUSTED in str(error):
        return f"Redis's certificate is not trusted ({error}): {UNTRUSTED_MEND}"
    if refusal_code(error) == "NOPERM":
        return f"Redis does not let user {user!r} do what this process needs ({error}): {RIGHTS_MEND}"
    if is_access_refused(error):
        return f"Redis refuses the login of user {user!r} ({error}): is the URL's password the one it was given? {RIGHTS_MEND}"
    return ""


def forgetting(memory: Mapping[str, Any]) -> str:
    """Says how a server with this `INFO memory` forgets what it took; empty if it does not."""
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction" or not memory.get("maxmemory"):
        return ""
    return f"Redis forgets answers and configuration when it is full (maxmemory-policy {policy}): set maxmemory-policy to noeviction"


def almost_full(memory: Mapping[str, Any], *, was_full: bool) -> str:
    """Says that a server with this `INFO memory` is almost full; empty if it is not."""
    limit, used = memory.get("maxmemory", 0), memory.get("used_memory", 0)
    if not limit or used < limit * (ROOM_AGAIN_BELOW if was_full else FULL_FROM):
        return ""
    return f"the store of results is full to {FULL_FROM:.0%}, and takes no new jobs"


def is_access_refused(error: BaseException) -> bool:
    return isinstance(error, AuthenticationError | NoPermissionError) or (isinstance(error, RedisError) and str(error).startswith("NOAUTH"))
