"""What a client must have seen before it says that a change is in effect."""

import pytest

from mqserve.client.effects import Seen
from mqserve.controller.state.beats import SILENT_AFTER_S, MemberState, ReplicaBeat
from mqserve.controller.state.documents import Assignment, Backend, Observed

NOW_MS = 1_000_000
VERSION = (1, 7)
CURRENT = (0, 3)
NEW = ReplicaBeat("new", NOW_MS, backend="b", version=2, follows=CURRENT)


@pytest.mark.parametrize(
    ("old", "is_ready"),
    [
        (ReplicaBeat("old", NOW_MS, backend="b", version=1), False),  # it may not have heard yet that nobody wants it any more
        (ReplicaBeat("old", NOW_MS, backend="b", version=1, state=MemberState.DRAINING), True),
        (ReplicaBeat("old", NOW_MS, backend="b", version=1, state=MemberState.STARTING), True),
        (ReplicaBeat("old", NOW_MS, backend="b", version=1, state=MemberState.FAILED), True),
        (ReplicaBeat("old", NOW_MS - int(SILENT_AFTER_S * 1000), backend="b", version=1), True),
        (ReplicaBeat("started-by-hand", NOW_MS, backend="b", version=1, external=True), True),
        (ReplicaBeat("with-the-old-config", NOW_MS, backend="b", version=2, follows=(0, 2)), False),
        (ReplicaBeat("one-more", NOW_MS, backend="b", version=2, follows=CURRENT), True),
        (ReplicaBeat("of-another", NOW_MS, backend="other", version=1), True),
    ],
)
def test_an_update_is_in_effect_once_no_old_replica_takes_requests(old: ReplicaBeat, is_ready: bool) -> None:
    backend = Backend("b", "sha", "b", version=2, config_version=3)
    observed = Observed(seen=VERSION, queues={"b": (1,)}, replicas={"new": Assignment("b", "node", 2)})
    seen = Seen(observed, {beat.field: beat for beat in (NEW, old)}, NOW_MS)
    assert seen.is_ready(backend, VERSION, 0, seen.replicas()["b"]) is is_ready
    is_unaware = not is_ready and old.version < backend.version
    assert seen.unaware(backend, seen.replicas()["b"]) == ["replica old has not heard yet that it is replaced"] * is_unaware


def test_an_update_is_not_in_effect_while_an_old_replica_is_assigned() -> None:
    backend = Backend("b", "sha", "b", version=2, config_version=3)
    observed = Observed(seen=VERSION, queues={"b": (1,)}, replicas={"new": Assignment("b", "node", 2), "old": Assignment("b", "node", 1)})
    assert not Seen(observed, {NEW.field: NEW}, NOW_MS).is_ready(backend, VERSION, 0, [NEW])
