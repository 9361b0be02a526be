"""The client: one process's way to act on an instance. Every function of `mqserve` is a method here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from starlette.convertors import register_url_convertor

from .broker import code, forks
from .broker.caller import Caller
from .broker.errors import InstanceError, UnknownEndpoint
from .broker.queue_names import check_name
from .controller import desired as changes
from .controller.plan import living
from .controller.state import BackendConfig, follow_state, read_beats
from .declared import Declaration
from .deployments import Deployments, check_fits, check_target, read_actor_options
from .futures import Future, get, wait
from .handle import AsyncHandle, Handle
from .instance import parse_middlewares
from .links import Links, instance_has_ended
from .runtime import Runtime
from .sender import Sender

logger = logging.getLogger(__name__)
_opening = forks.Lock()  # of what a forked child opens for itself


@dataclass(frozen=True, slots=True)
class Opened:
    """What a client has in one process: a thread and connections, of which a forked child has none."""

    runtime: Runtime
    links: Links
    caller: Caller
    sender: Sender
    deployments: Deployments
    instance: str
    end: Callable[[], None]
    depth: int


class Client:
    """Made by `serve.start` and `serve.connect`. Its methods may be called from any thread; each waits for what it promises. In a forked
    child it opens connections of its own when it is first used there, or says that it cannot."""

    def __init__(self, runtime: Runtime, links: Links, instance: str, end: Callable[[], None], again: Callable[[], Client]) -> None:
        caller = Caller(links.queue, links.store, links.keys, links.process_id)
        sender = Sender(runtime, links, caller, lambda: self.sender)
        deployments = Deployments(links, instance, sender.follow)
        self._own = Opened(runtime, links, caller, sender, deployments, instance, end, forks.depth)
        self._again = again
        self._settings = links.settings
        self._signer = links.settings.signer
        self._depth = forks.depth
        self._closed = False
        self.has_ended = False  # somebody shut the instance down

    def __repr__(self) -> str:
        return f"<Client of {self._settings.namespace!r}{', shut down' if self._closed else ''}>"

    def __reduce__(self) -> Any:
        """Arrives as the client of the instance that is current there."""
        from .api import connect

        return connect, ()

    @property
    def sender(self) -> Sender:
        """For handles. Raises InstanceError once shut down."""
        return self._opened.sender

    @property
    def _opened(self) -> Opened:
        """Of this process. Raises InstanceError once shut down, and in a forked child that cannot have it."""
        self._check_open()
        if self._own.depth != forks.depth:
            with _opening:
                if self._own.depth != forks.depth:
                    self._own = self._again()._own
        return self._own

    @property
    def _links(self) -> Links:
        return self._opened.links

    @property
    def _deployments(self) -> Deployments:
        return self._opened.deployments

    @property
    def _is_inherited(self) -> bool:
        """Whether this process was forked since it was made."""
        return self._depth != forks.depth

    @property
    def _is_out_of_reach(self) -> bool:
        """Whether it acts on an embedded instance of another process."""
        return self._is_inherited and self._settings.embedded

    async def run(self) -> None:
        """Reads results and follows the desired document until cancelled; for whoever made the client."""
        own = self._own
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(own.caller.run())
            async for desired, _ in follow_state(own.links.store, own.links.keys):
                if desired is not None and desired.instance == own.instance:
                    own.sender.follow(desired)
                else:  # nothing, or another's, which came while this process was suspended
                    self.has_ended = desired is not None or await instance_has_ended(own.links, own.instance)

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
        options = read_actor_options(actor_options, ray_actor_options, embedded=self._settings.embedded)
        check_target(backend_tag, func_or_class, init_args)
        parsed = changes.parse_config(config)
        check_fits(backend_tag, func_or_class, parsed)
        check_name(backend_tag, "a backend")
        packed = code.pack(func_or_class, init_args, self._signer)
        self._call(self._deployments.create_backend(backend_tag, packed, parsed, options))

    def update_backend(
        self,
        backend_tag: str,
        func_or_class: Any,
        *init_args: Any,
        actor_options: dict[str, Any] | None = None,
        ray_actor_options: dict[str, Any] | None = None,
    ) -> None:
        """Rolls out new code: new replicas first, then the old ones drain.

        Raises BackendFailed when the new version does not get ready; the old one serves on.
        """
        options = None
        if actor_options is not None or ray_actor_options is not None:
            options = read_actor_options(actor_options, ray_actor_options, embedded=self._settings.embedded)
        check_target(backend_tag, func_or_class, init_args)
        packed = code.pack(func_or_class, init_args, self._signer)
        self._call(self._deployments.update_backend(backend_tag, packed, options))

    def update_backend_config(self, backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
        """Changes only what is set, live; returns once as many replicas as wanted are ready and follow it.

        Raises BackendFailed when the code refuses a new `user_config`; then the last good one is back.
        """
        self._call(self._deployments.update_backend_config(backend_tag, config_options))

    def get_backend_config(self, backend_tag: str) -> BackendConfig:
        """Raises BadValue for an unknown backend."""
        return changes.find_backend(self._call(self._deployments.read_desired()), backend_tag).config

    def list_backends(self) -> dict[str, BackendConfig]:
        return {name: backend.config for name, backend in self._call(self._deployments.read_desired()).backends.items()}

    def delete_backend(self, backend_tag: str, force: bool = False) -> None:
        """Drains its queue and its replicas; returns when both are gone. `force`: what waits or runs is dropped.

        Raises BadValue while an endpoint uses it.
        """
        self._call(self._deployments.delete_backend(backend_tag, force=force))

    # Endpoints.

    def create_endpoint(
        self, endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ("GET",)
    ) -> None:
        """Sends traffic of a name, and of an HTTP route if there is one, to a backend; returns when all live proxies know it.

        Raises BadType and BadValue as the seed does: for a missing backend name, a bad route or method, what is taken or unknown.
        """
        endpoint = changes.parse_endpoint(endpoint_name, backend, route, methods)
        self._call(self._deployments.commit_to_proxies(changes.create_endpoint(endpoint)))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """`{name: {"route", "methods", "traffic", "shadows"}}`."""
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(endpoint.traffic),
                "shadows": dict(endpoint.shadows),
            }
            for name, endpoint in self._call(self._deployments.read_desired()).endpoints.items()
        }

    def delete_endpoint(self, endpoint: str) -> None:
        """Its backends stay; returns when all live proxies know it."""
        self._call(self._deployments.commit_to_proxies(changes.delete_endpoint(endpoint)))

    def set_traffic(self, endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
        """Splits the endpoint's requests over backends by weight (they sum to 1); returns when all live proxies follow. Shadows stay.

        Raises BadValue for an unknown endpoint or backend, a negative weight or another sum; BadType for what is no dict of numbers.
        """
        self._call(self._deployments.commit_to_proxies(changes.set_traffic(endpoint_name, traffic_policy_dictionary)))

    def shadow_traffic(self, endpoint_name: str, backend_tag: str, proportion: float) -> None:
        """Copies a share (0 to 1) of the endpoint's requests to a backend whose answers nobody sees; 0 ends it."""
        self._call(self._deployments.commit_to_proxies(changes.shadow_traffic(endpoint_name, backend_tag, proportion)))

    def register_convertor(self, name: str, convertor: Any) -> None:
        """A path convertor (a Starlette `Convertor` class or its import string) for routes: `{value:name}`.

        Raises BackendFailed when a proxy cannot make it; then the last good one is back.
        """
        packed = code.pack(convertor, (), self._signer)
        made = (code.load_import_string(convertor) if isinstance(convertor, str) else convertor)()
        self._call(self._deployments.register_convertor(name, packed))
        register_url_convertor(name, made)

    def set_middlewares(self, middlewares: Sequence[Any]) -> None:
        """Wraps all proxies in these, the first outermost: Starlette `Middleware` objects, or import strings of middleware classes.

        Raises BackendFailed when a proxy cannot make them; then the last good ones are back.
        """
        parsed = parse_middlewares(middlewares)
        self._call(self._deployments.set_middlewares(code.pack(list(parsed), (), self._signer) if parsed else None))

    # Requests.

    @overload
    def get_handle(self, endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...

    def get_handle(self, endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
        """A caller of the endpoint. Raises UnknownEndpoint unless `missing_ok`; then requests wait for it to be created."""
        if endpoint_name not in self.sender.desired.endpoints:
            self.sender.desired = self._call(self._deployments.read_desired())
            if endpoint_name not in self.sender.desired.endpoints and not missing_ok:
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
        """Where the first live proxy listens, the instance's own before external ones: "http://127.0.0.1:8000"; empty without one."""
        beats = read_beats(self._call(self._links.store.fields(self._links.keys.beats)))
        proxies = living(beats, "proxy", self._links.store.now_ms()).values()
        return next((beat.url for beat in sorted(proxies, key=lambda beat: (beat.external, beat.id)) if beat.state == "ready"), "")

    def shutdown(self) -> None:
        """Ends the instance: proxies and replicas drain, queues and documents go. Idempotent; later calls raise InstanceError.

        Whoever joined the instance is told by an InstanceError where it still drains after all the time that its replicas may take.
        In a child that was forked since it was started or joined the instance goes on: only what the child has opened is closed.
        """
        if self._closed:
            return
        self._closed = True
        if self._is_inherited:
            logger.warning("shutdown() in a forked child closes what this process has opened; the instance is its parent's and goes on")
        if self._own.depth == forks.depth:
            self._own.end()

    # Waiting.

    def _call(self, work: Any) -> Any:
        return self._opened.runtime.call(work)

    def _check_open(self) -> None:
        if self._closed:
            raise InstanceError("Client has already been shut down.")
