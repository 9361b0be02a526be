"""Changes of the pipelines in the desired document, where they are endpoints with stages."""

from __future__ import annotations

import msgspec

from ..broker.errors import BadType, BadValue
from ..broker.queue_names import check_name
from .changes import Change, check_is_unscheduled, check_route_is_free, find_endpoint
from .endpoint_parsing import parse_route, read_methods
from .state.documents import Desired, Endpoint

MAX_STAGES = 100


def parse_pipeline(name: str, stages: object, route: object, methods: object) -> Endpoint:
    """Returns the pipeline. Raises BadType and BadValue, with the way out."""
    check_name(name, "a pipeline")
    if isinstance(stages, str) or not isinstance(stages, list | tuple) or not all(isinstance(stage, str) for stage in stages):
        raise BadType(f"pipeline {name!r} needs the names of its endpoints as a list, such as ['clean', 'embed'], not {stages!r}")
    if not 1 <= len(stages) <= MAX_STAGES:
        raise BadValue(f"pipeline {name!r} has {len(stages)} stages, and it needs 1 to {MAX_STAGES}: name its endpoints in order")
    read = read_methods(name, methods) or ("GET", "POST")
    return Endpoint(name, parse_route(name, route), tuple(method.upper() for method in read), {}, stages=tuple(stages))


def create_pipeline(declared: Endpoint, *, checks_stages: bool = True) -> Change:
    def change(desired: Desired) -> Desired:
        if (other := desired.endpoints.get(declared.name)) is not None:
            kind, mend = ("a pipeline", "delete_pipeline") if other.stages else ("an endpoint", "delete_endpoint")
            raise BadValue(f"there is {kind} {declared.name!r} already: choose another name, or {mend} first")
        for stage in declared.stages if checks_stages else ():
            if find_endpoint(desired, stage).stages:
                raise BadValue(
                    f"stage {stage!r} of pipeline {declared.name!r} is a pipeline itself: name the endpoints of that one instead"
                )
        check_route_is_free(desired, declared)
        return msgspec.structs.replace(desired, endpoints={**desired.endpoints, declared.name: declared})

    return change


def delete_pipeline(name: str) -> Change:
    """Does nothing for an unknown name, as the other deletions."""
    if not isinstance(name, str):
        raise BadType(f"delete_pipeline takes the name of a pipeline, not {name!r}")

    def change(desired: Desired) -> Desired:
        found = desired.endpoints.get(name)
        if found is not None and not found.stages:
            raise BadValue(f"{name!r} is an endpoint and no pipeline: delete it with delete_endpoint")
        check_is_unscheduled(desired, name)
        return msgspec.structs.replace(desired, endpoints={key: kept for key, kept in desired.endpoints.items() if key != name})

    return change
