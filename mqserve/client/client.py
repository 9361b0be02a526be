"""The client: one process's access to an instance. Every function of `mqserve` is a method here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Literal, Protocol, Self, overload

from starlette.convertors import register_url_convertor

from ..broker.backoff import keep_running
from ..broker.calls.sending import RequestSender
from ..broker.errors import BadType, InstanceError, UnknownEndpoint
from ..broker.process import forks
from ..broker.process.interrupts import to_the_end
from ..broker.queue_names import check_name
from ..broker.values import code
from ..broker.values.backend_code import Packed, pack_backend
from ..broker.values.main_module import RunFile
from ..connections import Connections
from ..controller import changes
from ..controller.state.beats import MemberState, ProxyBeat, living, read_beats
from ..controller.state.config import BackendConfig
from ..controller.state.documents import Desired
from ..controller.state.following import follow_state
from ..instance.starting import parse_middlewares
from ..replicas.context import check_not_importing
from .declared import Declaration
from .deployments import Deployments, check_fits, check_target, make_convertor, read_actor_options
from .futures import Future, get, wait
from .handle import Address, AsyncHandle, Handle
from .membership import Membership
from .runtime import Runtime
from .sender import Sender

logger = logging.getLogger(__name__)
_opening = forks.Lock()  # held while a forked child opens connections of its own


class Ending(Protocol):
    """Closes a client, or shuts its instance down."""

    def end(self, why: str, *, shuts_down: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """The part of a client that belongs to one process: a thread and connections, which a forked child does not have."""

    runtime: Runtime
    connections: Connections
    membership: Membership
    requests: RequestSender
    sender: Sender
    deployments: Deployments
    ending: Ending
    depth: int


class State(Enum):
    """The state of a client. A client that has ended stays so; the value is the message for its later users."""

    OPEN = ""
    CLOSED = "the client has been closed: call serve.connect(), and get handles and futures of the client that it returns"
    SHUT_DOWN = "Client has already been shut down."


CLOSED_MEANWHILE = "the client was closed meanwhile; a request that was sent goes on, and another client's future(id) reads its result"
SHUT_DOWN_MEANWHILE = "the client was shut down meanwhile: start or connect again"


class Client:
    """A client of one instance, made by `serve.start` and `serve.connect`. Its methods may be called from any thread; each returns once
    its change is in effect. In a forked child it opens connections of its own at its first use there, or raises an error that says why it
    cannot.

    A `with` block on the call that opened it ends what that call opened: `with serve.start()` the instance, unless that is detached, and
    `with serve.connect()` the client.
    """

    def __init__(
        self, runtime: Runtime, connections: Connections, membership: Membership, ending: Ending, again: Callable[[], Client]
    ) -> None:
        requests = RequestSender(connections.queue, connections.store, connections.keys, connections.process_id)
        sender = Sender(runtime, connections, requests, membership, lambda: self.sender)
        deployments = Deployments(connections, membership, self._follow)
        self._own = Opened(runtime, connections, membership, requests, sender, deployments, ending, forks.depth)
        self._again = again
        self._signer = connections.settings.signer
        self._depth = forks.depth
        self.settings = connections.settings
        self.run_file: RunFile | None = None  # the program's `__main__` under `mqserve run`, if replicas may execute it, too
        self.on_end: Callable[[], None] = lambda: None  # called when it is about to be closed or shut down
        self._state = State.OPEN
        self._is_shared = False  # whether a later call of start() or connect() returned it again
        self._blocks = 0  # number of `with` blocks on it that are still open
        self._ends_with_them = False
        self._lock = forks.Lock()  # guards the four fields below

    def __repr__(self) -> str:
        state = "" if self.is_open else f", {self._state.name.lower().replace('_', ' ')}"
        return f"<Client of {self.settings.namespace!r}{state}>"

    def __enter__(self) -> Self:
        self._check_open()
        with self._lock:
            self._blocks += 1
            self._ends_with_them = self._ends_with_them or not self._is_shared
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks or not self._ends_with_them:
                return
        if self.owns:
            self.shutdown()
        else:
            self.close()

    @property
    def address(self) -> Address:
        return Address(self.settings.namespace, self._own.membership.instance)

    @property
    def owns(self) -> bool:
        """Whether this process runs the instance, which then ends with it."""
        return self._own.membership.owns and not self.is_inherited

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_open(self) -> bool:
        return self._state is State.OPEN

    @property
    def has_ended(self) -> bool:
        """Whether the instance was shut down and, for a client that joined, no other one runs in its place."""
        return self._own.membership.has_ended and self._own.depth == forks.depth

    @property
    def sender(self) -> Sender:
        """The sender that handles use. Raises InstanceError once the client is closed or shut down."""
        return self._opened.sender

    @property
    def _opened(self) -> Opened:
        """The opened part in this process. Raises InstanceError once the client is closed or shut down, and in a forked child of the
        embedded form."""
        self._check_open()
        if self._own.depth != forks.depth:
            with _opening:
                if self._own.depth != forks.depth:
                    of_parent, self._own = self._own.sender, self._again()._own
                    self._own.sender.only_plain = of_parent.only_plain
        return self._own

    @property
    def _connections(self) -> Connections:
        return self._opened.connections

    @property
    def _deployments(self) -> Deployments:
        check_not_importing("a function that changes the instance")
        return self._opened.deployments

    @property
    def _membership(self) -> Membership:
        return self._opened.membership

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked after the client was made."""
        return self._depth != forks.depth

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the client belongs to an embedded instance in another process."""
        return self.is_inherited and self.settings.embedded

    def give_again(self) -> Self:
        """Returns the client to a later call of start() or connect(). From now on its `with` blocks do not close it, since other parts of
        the program use it. The block in which an instance was started still ends the instance."""
        with self._lock:
            self._is_shared = True
            self._ends_with_them = self._ends_with_them and self.owns
        return self

    async def run(self) -> None:
        """Reads results and follows the desired document until cancelled. Called by the session that made the client."""
        own = self._own
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(own.requests.run())
            await keep_running("the client's look at its instance", lambda: self._follow_forever(own))

    async def _follow_forever(self, own: Opened) -> None:
        async for desired, observed in follow_state(own.connections.store, own.connections.keys):
            own.sender.demands_seals = observed is not None and observed.sealed
            if await own.membership.saw(desired) and desired is not None:
                self._follow(desired)
            elif own.membership.has_ended:
                self._follow(Desired())

    async def stop_sending(self, why: str) -> None:
        """Makes later requests fail, and returns once all accepted ones are published. Called by the session that made the client."""
        self._own.sender.end(why)
        await self._own.requests.settle()

    def _follow(self, desired: Desired) -> None:
        self._own.sender.desired = desired
        self._own.requests.keep_paces(desired.backends)

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

        Raises BadValue for a name that is taken, a bad config, or arguments for a function; BadType for an object that is no function or
        class; NotEncodable for code that cannot be pickled; BackendFailed with the remote traceback if a replica does not get ready: the
        backend is then removed again.
        """
        options = read_actor_options(actor_options, ray_actor_options, embedded=self.settings.embedded)
        check_target(backend_tag, func_or_class, init_args)
        parsed = changes.parse_config(config)
        check_fits(backend_tag, func_or_class, parsed)
        check_name(backend_tag, "a backend")
        packed = self._pack(func_or_class, init_args)
        self._call(self._deployments.create_backend(backend_tag, packed, parsed, options))

    def update_backend(
        self,
        backend_tag: str,
        func_or_class: Any,
        *init_args: Any,
        actor_options: dict[str, Any] | None = None,
        ray_actor_options: dict[str, Any] | None = None,
    ) -> None:
        """Rolls out new code: new replicas start first, then the old ones drain.

        Raises BackendFailed if the new version does not get ready; the old one serves on.
        """
        options = None
        if actor_options is not None or ray_actor_options is not None:
            options = read_actor_options(actor_options, ray_actor_options, embedded=self.settings.embedded)
        check_target(backend_tag, func_or_class, init_args)
        packed = self._pack(func_or_class, init_args)
        self._call(self._deployments.update_backend(backend_tag, packed, options))

    def update_backend_config(self, backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
        """Changes only the given fields, live; returns once the wanted number of replicas is ready and follows the change.

        Raises BackendFailed if the code refuses a new `user_config`; the last good one is then restored.
        """
        self._call(self._deployments.update_backend_config(backend_tag, config_options))

    def get_backend_config(self, backend_tag: str) -> BackendConfig:
        """Returns the config of a backend. Raises BadValue for an unknown one."""
        return changes.find_backend(self._call(self._membership.read()), backend_tag).config

    def list_backends(self) -> dict[str, BackendConfig]:
        return {name: backend.config for name, backend in self._call(self._membership.read()).backends.items()}

    def delete_backend(self, backend_tag: str, force: bool = False) -> None:
        """Drains the backend's queue and replicas; returns when both are gone. With `force`, waiting and running requests are dropped.

        Raises BadValue while an endpoint uses the backend.
        """
        self._call(self._deployments.delete_backend(backend_tag, force=force))

    # Endpoints.

    def create_endpoint(
        self, endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ("GET",)
    ) -> None:
        """Creates an endpoint, with an HTTP route if one is given, whose traffic goes to a backend; returns when all live proxies know
        it.

        Raises BadType and BadValue as Ray Serve 1.x does: for a missing backend name, a bad route or method, a name or route that is
        taken, or an unknown backend. Raises BackendFailed if a proxy cannot match the route; the endpoint is then removed again.
        """
        endpoint = changes.parse_endpoint(endpoint_name, backend, route, methods)
        self._call(self._deployments.create_endpoint(endpoint))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Returns `{name: {"route", "methods", "traffic", "shadows"}}`."""
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(endpoint.traffic),
                "shadows": dict(endpoint.shadows),
            }
            for name, endpoint in self._call(self._membership.read()).endpoints.items()
        }

    def delete_endpoint(self, endpoint: str) -> None:
        """Deletes the endpoint, but not its backends; returns when all live proxies know that."""
        self._call(self._deployments.commit_to_proxies(changes.delete_endpoint(endpoint)))

    def set_traffic(self, endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
        """Splits the endpoint's requests over backends by weight (the weights sum to 1); returns when all live proxies follow. Shadows
        stay.

        Raises BadValue for an unknown endpoint or backend, a negative weight or another sum; BadType unless the policy is a dict of
        numbers.
        """
        self._call(self._deployments.commit_to_proxies(changes.set_traffic(endpoint_name, traffic_policy_dictionary)))

    def shadow_traffic(self, endpoint_name: str, backend_tag: str, proportion: float) -> None:
        """Copies a share (0 to 1) of the endpoint's requests to a backend, whose results are dropped; 0 ends that."""
        self._call(self._deployments.commit_to_proxies(changes.shadow_traffic(endpoint_name, backend_tag, proportion)))

    def register_convertor(self, name: str, convertor: Any) -> None:
        """Registers a path convertor (a Starlette `Convertor` class or its import string) for routes: `{value:name}`.

        Raises BadValue if it is no convertor, or if a route that uses the name could not be matched with it. Raises BackendFailed if a
        proxy cannot load it; the last good one is then restored.
        """
        packed = self._pack_for_all(convertor)
        made = make_convertor(convertor)
        self._call(self._deployments.register_convertor(name, packed, made))
        register_url_convertor(name, made)

    def set_middlewares(self, middlewares: Sequence[Any]) -> None:
        """Wraps all proxies in these middlewares, the first outermost: Starlette `Middleware` objects, or import strings of middleware
        classes.

        Raises BackendFailed if a proxy cannot build them; the last good ones are then restored.
        """
        parsed = parse_middlewares(middlewares)
        self._call(self._deployments.set_middlewares(self._pack_for_all(list(parsed)) if parsed else None))

    # Requests.

    @overload
    def get_handle(self, endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...

    def get_handle(self, endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
        """Returns a handle of the endpoint. Raises UnknownEndpoint for an unknown one; with `missing_ok` its requests wait for it to be
        created instead."""
        sender = self.sender
        if endpoint_name not in sender.desired.endpoints:
            found = self._call(self._membership.read())
            if endpoint_name in found.endpoints:
                sender.desired = found
            elif not missing_ok:
                raise UnknownEndpoint(f"Endpoint '{endpoint_name}' does not exist.")
        kind = Handle if sync else AsyncHandle
        return kind(endpoint_name, self, missing_ok=missing_ok)

    def future(self, future_id: str, backend: str | None = None) -> Future:
        """Returns the future of any request, by the id that mqserve minted or by a publisher's own `message_id` and its `backend`.

        Raises BadType for an id that is no str.
        """
        if not isinstance(future_id, str):
            raise BadType(f"the id of a request is a text of 32 characters, not {future_id!r}: see `ref.id`")
        return self.sender.future(future_id, backend)

    def get(self, refs: Future | Sequence[Future], timeout: float | None = None) -> Any:
        return get(refs, timeout)

    def wait(self, refs: Sequence[Future], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Future], list[Future]]:
        return wait(refs, num_returns=num_returns, timeout=timeout)

    # The instance.

    def deploy(self, declaration: Declaration) -> None:
        """Deploys a declaration of `@serve.endpoint`: a backend and an endpoint of the same name."""
        self.create_backend(declaration.name, declaration.target, actor_options=declaration.actor_options, config=declaration.config)
        self.create_endpoint(declaration.name, backend=declaration.name, route=declaration.route, methods=declaration.methods)

    def tell_complete(self) -> None:
        """Says that all that is declared is deployed: from now on `/-/readyz` may report ready."""
        self._call(self._deployments.commit_to_proxies(changes.complete))

    def http_url(self) -> str:
        """The URL of the first live proxy, the instance's own before external ones: "http://127.0.0.1:8000"; empty if there is none."""
        beats = read_beats(self._call(self._connections.store.fields(self._connections.keys.beats)))
        proxies = living(beats, ProxyBeat, self._connections.store.now_ms()).values()
        return next(
            (beat.url for beat in sorted(proxies, key=lambda beat: (beat.external, beat.id)) if beat.state is MemberState.READY), ""
        )

    def shutdown(self) -> None:
        """Ends the instance: proxies and replicas drain, queues and documents are deleted. Idempotent; later calls of other methods raise
        InstanceError.

        A client that joined the instance gets an InstanceError if it still drains after all the time that its replicas may take. Raises
        InstanceError if the client was closed. In a process forked since the client was opened, the instance goes on: only the
        connections of the forked child are closed.
        """
        if self._state is State.CLOSED:
            raise InstanceError("the client has been closed, and its instance runs on: the shutdown() of another client ends it")
        if self.is_inherited and self.is_open:
            logger.warning("shutdown() in a forked child closes what this process has opened; the instance is its parent's and goes on")
        with to_the_end():
            self._end(State.SHUT_DOWN, SHUT_DOWN_MEANWHILE, shuts_down=not self.is_inherited)

    def close(self) -> None:
        """Leaves the instance, which runs on. Idempotent. Later calls of other methods raise InstanceError, and so do pending waits for
        results.

        Raises InstanceError, and changes nothing, for a client whose instance would end with it.
        """
        if self.owns and self.is_open:
            raise InstanceError(
                "this process runs the instance, which would end with its client: call shutdown() if that is meant, or start the instance "
                "with detached=True or `mqserve start`"
            )
        self._end(State.CLOSED, CLOSED_MEANWHILE, shuts_down=False)

    def find_again(self) -> None:
        """Makes a client that joined, and whose instance has ended, go on with the next one. Raises InstanceError if there is none yet."""
        self._call(self._membership.find_again())

    def _end(self, state: State, why: str, *, shuts_down: bool) -> None:
        """Ends the client once. In a forked child there may be nothing to end."""
        with self._lock:
            if not self.is_open:
                return
            self._state = state
        self.on_end()
        if self._own.depth == forks.depth:
            self._own.ending.end(why, shuts_down=shuts_down)

    def _pack(self, target: Any, args: tuple[Any, ...]) -> Packed:
        if self.settings.embedded:
            return Packed(code.pack_here(target, args, self._signer))
        return pack_backend(target, args, self._signer, self.run_file)

    def _pack_for_all(self, target: Any) -> code.Code | code.CodeHere:
        """Packs code that processes of several clients load: no files travel with it."""
        pack = code.pack_here if self.settings.embedded else code.pack
        return pack(target, (), self._signer)

    # Waiting.

    def _call(self, work: Any) -> Any:
        return self._opened.runtime.call(work)

    def _check_open(self) -> None:
        if not self.is_open:
            raise InstanceError(self._state.value)
