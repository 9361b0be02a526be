"""The client: one process's way to act on an instance. Every function of `mqserve` is a method here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, TypeVar, overload

from starlette.convertors import register_url_convertor

from .broker import code
from .broker.caller import Caller
from .broker.documents import follow, until
from .broker.errors import BackendFailed, BadType, BadValue, InstanceError, UnknownEndpoint
from .broker.queue_names import check_name
from .controller import desired as changes
from .controller.resources import ActorOptions, parse_actor_options
from .controller.state import Backend, BackendConfig, Desired, Observed, read_beats
from .declared import Declaration
from .futures import Future, get, wait
from .handle import AsyncHandle, Handle
from .links import Links
from .replicas.batching import accepts_batch
from .runtime import Runtime
from .sender import Sender

logger = logging.getLogger(__name__)

ROUTE_BUDGET_S = 30.0
DELETE_BUDGET_S = 60.0
READY_MARGIN_S = 15.0
T = TypeVar("T")


class Client:
    """Made by `serve.start` and `serve.connect`. Its methods may be called from any thread; each waits for what it promises."""

    def __init__(self, runtime: Runtime, links: Links, instance: str, end: Callable[[], None]) -> None:
        self._runtime = runtime
        self._links = links
        self._instance = instance
        self._end = end
        self._signer = links.settings.signer
        self._caller = Caller(links.queue, links.store, links.keys, links.process_id)
        self._sender = Sender(runtime, links, self._caller)
        self._closed = False

    def __repr__(self) -> str:
        return f"<Client of {self._links.settings.namespace!r}{', shut down' if self._closed else ''}>"

    def __reduce__(self) -> Any:
        """Arrives as the client of the instance that is current there."""
        from .api import connect

        return connect, ()

    @property
    def sender(self) -> Sender:
        """For handles. Raises InstanceError once shut down."""
        self._check_open()
        return self._sender

    async def run(self) -> None:
        """Reads results and follows the desired document until cancelled; for whoever made the client."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._caller.run())
            async for (raw,) in follow(self._links.store, self._links.keys.desired):
                if raw is not None:
                    self._sender.desired = Desired.from_bytes(raw)

    # Backends.

    def create_backend(
        self,
        backend_tag: str,
        func_or_class: Any,
        *init_args: Any,
        actor_options: dict[str, Any] | None = None,
        ray_actor_options: dict[str, Any] | None = None,
        config: BackendConfig | dict[str, Any] | None = None,
    ) -> None:
        """Deploys a function, a class or an import string; returns once all replicas are ready.

        Raises BadValue for a name that is taken, a bad config, or arguments for a function; BadType for what is no function or
        class; NotEncodable for code that cannot travel; BackendFailed with the remote traceback when a replica does not get
        ready, and then nothing stays registered.
        """
        options = _actor_options(actor_options, ray_actor_options, embedded=self._links.settings.embedded)
        _check_target(backend_tag, func_or_class, init_args)
        parsed = changes.parse_config(config)
        _check_fits(backend_tag, func_or_class, parsed)
        check_name(backend_tag, "a backend")
        packed = code.pack(func_or_class, init_args, self._signer)
        self._call(self._create_backend(backend_tag, packed, parsed, options))

    async def _create_backend(self, name: str, packed: code.Code, config: BackendConfig, options: ActorOptions) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed)
        backend = Backend(name, sha256, packed.name, config.model_dump(exclude_unset=True), options)
        committed = await self._commit(changes.create_backend(backend))
        try:
            await self._until_ready(committed, name)
        except BaseException:
            await self._delete_backend(name)
            raise

    def update_backend(self, backend_tag: str, func_or_class: Any, *init_args: Any, actor_options: dict[str, Any] | None = None) -> None:
        """Rolls out new code: new replicas first, then the old ones drain.

        Raises BackendFailed when the new version does not get ready; the old one serves on.
        """
        options = None if actor_options is None else _actor_options(actor_options, None, embedded=self._links.settings.embedded)
        _check_target(backend_tag, func_or_class, init_args)
        packed = code.pack(func_or_class, init_args, self._signer)
        self._call(self._update_backend(backend_tag, packed, options))

    async def _update_backend(self, name: str, packed: code.Code, options: ActorOptions | None) -> None:
        old = changes.find_backend(await self._read_desired(), name)
        sha256 = await code.save(self._links.store, self._links.keys, packed)
        committed = await self._commit(changes.update_backend(name, sha256, packed.name, options))
        try:
            await self._until_ready(committed, name)
        except BackendFailed as error:
            await self._commit(changes.roll_back(committed.backends[name], old, str(error)))
            raise

    def update_backend_config(self, backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
        """Changes only what is set, live; returns once as many replicas as wanted are ready and follow it.

        Raises BackendFailed when the code refuses a new `user_config`; then the last good one is back.
        """
        self._call(self._update_backend_config(backend_tag, config_options))

    async def _update_backend_config(self, name: str, config: BackendConfig | dict[str, Any]) -> None:
        before = changes.find_backend(await self._read_desired(), name)
        committed = await self._commit(changes.update_backend_config(name, config))
        try:
            await self._until_ready(committed, name)
        except BackendFailed:
            await self._commit(changes.restore_user_config(committed.backends[name], before.config.user_config))
            raise

    def get_backend_config(self, backend_tag: str) -> BackendConfig:
        """Raises BadValue for an unknown backend."""
        return changes.find_backend(self._call(self._read_desired()), backend_tag).config

    def list_backends(self) -> dict[str, BackendConfig]:
        return {name: backend.config for name, backend in self._call(self._read_desired()).backends.items()}

    def delete_backend(self, backend_tag: str, force: bool = False) -> None:
        """Drains its queue and its replicas; returns when both are gone. `force`: what waits or runs is dropped.

        Raises BadValue while an endpoint uses it.
        """
        self._call(self._delete_backend(backend_tag, force=force))

    async def _delete_backend(self, name: str, *, force: bool = False) -> None:
        await self._commit(changes.delete_backend(name, force=force))

        async def is_gone() -> bool | None:
            observed = Observed.from_bytes(await self._links.store.get(self._links.keys.observed))
            held = {*observed.queues, *observed.retiring, *(assignment.backend for assignment in observed.replicas.values())}
            return None if name in held else True

        await self._until(is_gone, DELETE_BUDGET_S, f"backend {name!r} is not gone yet: its replicas are still draining")

    # Endpoints.

    def create_endpoint(
        self, endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ("GET",)
    ) -> None:
        """Sends traffic of a name, and of an HTTP route if there is one, to a backend; returns when all live proxies know it.

        Raises BadType and BadValue as the seed does: for a missing backend name, a bad route or method, what is taken or unknown.
        """
        endpoint = changes.parse_endpoint(endpoint_name, backend, route, methods)
        self._call(self._commit_to_proxies(changes.create_endpoint(endpoint)))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """`{name: {"route", "methods", "traffic", "shadows"}}`."""
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(endpoint.traffic),
                "shadows": dict(endpoint.shadows),
            }
            for name, endpoint in self._call(self._read_desired()).endpoints.items()
        }

    def delete_endpoint(self, endpoint: str) -> None:
        """Its backends stay; returns when all live proxies know it."""
        self._call(self._commit_to_proxies(changes.delete_endpoint(endpoint)))

    def set_traffic(self, endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
        """Splits the endpoint's requests over backends by weight (they sum to 1); returns when all live proxies follow. Shadows stay.

        Raises BadValue for an unknown endpoint or backend, a negative weight or another sum; BadType for what is no dict of numbers.
        """
        self._call(self._commit_to_proxies(changes.set_traffic(endpoint_name, traffic_policy_dictionary)))

    def shadow_traffic(self, endpoint_name: str, backend_tag: str, proportion: float) -> None:
        """Copies a share (0 to 1) of the endpoint's requests to a backend whose answers nobody sees; 0 ends it."""
        self._call(self._commit_to_proxies(changes.shadow_traffic(endpoint_name, backend_tag, proportion)))

    def register_convertor(self, name: str, convertor: Any) -> None:
        """A path convertor (a Starlette `Convertor` class or its import string) for routes: `{value:name}`."""
        packed = code.pack(convertor, (), self._signer)
        register_url_convertor(name, (code.load_import_string(convertor) if isinstance(convertor, str) else convertor)())
        self._call(self._register_convertor(name, packed))

    async def _register_convertor(self, name: str, packed: code.Code) -> None:
        await self._commit_to_proxies(changes.register_convertor(name, await code.save(self._links.store, self._links.keys, packed)))

    def set_middlewares(self, middlewares: Sequence[Any]) -> None:
        """Wraps all proxies in these, the first outermost: Starlette `Middleware` objects, or import strings of middleware classes."""
        self._call(self._set_middlewares(code.pack(list(middlewares), (), self._signer) if middlewares else None))

    async def _set_middlewares(self, packed: code.Code | None) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed) if packed is not None else ""
        await self._commit_to_proxies(changes.set_middlewares(sha256))

    # Requests.

    @overload
    def get_handle(self, endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...

    def get_handle(self, endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
        """A caller of the endpoint. Raises UnknownEndpoint unless `missing_ok`; then requests wait for it to be created."""
        if endpoint_name not in self._sender.desired.endpoints:
            self._sender.desired = self._call(self._read_desired())
            if endpoint_name not in self._sender.desired.endpoints and not missing_ok:
                raise UnknownEndpoint(f"Endpoint '{endpoint_name}' does not exist.")
        kind = Handle if sync else AsyncHandle
        return kind(endpoint_name, lambda: self.sender, missing_ok=missing_ok)

    def future(self, future_id: str, backend: str | None = None) -> Future:
        """The future of a request that anybody sent: a minted id by itself, a publisher's own `message_id` with its `backend`."""
        return self.sender.future(future_id, backend)

    def get(self, refs: Future | Sequence[Future], timeout: float | None = None) -> Any:
        return get(refs, timeout)

    def wait(self, refs: Sequence[Future], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Future], list[Future]]:
        return wait(refs, num_returns=num_returns, timeout=timeout)

    # The instance.

    def deploy(self, declaration: Declaration) -> None:
        """What `@serve.endpoint` recorded: a backend and an endpoint of one name."""
        self.create_backend(declaration.name, declaration.target, actor_options=declaration.actor_options, config=declaration.config)
        self.create_endpoint(declaration.name, backend=declaration.name, route=declaration.route, methods=declaration.methods)

    def http_url(self) -> str:
        """Where the instance's first live proxy listens, such as "http://127.0.0.1:8000"; empty without one."""
        beats = read_beats(self._call(self._links.store.fields(self._links.keys.beats))).values()
        return next((beat.url for beat in sorted(beats, key=lambda beat: beat.id) if beat.kind == "proxy" and beat.state == "ready"), "")

    def shutdown(self) -> None:
        """Ends the instance: proxies and replicas drain, queues and documents go. Idempotent; later calls raise InstanceError."""
        if not self._closed:
            self._closed = True
            self._end()

    # Waiting.

    def _call(self, work: Any) -> Any:
        self._check_open(work)
        return self._runtime.call(work)

    def _check_open(self, work: Any = None) -> None:
        if self._closed:
            if work is not None:
                work.close()
            raise InstanceError("Client has already been shut down.")

    async def _commit(self, change: changes.Change) -> Desired:
        self._sender.desired = await changes.commit(self._links.store, self._links.keys, self._instance, change)
        return self._sender.desired

    async def _commit_to_proxies(self, change: changes.Change) -> None:
        committed = await self._commit(change)
        version = (committed.epoch, committed.version)

        async def is_followed() -> bool | None:
            beats = read_beats(await self._links.store.fields(self._links.keys.beats)).values()
            now_ms = self._links.store.now_ms()
            proxies = [beat for beat in beats if beat.kind == "proxy" and beat.state == "ready" and now_ms - beat.at < 5000]
            return True if all(proxy.follows >= version for proxy in proxies) else None

        await self._until(is_followed, ROUTE_BUDGET_S, "the change is stored, but not all proxies follow it yet: see `mqserve status`")

    async def _read_desired(self) -> Desired:
        raw = await self._links.store.get(self._links.keys.desired)
        if raw is None:
            raise InstanceError("the instance has been shut down: start or connect again")
        return Desired.from_bytes(raw)

    async def _until_ready(self, committed: Desired, name: str) -> None:
        """As many assigned replicas of this version as wanted. Raises BackendFailed with the first failure's own words."""
        backend, seen = committed.backends[name], (committed.epoch, committed.version)
        config = backend.config
        since_ms = self._links.store.now_ms()

        async def is_ready() -> bool | None:
            observed = Observed.from_bytes(await self._links.store.get(self._links.keys.observed))
            beats = read_beats(await self._links.store.fields(self._links.keys.beats)).values()
            mine = [beat for beat in beats if beat.kind == "replica" and beat.backend == backend.name and beat.version == backend.version]
            for beat in mine:
                if beat.state == "failed" and beat.at >= since_ms:
                    raise BackendFailed(beat.error)
            if observed.seen >= seen and (problem := observed.problems.get(backend.name)):
                raise BackendFailed(f"backend {backend.name!r} does not get ready: {problem}")
            for beat in mine:
                if beat.refused and beat.follows[1] >= backend.config_version:
                    raise BackendFailed(beat.refused)
            ready = [
                beat
                for beat in mine
                if beat.state == "ready" and beat.id in observed.replicas and beat.follows[1] >= backend.config_version
            ]
            return True if len(ready) >= config.num_replicas else None

        late = f"backend {backend.name!r} was not ready within {config.start_timeout_s + READY_MARGIN_S:g} s"
        await self._until(is_ready, config.start_timeout_s + READY_MARGIN_S, late)

    async def _until(self, look: Callable[[], Awaitable[bool | None]], budget_s: float, late: str) -> None:
        try:
            await until(self._links.store, look, budget_s)
        except TimeoutError:
            observed = Observed.from_bytes(await self._links.store.get(self._links.keys.observed))
            why = "; ".join(f"{name}: {problem}" for name, problem in observed.problems.items())
            raise BackendFailed(f"{late} ({why or 'no reason was reported: is the controller alive?'})") from None


def _actor_options(options: dict[str, Any] | None, seed_options: dict[str, Any] | None, *, embedded: bool) -> ActorOptions:
    """`ray_actor_options` is an alias. Raises BadValue for what one process cannot give its replicas."""
    parsed = parse_actor_options(options if options is not None else seed_options)
    refused = {"num_gpus": parsed.demand.num_gpus, "python": parsed.python, "pip": parsed.pip}
    if embedded and any(refused.values()):
        names = ", ".join(name for name, value in refused.items() if value)
        raise BadValue(
            f"actor_options {names} cannot be had in the embedded form, where all replicas share one process: "
            "set MQSERVE_BROKER_URL and MQSERVE_STORE_URL"
        )
    return parsed


def _check_target(name: object, target: Any, init_args: tuple[Any, ...]) -> None:
    if not isinstance(name, str):
        raise BadType(f"a backend's name must be a str, not {type(name).__name__}")
    is_function = callable(target) and hasattr(target, "__code__")
    if not (isinstance(target, str | type) or is_function):
        raise BadType(
            f"backend {name!r} needs a function, a class or an import string 'pkg.mod:attr', not a {type(target).__name__}: "
            "wrap it in a function, or give its class and constructor arguments"
        )
    if is_function and init_args:
        raise BadValue(f"backend {name!r} is a function, which takes no constructor arguments: use a class, or leave them out")


def _check_fits(name: str, target: Any, config: BackendConfig) -> None:
    """What can be said before anything is sent; code named by an import string is checked where it is imported."""
    if isinstance(target, str):
        return
    if (config.max_batch_size or 1) > 1 and not accepts_batch(target):
        raise BadValue(f"backend {name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    if config.user_config is not None and not (isinstance(target, type) and hasattr(target, "reconfigure")):
        raise BadValue(f"backend {name!r} has a user_config but no reconfigure(user_config) to take it: use a class that has one")
