"""Changes of the desired document: pure functions that validate a change, and one function that commits it.

A change that returns was made and is durable in the store. A change that raises StoreUnavailable may have been made: the document holds
the ids of recent operations, so that a retry of the same call recognizes that.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import msgspec
import pydantic
from starlette.convertors import Convertor

from ..broker.documents import until
from ..broker.errors import BadType, BadValue, InstanceEnded, InstanceError, StoreUnavailable
from ..broker.queue_names import check_name
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from . import lease
from .desired_writes import write_next
from .endpoint_parsing import parse_traffic
from .job_limits import check_job_timeouts
from .state.config import BackendConfig
from .state.documents import ANY_METHOD, Backend, CodeKind, Desired, Endpoint
from .state.reading import read_desired
from .state.resources import ActorOptions
from .state.retries import sentence_of
from .state.route_patterns import check_convertor

Change = Callable[[Desired], Desired]

IS_CLOSING = "the instance is being shut down: start it again once it is down, and make the change then"
_TRIES = 50
_KEPT_OPERATIONS = 64
_QUEUE_ARGUMENTS = ("max_queued_requests", "queue_shards")  # these are frozen in the queues, so changing one makes a new generation


async def commit(store: Store, keys: StoreKeys, instance: str, change: Change, *, any_instance: bool = False) -> Desired:
    """Applies `change` by compare-and-set. Raises any error of the change, and InstanceError as `read` does."""
    operation = secrets.token_hex(8)
    for attempt in range(_TRIES):
        try:
            raw, current = await read(store, keys, instance, any_instance=any_instance)
            if operation in current.operations:
                return current
            if current.closing:
                raise InstanceError(IS_CLOSING)
            changed = change(current)
            await check_job_timeouts(store, keys, current, changed)
            wanted = msgspec.structs.replace(changed, operations=(*current.operations, operation)[-_KEPT_OPERATIONS:])
            if (written := await write_next(store, keys, raw, wanted)) is not None:
                return written
        except StoreUnavailable:
            if attempt >= 2:
                raise
    raise StoreUnavailable(f"the desired state changed under us {_TRIES} times in a row: too many clients deploy at once, try again")


async def read(store: Store, keys: StoreKeys, instance: str, *, any_instance: bool = False) -> tuple[bytes, Desired]:
    """Reads the document like `look`, but waits for a lost one, since a leader may be about to write it back. Raises InstanceError if
    that does not happen."""
    try:
        return await until(store, partial(look, store, keys, instance, any_instance=any_instance), lease.JOIN_WATCH_S)
    except TimeoutError:
        raise InstanceError(
            f"the store has lost the documents of the instance, and no controller has written them back within {lease.JOIN_WATCH_S:g} s: "
            "see `mqserve status`, or start the instance again"
        ) from None


async def look(store: Store, keys: StoreKeys, instance: str, *, any_instance: bool = False) -> tuple[bytes, Desired] | None:
    """Returns the document of the instance (with `any_instance`, also of one that has replaced it), or None if the store has lost it.

    Raises InstanceEnded if the instance was shut down, or another one has its namespace.
    """
    raw = await store.get(keys.desired)
    if raw is None:
        if await lease.has_ended(store, keys, instance):
            raise InstanceEnded(
                "the instance has been shut down, and none runs under its namespace: start one with `mqserve start`, `mqserve run` or "
                "serve.start(), and serve.connect() joins it"
            )
        return None
    desired = read_desired(raw)
    if desired.instance != instance and not any_instance:
        raise InstanceEnded("the instance of this client has been shut down, and another one has its namespace: serve.connect() joins that")
    return raw, desired


def create_backend(backend: Backend) -> Change:
    def change(desired: Desired) -> Desired:
        if backend.name in desired.backends:
            raise BadValue(f"there is a backend {backend.name!r} already: choose another name, or change it with update_backend")
        check_app(backend.name, backend.kind, backend.config)
        forced = tuple(name for name in desired.forced if name != backend.name)
        new = msgspec.structs.replace(backend, version=desired.version + 1)
        return msgspec.structs.replace(desired, backends={**desired.backends, backend.name: new}, forced=forced)

    check_name(backend.name, "a backend")
    return change


def update_backend(name: str, code: str, code_name: str, kind: CodeKind, options: ActorOptions | None) -> Change:
    """Deploys new code (and with `options` new resources) to all replicas."""

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, name)
        check_app(name, kind, backend.config)
        new = msgspec.structs.replace(
            backend,
            code=code,
            code_name=code_name,
            kind=kind,
            options=backend.options if options is None else options,
            version=desired.version + 1,
            rolled_back="",
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, name: new})

    return change


def roll_back(failed: Backend, to: Backend, reason: str) -> Change:
    """Deploys the code and version of `to` again, unless newer code was deployed meanwhile."""

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, failed.name)
        if backend.version != failed.version:
            return desired
        old = msgspec.structs.replace(
            backend, code=to.code, code_name=to.code_name, kind=to.kind, options=to.options, version=to.version, rolled_back=reason
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, failed.name: old})

    return change


def update_backend_config(name: str, config: BackendConfig | dict[str, Any]) -> Change:
    """Changes only the fields that are set in `config`."""
    options = _config_options(config)

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, name)
        settings = parse_config({**backend.settings, **options}).model_dump(exclude_unset=True)
        old, new = backend.config, BackendConfig.model_validate(settings)
        check_app(name, backend.kind, new)
        updated = msgspec.structs.replace(
            backend,
            settings=settings,
            generation=backend.generation + int(needs_new_queue(old, new)),
            config_version=backend.config_version + 1,
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, name: updated})

    return change


def tell_kinds(found: Mapping[str, tuple[int, CodeKind]]) -> Change:
    """Notes what the replicas of named code have found it to be: backend -> (version, kind). Leaves alone what was deployed meanwhile."""

    def change(desired: Desired) -> Desired:
        told = {
            name: msgspec.structs.replace(desired.backends[name], kind=kind)
            for name, (version, kind) in found.items()
            if name in desired.backends and desired.backends[name].version == version
        }
        return msgspec.structs.replace(desired, backends={**desired.backends, **told})

    return change


def check_app(name: str, kind: CodeKind, config: BackendConfig) -> None:
    """Raises BadValue for settings that an ASGI app cannot have."""
    if kind.is_app and config.max_batch_size is not None:
        raise BadValue(f"backend {name!r} is an ASGI app, which takes no batches of requests: leave max_batch_size out")
    if kind.is_app and config.on_death == "replay":
        raise BadValue(f"backend {name!r} is an ASGI app, whose answers cannot be replayed: leave on_death at 'fail'")
    if kind.is_app and config.retry is not None:
        raise BadValue(
            f"backend {name!r} is an ASGI app, which makes an answer of each exception, so nothing is tried again: leave retry out"
        )
    if kind is CodeKind.APP_OBJECT and config.num_replicas > 1:
        raise BadValue(
            f"backend {name!r} is one app object of this process, so it can have one replica and not {config.num_replicas}: name it by an "
            "import string ('package.module:app') or give a function that makes it (factory=True), then each replica has an app of its "
            "own; or set MQSERVE_BROKER_URL and MQSERVE_STORE_URL, then each replica is a process"
        )


def needs_new_queue(old: BackendConfig, new: BackendConfig) -> bool:
    return any(getattr(old, argument) != getattr(new, argument) for argument in _QUEUE_ARGUMENTS)


def restore_user_config(refused: Backend, user_config: Any) -> Change:
    """Restores the last good user config, unless another one was set meanwhile."""

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, refused.name)
        if backend.config_version != refused.config_version:
            return desired
        settings = {key: kept for key, kept in backend.settings.items() if key != "user_config"}
        if user_config is not None:
            settings["user_config"] = user_config
        restored = msgspec.structs.replace(backend, settings=settings, config_version=backend.config_version + 1)
        return msgspec.structs.replace(desired, backends={**desired.backends, refused.name: restored})

    return change


def delete_backend(name: str, *, force: bool = False) -> Change:
    """Deletes a backend; does nothing for an unknown name, as in Ray Serve 1.x. With `force`, waiting and running requests are dropped."""

    if not isinstance(name, str):
        raise BadType(f"delete_backend takes the name of a backend, not {name!r}")

    def change(desired: Desired) -> Desired:
        for endpoint in desired.endpoints.values():
            if name in endpoint.traffic or name in endpoint.shadows:
                raise BadValue(
                    f"backend {name!r} is used by endpoint {endpoint.name!r}: "
                    "delete that endpoint or take the backend out of its traffic first"
                )
        forced = (*desired.forced, name) if force and name in desired.backends else desired.forced
        backends = {key: kept for key, kept in desired.backends.items() if key != name}
        return msgspec.structs.replace(desired, backends=backends, forced=forced)

    return change


def create_endpoint(declared: Endpoint) -> Change:
    def change(desired: Desired) -> Desired:
        if declared.name in desired.endpoints:
            raise BadValue(f"there is an endpoint {declared.name!r} already: choose another name, or delete_endpoint first")
        endpoint = _complete(declared, [find_backend(desired, backend) for backend in declared.traffic])
        check_route_is_free(desired, endpoint)
        return _with_endpoint(desired, endpoint)

    check_name(declared.name, "an endpoint")
    return change


def check_route_is_free(desired: Desired, endpoint: Endpoint) -> None:
    """Raises BadValue if another endpoint has the route."""
    for other in desired.endpoints.values():
        if endpoint.route is not None and other.route == endpoint.route:
            raise BadValue(f"route {endpoint.route!r} belongs to endpoint {other.name!r}: choose another, or delete that endpoint")


def _complete(declared: Endpoint, backends: list[Backend]) -> Endpoint:
    """Fills in what depends on the backends: the route to an app is a prefix, and the app decides which methods it takes."""
    prefix = declared.route is not None and any(backend.kind.is_app for backend in backends)
    methods = declared.methods or ((ANY_METHOD,) if prefix else ("GET",))
    if not prefix or declared.route is None:
        return msgspec.structs.replace(declared, methods=methods)
    check_prefix(declared.route)
    return msgspec.structs.replace(declared, prefix=True, route=declared.route.rstrip("/") or "/", methods=methods)


def check_prefix(route: str) -> None:
    """Raises BadValue for a route that cannot be a prefix."""
    if "{" in route:
        raise BadValue(
            f"route {route!r} leads to an ASGI app, so it is a prefix, which has no parameters: give a prefix such as "
            "'/v1', and write the parameters into the routes of the app"
        )
    if {"", ".", ".."}.intersection(route.removesuffix("/").split("/")[1:]):
        raise BadValue(
            f"prefix {route!r} has a segment that is empty, '.' or '..': clients and servers in front resolve these, so that no request "
            "would arrive; write it without, such as '/v1'"
        )


def delete_endpoint(name: str) -> Change:
    """Deletes an endpoint; does nothing for an unknown name, as in Ray Serve 1.x."""

    def change(desired: Desired) -> Desired:
        if not isinstance(name, str) or name not in desired.endpoints:
            return desired
        if desired.endpoints[name].stages:
            raise BadValue(f"{name!r} is a pipeline: delete it with delete_pipeline")
        check_is_unscheduled(desired, name)
        if pipelines := [other.name for other in desired.endpoints.values() if name in other.stages]:
            raise BadValue(f"endpoint {name!r} is a stage of pipeline {pipelines[0]!r}: delete that with delete_pipeline first")
        return msgspec.structs.replace(desired, endpoints={key: kept for key, kept in desired.endpoints.items() if key != name})

    return change


def check_is_unscheduled(desired: Desired, name: str) -> None:
    """Raises BadValue if a schedule calls the endpoint."""
    if schedules := [schedule.name for schedule in desired.schedules.values() if schedule.endpoint == name]:
        raise BadValue(f"endpoint {name!r} is called by schedule {schedules[0]!r}: delete that with delete_schedule first")


def set_traffic(name: str, traffic: object) -> Change:
    """Sets new weights. Unlike in Ray Serve 1.x, the shadows stay."""
    weights = parse_traffic(traffic)

    def change(desired: Desired) -> Desired:
        endpoint = _with_traffic(find_endpoint(desired, name))
        for backend in weights:
            find_backend(desired, backend)
        return _with_endpoint(desired, msgspec.structs.replace(endpoint, traffic=weights))

    return change


def shadow_traffic(name: str, backend: str, proportion: object) -> Change:
    """Copies a share of the requests to `backend`; 0 ends that."""
    if isinstance(proportion, bool) or not isinstance(proportion, int | float) or not 0 <= proportion <= 1:
        raise BadType(f"the proportion of shadow traffic must be a number from 0 to 1, not {proportion!r}")

    def change(desired: Desired) -> Desired:
        endpoint = _with_traffic(find_endpoint(desired, name))
        find_backend(desired, backend)
        shadows = {key: kept for key, kept in endpoint.shadows.items() if key != backend}
        if proportion:
            shadows[backend] = float(proportion)
        return _with_endpoint(desired, msgspec.structs.replace(endpoint, shadows=shadows))

    return change


def find_endpoint(desired: Desired, name: str) -> Endpoint:
    if not isinstance(name, str) or name not in desired.endpoints:
        known = ", ".join(sorted(desired.endpoints)) or "none yet"
        raise BadValue(f"there is no endpoint {name!r} (known: {known}): create it with create_endpoint first")
    return desired.endpoints[name]


def _with_traffic(endpoint: Endpoint) -> Endpoint:
    """Raises BadValue for a pipeline."""
    if endpoint.stages:
        raise BadValue(f"{endpoint.name!r} is a pipeline, which has no traffic of its own: set that of its endpoint {endpoint.stages[0]!r}")
    return endpoint


def _with_endpoint(desired: Desired, endpoint: Endpoint) -> Desired:
    return msgspec.structs.replace(desired, endpoints={**desired.endpoints, endpoint.name: endpoint})


def register_convertor(name: str, code: str, convertor: Convertor[Any] | None = None) -> Change:
    """Registers a convertor. Raises BadValue if a route uses the name already and could not be matched with this `convertor`; without
    `convertor` nothing is checked."""
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
        raise BadValue(f"{name!r} is no name for a convertor: it is to stand in a route, such as 'upper' in '/{{word:upper}}'")

    def change(desired: Desired) -> Desired:
        if convertor is not None:
            check_convertor(name, convertor, [endpoint.route for endpoint in desired.endpoints.values() if endpoint.route is not None])
        return msgspec.structs.replace(desired, convertors={**desired.convertors, name: code})

    return change


def set_middlewares(code: str) -> Change:
    def change(desired: Desired) -> Desired:
        return msgspec.structs.replace(desired, http=msgspec.structs.replace(desired.http, middlewares=code))

    return change


def complete(desired: Desired) -> Desired:
    """Marks that everything declared at the start is deployed."""
    return msgspec.structs.replace(desired, incomplete=False)


def find_backend(desired: Desired, name: str) -> Backend:
    if not isinstance(name, str) or name not in desired.backends:
        known = ", ".join(sorted(desired.backends)) or "none yet"
        raise BadValue(f"there is no backend {name!r} (known: {known}): create it with create_backend first")
    return desired.backends[name]


def parse_config(config: BackendConfig | dict[str, Any] | None) -> BackendConfig:
    """Returns the config. Raises BadType for another type, and BadValue, naming the field, for a bad or unknown setting."""
    try:
        parsed = BackendConfig.model_validate(_config_options({} if config is None else config))
    except pydantic.ValidationError as error:
        raise BadValue(f"bad backend config: {sentence_of(error, BackendConfig)}") from error
    try:
        exact = msgspec.json.decode(msgspec.json.encode(parsed.user_config)) == parsed.user_config
    except Exception:  # cycles, surrogates, numbers that are not finite, errors of a user's `==`
        exact = False
    if not exact:
        raise BadValue("user_config must be plain data (None, bool, numbers, str, lists, str-keyed dicts): it is kept as JSON")
    return parsed


def _config_options(config: object) -> dict[str, Any]:
    if isinstance(config, BackendConfig):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, dict):
        with suppress(Exception):  # what cannot be copied is refused where it is parsed
            return deepcopy(config)  # a change may be made later, when the caller's dict says something else
        return config
    raise BadType(f"config must be a dict or a BackendConfig, not {type(config).__name__}")
