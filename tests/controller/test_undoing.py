"""Undoing a change of many parts restores exactly what it changed, and nothing that somebody changed since."""

from msgspec.structs import replace

from mqserve.controller import changes
from mqserve.controller.changes import Change
from mqserve.controller.pipeline_changes import create_pipeline, delete_pipeline
from mqserve.controller.state.documents import Backend, CodeKind, Desired, Endpoint
from mqserve.controller.undoing import undo


def endpoint(name: str, *backends: str) -> Endpoint:
    return Endpoint(name, f"/{name}", ("GET",), {backend: 1 / len(backends) for backend in backends})


def by(desired: Desired, *made: Change) -> Desired:
    """The document after these changes, as the next version."""
    for change in made:
        desired = change(desired)
    return replace(desired, version=desired.version + 1)


BEFORE = Desired(
    instance="i",
    version=7,
    backends={"old": Backend("old", "c0", "f", {"num_replicas": 2}, version=3)},
    endpoints={"e": endpoint("e", "old")},
)
NEW = changes.create_backend(Backend("new", "c1", "f"))
MADE = by(
    BEFORE,
    NEW,
    changes.update_backend("old", "c2", "g", CodeKind.HANDLER, None),
    changes.update_backend_config("old", {"num_replicas": 5, "max_queued_requests": 9}),
    changes.create_endpoint(endpoint("e2", "new")),
    changes.set_traffic("e", {"new": 1.0}),
    changes.register_convertor("hex", "c3"),
    changes.set_middlewares("c4"),
)
UNDO = undo(BEFORE, MADE, "no model")


def test_all_is_as_before_but_for_counts_that_only_grow() -> None:
    left = by(MADE, UNDO)
    assert (left.endpoints, left.convertors, left.http) == (BEFORE.endpoints, {}, BEFORE.http)
    assert list(left.backends) == ["old"]
    old = left.backends["old"]
    assert (old.code, old.version, old.settings, old.rolled_back) == ("c0", 3, {"num_replicas": 2}, "no model")
    assert (old.config_version, old.generation) == (3, 3), "the queue that was bounded is another one"


def test_what_somebody_changed_meanwhile_stays() -> None:
    theirs = by(
        MADE,
        changes.update_backend("old", "theirs", "g", CodeKind.HANDLER, None),
        changes.set_traffic("e", {"old": 0.5, "new": 0.5}),
        changes.set_middlewares("theirs"),
        changes.register_convertor("hex", "theirs"),
    )
    left = by(theirs, UNDO)
    assert left.backends["old"].code == "theirs"
    assert left.endpoints["e"].traffic == {"old": 0.5, "new": 0.5}
    assert (left.http.middlewares, left.convertors) == ("theirs", {"hex": "theirs"})


def test_a_new_backend_that_somebody_else_uses_by_now_stays() -> None:
    left = by(by(MADE, changes.create_endpoint(endpoint("theirs", "new"))), UNDO)
    assert set(left.backends) == {"old", "new"} and set(left.endpoints) == {"e", "theirs"}


def test_a_queue_of_another_generation_does_not_keep_a_new_backend() -> None:
    renewed = replace(MADE, backends={**MADE.backends, "new": replace(MADE.backends["new"], generation=2)})
    assert "new" not in by(renewed, UNDO).backends


def test_what_was_deleted_is_deployed_again_as_a_new_version() -> None:
    deleted = by(BEFORE, changes.delete_endpoint("e"), changes.delete_backend("old"))
    left = by(deleted, undo(BEFORE, deleted, "no"))
    assert left.endpoints == BEFORE.endpoints
    assert left.backends["old"].code == "c0" and left.backends["old"].version == deleted.version + 1


def test_an_endpoint_of_a_backend_that_somebody_has_deleted_does_not_come_back() -> None:
    moved = by(BEFORE, NEW, changes.set_traffic("e", {"new": 1.0}))
    theirs = by(moved, changes.delete_backend("old"))
    left = by(theirs, undo(BEFORE, moved, "no"))
    assert left.endpoints["e"].traffic == {"new": 1.0} and list(left.backends) == ["new"]


def test_a_backend_whose_forced_deletion_is_undone_drains_as_any_other() -> None:
    forced = by(BEFORE, changes.delete_endpoint("e"), changes.delete_backend("old", force=True))
    assert forced.forced == ("old",)
    left = by(forced, undo(BEFORE, forced, "no"))
    assert left.forced == () and list(left.backends) == ["old"] and list(left.endpoints) == ["e"]


def test_endpoints_that_come_back_are_as_old_as_they_were() -> None:
    before = by(BEFORE, *[changes.create_endpoint(endpoint(name, "old")) for name in ("a", "b", "c")])
    deleted = by(before, changes.delete_endpoint("a"), changes.delete_endpoint("e"))
    theirs = by(deleted, changes.create_endpoint(endpoint("d", "old")))
    assert list(by(theirs, undo(before, deleted, "no")).endpoints) == ["e", "a", "b", "c", "d"]


def test_an_endpoint_whose_route_somebody_has_taken_does_not_come_back() -> None:
    deleted = by(BEFORE, changes.delete_endpoint("e"))
    theirs = by(deleted, changes.create_endpoint(Endpoint("theirs", "/e", ("GET",), {"old": 1.0})))
    assert list(by(theirs, undo(BEFORE, deleted, "no")).endpoints) == ["theirs"]


def pipeline(*stages: str) -> Change:
    return create_pipeline(Endpoint("p", "/p", ("GET",), {}, stages=stages))


def test_a_pipeline_goes_with_the_endpoints_that_it_was_made_with() -> None:
    made = by(BEFORE, NEW, changes.create_endpoint(endpoint("e2", "new")), pipeline("e", "e2"))
    assert by(made, undo(BEFORE, made, "no")).endpoints == BEFORE.endpoints


def test_a_pipeline_that_somebody_else_has_made_meanwhile_keeps_its_stages() -> None:
    made = by(BEFORE, NEW, changes.create_endpoint(endpoint("e2", "new")))
    left = by(by(made, pipeline("e", "e2")), undo(BEFORE, made, "no"))
    assert left.endpoints["p"].stages == ("e", "e2") and "e2" in left.endpoints and "new" in left.backends


def test_a_pipeline_that_was_deleted_does_not_come_back_without_its_stages() -> None:
    before = by(BEFORE, changes.create_endpoint(endpoint("e2", "old")), pipeline("e2"))
    made = by(before, delete_pipeline("p"))
    now = by(made, changes.delete_endpoint("e2"))
    assert by(now, undo(before, made, "no")).endpoints == BEFORE.endpoints
    assert by(made, undo(before, made, "no")).endpoints == before.endpoints
