"""Changes of the desired document: pure functions that validate, and one way to commit them.

A change that returns was made and is durable in the store. A change that raises StoreUnavailable may have been made: the
operation id inside the document lets the same call recognise itself when it is tried again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
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
from .state.config import BackendConfig
from .state.documents import Backend, Desired, Endpoint
from .state.resources import ActorOptions
from .state.route_patterns import check_convertor, compile_route

Change = Callable[[Desired], Desired]

IS_CLOSING = "the instance is being shut down: start it again once it is down, and make the change then"
_TRIES = 50
_KEPT_OPERATIONS = 64
_QUEUE_ARGUMENTS = ("max_queued_requests",)  # frozen in the queue: a change of one makes a new generation


async def commit(store: Store, keys: StoreKeys, instance: str, change: Change, *, any_instance: bool = False) -> Desired:
    """Applies `change` by compare-and-set. Raises whatever the change raises, and InstanceError as `read` does."""
    operation = secrets.token_hex(8)
    for attempt in range(_TRIES):
        try:
            raw, current = await read(store, keys, instance, any_instance=any_instance)
            if operation in current.operations:
                return current
            if current.closing:
                raise InstanceError(IS_CLOSING)
            wanted = msgspec.structs.replace(change(current), operations=(*current.operations, operation)[-_KEPT_OPERATIONS:])
            if (written := await write_next(store, keys, raw, wanted)) is not None:
                return written
        except StoreUnavailable:
            if attempt >= 2:
                raise
    raise StoreUnavailable(f"the desired state changed under us {_TRIES} times in a row: too many clients deploy at once, try again")


async def read(store: Store, keys: StoreKeys, instance: str, *, any_instance: bool = False) -> tuple[bytes, Desired]:
    """As `look`; a lost document is waited for, since a leader may be about to write it back. Raises InstanceError where none does."""
    try:
        return await until(store, partial(look, store, keys, instance, any_instance=any_instance), lease.JOIN_WATCH_S)
    except TimeoutError:
        raise InstanceError(
            f"the store has lost the documents of the instance, and no controller has written them back within {lease.JOIN_WATCH_S:g} s: "
            "see `mqserve status`, or start the instance again"
        ) from None


async def look(store: Store, keys: StoreKeys, instance: str, *, any_instance: bool = False) -> tuple[bytes, Desired] | None:
    """The document of the instance, or with `any_instance` of the one that has taken its place; None where the store has lost it.

    Raises InstanceEnded where the instance was shut down, or another one has its namespace.
    """
    raw = await store.get(keys.desired)
    if raw is None:
        if await lease.has_ended(store, keys, instance):
            raise InstanceEnded(
                "the instance has been shut down, and none runs under its namespace: start one with `mqserve start`, `mqserve run` or "
                "serve.start(), and serve.connect() joins it"
            )
        return None
    desired = Desired.from_bytes(raw)
    if desired.instance != instance and not any_instance:
        raise InstanceEnded("the instance of this client has been shut down, and another one has its namespace: serve.connect() joins that")
    return raw, desired


def create_backend(backend: Backend) -> Change:
    def change(desired: Desired) -> Desired:
        if backend.name in desired.backends:
            raise BadValue(f"there is a backend {backend.name!r} already: choose another name, or change it with update_backend")
        forced = tuple(name for name in desired.forced if name != backend.name)
        new = msgspec.structs.replace(backend, version=desired.version + 1)
        return msgspec.structs.replace(desired, backends={**desired.backends, backend.name: new}, forced=forced)

    check_name(backend.name, "a backend")
    return change


def update_backend(name: str, code: str, code_name: str, options: ActorOptions | None) -> Change:
    """New code (and with `options` new resources) for all replicas."""

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, name)
        new = msgspec.structs.replace(
            backend,
            code=code,
            code_name=code_name,
            options=backend.options if options is None else options,
            version=desired.version + 1,
            rolled_back="",
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, name: new})

    return change


def roll_back(failed: Backend, to: Backend, reason: str) -> Change:
    """The code and version of `to` again, unless somebody deployed another one meanwhile."""

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, failed.name)
        if backend.version != failed.version:
            return desired
        old = msgspec.structs.replace(
            backend, code=to.code, code_name=to.code_name, options=to.options, version=to.version, rolled_back=reason
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, failed.name: old})

    return change


def update_backend_config(name: str, config: BackendConfig | dict[str, Any]) -> Change:
    """Only what is set changes."""
    options = _config_options(config)

    def change(desired: Desired) -> Desired:
        backend = find_backend(desired, name)
        settings = parse_config({**backend.settings, **options}).model_dump(exclude_unset=True)
        old, new = backend.config, BackendConfig.model_validate(settings)
        frozen_changed = any(getattr(old, argument) != getattr(new, argument) for argument in _QUEUE_ARGUMENTS)
        updated = msgspec.structs.replace(
            backend,
            settings=settings,
            generation=backend.generation + int(frozen_changed),
            config_version=backend.config_version + 1,
        )
        return msgspec.structs.replace(desired, backends={**desired.backends, name: updated})

    return change


def restore_user_config(refused: Backend, user_config: Any) -> Change:
    """The last good one, unless somebody set another meanwhile."""

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
    """Silently nothing for an unknown name, as in the seed; with `force`, what waits or runs is dropped."""

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


def create_endpoint(endpoint: Endpoint) -> Change:
    def change(desired: Desired) -> Desired:
        for backend in endpoint.traffic:
            find_backend(desired, backend)
        if endpoint.name in desired.endpoints:
            raise BadValue(f"there is an endpoint {endpoint.name!r} already: choose another name, or delete_endpoint first")
        for other in desired.endpoints.values():
            if endpoint.route is not None and other.route == endpoint.route:
                raise BadValue(f"route {endpoint.route!r} belongs to endpoint {other.name!r}: choose another, or delete that endpoint")
        return msgspec.structs.replace(desired, endpoints={**desired.endpoints, endpoint.name: endpoint})

    check_name(endpoint.name, "an endpoint")
    return change


def delete_endpoint(name: str) -> Change:
    """Silently nothing for an unknown name, as in the seed."""

    def change(desired: Desired) -> Desired:
        return msgspec.structs.replace(desired, endpoints={key: kept for key, kept in desired.endpoints.items() if key != name})

    return change


def set_traffic(name: str, traffic: object) -> Change:
    """New weights; unlike in the seed, the shadows stay."""
    weights = parse_traffic(traffic)

    def change(desired: Desired) -> Desired:
        endpoint = find_endpoint(desired, name)
        for backend in weights:
            find_backend(desired, backend)
        return _with_endpoint(desired, msgspec.structs.replace(endpoint, traffic=weights))

    return change


def shadow_traffic(name: str, backend: str, proportion: object) -> Change:
    """A share of the requests is copied to `backend`; 0 ends it."""
    if isinstance(proportion, bool) or not isinstance(proportion, int | float) or not 0 <= proportion <= 1:
        raise BadType(f"the proportion of shadow traffic must be a number from 0 to 1, not {proportion!r}")

    def change(desired: Desired) -> Desired:
        endpoint = find_endpoint(desired, name)
        find_backend(desired, backend)
        shadows = {key: kept for key, kept in endpoint.shadows.items() if key != backend}
        if proportion:
            shadows[backend] = float(proportion)
        return _with_endpoint(desired, msgspec.structs.replace(endpoint, shadows=shadows))

    return change


def parse_traffic(traffic: object) -> dict[str, float]:
    """Raises BadType for what is no dict of numbers, BadValue for weights below 0 or that do not sum to 1 (within 1e-5, as the seed)."""
    if not isinstance(traffic, dict):
        raise BadType(f"traffic must be a dict such as {{'new': 0.1, 'old': 0.9}}, not {type(traffic).__name__}")
    for backend, weight in traffic.items():
        if not isinstance(backend, str):
            raise BadType(f"traffic goes to backends by name, and {backend!r} is no str")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadType(f"the weight of backend {backend!r} must be a number, not {weight!r}")
        if not 0 <= weight < 2:
            raise BadValue(f"the weight of backend {backend!r} is {weight}: weights are 0 or more, and sum to 1")
    if abs(sum(traffic.values()) - 1) > 1e-5:
        raise BadValue(f"the weights {traffic} sum to {sum(traffic.values()):g}: they must sum to 1")
    return {backend: float(weight) for backend, weight in traffic.items()}


def find_endpoint(desired: Desired, name: str) -> Endpoint:
    if not isinstance(name, str) or name not in desired.endpoints:
        known = ", ".join(sorted(desired.endpoints)) or "none yet"
        raise BadValue(f"there is no endpoint {name!r} (known: {known}): create it with create_endpoint first")
    return desired.endpoints[name]


def _with_endpoint(desired: Desired, endpoint: Endpoint) -> Desired:
    return msgspec.structs.replace(desired, endpoints={**desired.endpoints, endpoint.name: endpoint})


def register_convertor(name: str, code: str, convertor: Convertor[Any] | None = None) -> Change:
    """Raises BadValue where a route uses the name already, and could not be matched with this `convertor`; without it nobody looks."""
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
    """All that was declared is deployed."""
    return msgspec.structs.replace(desired, incomplete=False)


def find_backend(desired: Desired, name: str) -> Backend:
    if not isinstance(name, str) or name not in desired.backends:
        known = ", ".join(sorted(desired.backends)) or "none yet"
        raise BadValue(f"there is no backend {name!r} (known: {known}): create it with create_backend first")
    return desired.backends[name]


def parse_config(config: BackendConfig | dict[str, Any] | None) -> BackendConfig:
    """Raises BadType for another type and BadValue, naming the field, for a bad or unknown setting."""
    try:
        parsed = BackendConfig.model_validate(_config_options({} if config is None else config))
    except pydantic.ValidationError as error:
        raise BadValue(f"bad backend config: {_sentence(error)}") from error
    try:
        exact = msgspec.json.decode(msgspec.json.encode(parsed.user_config)) == parsed.user_config
    except Exception:  # cycles, surrogates, numbers without end, and whatever a stranger's == may raise
        exact = False
    if not exact:
        raise BadValue("user_config must be plain data (None, bool, numbers, str, lists, str-keyed dicts): it is kept as JSON")
    return parsed


def parse_endpoint(name: str, backend: object, route: object, methods: object) -> Endpoint:
    """Raises BadType as the seed does, and BadValue for a route that does not parse."""
    if not isinstance(backend, str):
        raise BadType(f"endpoint {name!r} needs the name of its backend as a str: create_endpoint({name!r}, backend='…')")
    if route is not None and not (isinstance(route, str) and route.startswith("/")):
        raise BadType(f"route {route!r} of endpoint {name!r} must be None or a str that starts with '/', such as '/{name}'")
    if not isinstance(methods, list | tuple) or not methods or not all(isinstance(method, str) for method in methods):
        raise BadType(f"methods of endpoint {name!r} must be a list of names such as ['GET', 'POST'], not {methods!r}")
    for method in methods:
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", method):
            raise BadValue(f"{method!r} is no HTTP method: methods of endpoint {name!r} are names such as 'GET'")
    if route is not None:
        _check_route(route)
    return Endpoint(name, route, tuple(method.upper() for method in methods), {backend: 1.0})


def _check_route(route: str) -> None:
    if route == "/-" or route.startswith("/-/"):
        raise BadValue(f"route {route!r} lies under '/-/', which belongs to the system: choose another")
    compile_route(route)


def _config_options(config: object) -> dict[str, Any]:
    if isinstance(config, BackendConfig):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, dict):
        return config
    raise BadType(f"config must be a dict or a BackendConfig, not {type(config).__name__}")


def _sentence(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"there is no setting {field!r}; there are {', '.join(BackendConfig.model_fields)}"
    return f"{field}: {first['msg'].lower()}, not {first.get('input')!r}"
