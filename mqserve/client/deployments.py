"""The slow half of a client: commits a change and waits until the instance has made it true, or undoes it and says why not."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import msgspec
from starlette.convertors import Convertor

from ..broker.documents import until
from ..broker.errors import BackendFailed, BadSignature, BadType, BadValue, MQServeError
from ..broker.values import backend_code, code
from ..broker.values.backend_code import Packed
from ..connections import Connections
from ..controller import changes
from ..controller.environments import check_environment, seal_environment
from ..controller.state.beats import MemberState, ProxyBeat, ReplicaBeat, beats_of, living, read_beats
from ..controller.state.config import BackendConfig
from ..controller.state.documents import Backend, Desired, Endpoint, Observed
from ..controller.state.resources import ActorOptions, parse_actor_options
from ..replicas.batch_decorators import accepts_batch
from ..replicas.handler import make_method
from .membership import Membership

logger = logging.getLogger(__name__)

ROUTE_BUDGET_S = 30.0
DELETE_BUDGET_S = 60.0
READY_MARGIN_S = 15.0


class Deployments:
    """Lives on the runtime. `on_commit` is given each new version of the desired document."""

    def __init__(self, connections: Connections, membership: Membership, on_commit: Callable[[Desired], None]) -> None:
        self._connections = connections
        self._membership = membership
        self._on_commit = on_commit

    def __repr__(self) -> str:
        return f"<Deployments of {self._connections.settings.namespace!r}>"

    async def create_backend(self, name: str, packed: Packed, config: BackendConfig, options: ActorOptions) -> None:
        sha256 = await backend_code.save(self._connections.store, self._connections.keys, packed)
        backend = Backend(name, sha256, packed.code.name, config.model_dump(exclude_unset=True), self._sealed(name, options))
        committed = await self._commit(changes.create_backend(backend))
        try:
            await self._until_ready(committed, name)
        except BaseException:
            try:
                await self.delete_backend(name)
            except MQServeError as error:  # the reason why it did not get ready says more
                logger.warning("backend %s, which did not get ready, could not be deleted: %s", name, error)
            raise

    async def update_backend(self, name: str, packed: Packed, options: ActorOptions | None) -> None:
        sha256 = await backend_code.save(self._connections.store, self._connections.keys, packed)
        before: list[Backend] = []  # what each try replaces: a roll-back goes to the last one, and not past what others deployed meanwhile

        def change(desired: Desired) -> Desired:
            before.append(changes.find_backend(desired, name))
            sealed = self._sealed(name, options) if options is not None else self._sealed_anew(before[-1])
            return changes.update_backend(name, sha256, packed.code.name, sealed)(desired)

        committed = await self._commit(change)
        try:
            await self._until_ready(committed, name)
        except BackendFailed as error:
            await self._commit(changes.roll_back(committed.backends[name], before[-1], str(error)))
            raise
        await self._let_go(before[-1:])

    async def update_backend_config(self, name: str, config: BackendConfig | dict[str, Any]) -> None:
        before = changes.find_backend(await self._membership.read(), name)
        committed = await self._commit(changes.update_backend_config(name, config))
        try:
            await self._until_ready(committed, name)
        except BackendFailed:
            await self._commit(changes.restore_user_config(committed.backends[name], before.config.user_config))
            raise

    async def delete_backend(self, name: str, *, force: bool = False) -> None:
        graceful_s = 0.0
        before: list[Backend] = []

        def change(desired: Desired) -> Desired:
            nonlocal graceful_s
            before[:] = [backend for backend in desired.backends.values() if backend.name == name]
            if backend := desired.backends.get(name):
                graceful_s = backend.config.graceful_shutdown_timeout_s
            return changes.delete_backend(name, force=force)(desired)

        committed = await self._commit(change)

        async def is_gone() -> bool | None:
            observed = Observed.from_bytes(await self._connections.store.get(self._connections.keys.observed))
            held = {*observed.queues, *observed.retiring, *(assignment.backend for assignment in observed.replicas.values())}
            return None if name in held else True

        await self._until(
            committed, is_gone, graceful_s + DELETE_BUDGET_S, f"backend {name!r} is not gone yet: its replicas are still draining"
        )
        await self._let_go(before)

    async def _let_go(self, backends: Sequence[Backend]) -> None:
        """Deletes code of the embedded form, whose records hold the program's objects. No later deployment has the same hash."""
        if self._connections.settings.embedded:
            await self._connections.store.delete(*(self._connections.keys.code(backend.code) for backend in backends))

    async def create_endpoint(self, endpoint: Endpoint) -> None:
        await self.commit_to_proxies(changes.create_endpoint(endpoint), undo=_remove_endpoint(endpoint))

    async def register_convertor(self, name: str, packed: code.Code | code.CodeHere, convertor: Convertor[Any]) -> None:
        sha256 = await code.save_for_all(self._connections.store, self._connections.keys, packed)
        before = (await self._membership.read()).convertors.get(name, "")
        change = changes.register_convertor(name, sha256, convertor)
        await self.commit_to_proxies(change, undo=_restore_convertor(name, sha256, before))

    async def set_middlewares(self, packed: code.Code | code.CodeHere | None) -> None:
        sha256 = await code.save_for_all(self._connections.store, self._connections.keys, packed) if packed is not None else ""
        before = (await self._membership.read()).http.middlewares
        await self.commit_to_proxies(changes.set_middlewares(sha256), undo=_restore_middlewares(sha256, before))

    def _sealed(self, backend: str, options: ActorOptions) -> ActorOptions:
        return seal_environment(options, backend, self._connections.settings.signer)

    def _sealed_anew(self, backend: Backend) -> ActorOptions:
        """With the key of today, if a key of ours sealed them: what somebody else put there gets no seal from us."""
        try:
            check_environment(backend.options, backend.name, self._connections.settings.signer)
        except BadSignature:
            return backend.options
        return self._sealed(backend.name, backend.options)

    async def _commit(self, change: changes.Change) -> Desired:
        committed = await self._membership.commit(change)
        self._on_commit(committed)
        return committed

    async def commit_to_proxies(self, change: changes.Change, *, undo: changes.Change | None = None) -> None:
        """Returns once all live proxies follow. Raises BackendFailed with the words of one that cannot, after `undo` if there is one."""
        committed = await self._commit(change)
        version = (committed.epoch, committed.version)
        refused = ""

        async def is_answered() -> bool | None:
            nonlocal refused
            beats = read_beats(await self._connections.store.fields(self._connections.keys.beats))
            alive = living(beats, ProxyBeat, self._connections.store.now_ms()).values()
            proxies = [beat for beat in alive if beat.state is MemberState.READY]
            refused = next((proxy.refused for proxy in proxies if proxy.refuses >= version), "")
            return True if refused or all(proxy.follows >= version for proxy in proxies) else None

        late = "the change is stored, but not all proxies follow it yet: see `mqserve status`"
        await self._until(committed, is_answered, ROUTE_BUDGET_S, late)
        if refused:
            if undo is not None:
                await self._commit(undo)
            raise BackendFailed(f"a proxy cannot follow the change, which is {'undone' if undo else 'stored'}: {refused}")

    async def _until_ready(self, committed: Desired, name: str) -> None:
        """As many assigned replicas of this version as wanted. Raises BackendFailed with the first failure's own words."""
        backend, seen = committed.backends[name], (committed.epoch, committed.version)
        config = backend.config
        since_ms = self._connections.store.now_ms()

        async def is_ready() -> bool | None:
            observed = Observed.from_bytes(await self._connections.store.get(self._connections.keys.observed))
            beats = read_beats(await self._connections.store.fields(self._connections.keys.beats))
            mine = [beat for beat in beats_of(beats, ReplicaBeat) if beat.backend == backend.name and beat.version == backend.version]
            for beat in mine:
                if beat.state is MemberState.FAILED and beat.at >= since_ms:
                    raise BackendFailed(beat.error)
            if observed.seen >= seen and (problem := observed.problems.get(backend.name)):
                raise BackendFailed(f"backend {backend.name!r} does not get ready: {problem}")
            for beat in mine:
                if beat.refused and beat.follows[1] >= backend.config_version:
                    raise BackendFailed(beat.refused)
            ready = [
                beat
                for beat in mine
                if beat.state is MemberState.READY and beat.id in observed.replicas and beat.follows[1] >= backend.config_version
            ]
            has_its_queue = backend.generation <= max(observed.queues.get(backend.name, (0,)))  # the old one is unbound with that
            takes_old_code = any(other.backend == name and other.version < backend.version for other in observed.replicas.values())
            return True if has_its_queue and not takes_old_code and len(ready) >= config.num_replicas else None

        late = f"backend {backend.name!r} was not ready within {config.start_timeout_s + READY_MARGIN_S:g} s"
        await self._until(committed, is_ready, config.start_timeout_s + READY_MARGIN_S, late)

    async def _until(self, committed: Desired, look: Callable[[], Awaitable[bool | None]], budget_s: float, late: str) -> None:
        """As long as there is the instance in which the change was made."""

        async def look_while_it_goes_on() -> bool | None:
            found = await look()
            if found is None:
                await self._membership.check_goes_on(committed)
            return found

        try:
            await until(self._connections.store, look_while_it_goes_on, budget_s)
        except TimeoutError:
            observed = Observed.from_bytes(await self._connections.store.get(self._connections.keys.observed))
            beats = read_beats(await self._connections.store.fields(self._connections.keys.beats))
            told = {beat.id: beat.error for beat in beats_of(beats, ReplicaBeat) if beat.error}
            why = "; ".join(f"{name}: {problem}" for name, problem in {**told, **observed.problems}.items())
            raise BackendFailed(f"{late} ({why or 'no reason was reported: is the controller alive?'})") from None


def make_convertor(convertor: Any) -> Convertor[Any]:
    """Raises BadType for what is neither a class nor the import string of one, and what importing and making it raises."""
    kind = code.load_import_string(convertor) if isinstance(convertor, str) else convertor
    if not callable(kind):
        raise BadType(f"a convertor is a Starlette Convertor class or its import string 'pkg.mod:Class', and {convertor!r} is neither")
    return cast("Convertor[Any]", kind())


def _remove_endpoint(refused: Endpoint) -> changes.Change:
    """Unless somebody deleted it meanwhile, and made another of its name."""

    def change(desired: Desired) -> Desired:
        found = desired.endpoints.get(refused.name)
        return changes.delete_endpoint(refused.name)(desired) if found is not None and found.route == refused.route else desired

    return change


def _restore_middlewares(refused: str, before: str) -> changes.Change:
    """The last good ones, unless somebody set others meanwhile."""

    def change(desired: Desired) -> Desired:
        return changes.set_middlewares(before)(desired) if desired.http.middlewares == refused else desired

    return change


def _restore_convertor(name: str, refused: str, before: str) -> changes.Change:
    """The last good one, or none, unless somebody registered another meanwhile."""

    def change(desired: Desired) -> Desired:
        if desired.convertors.get(name) != refused:
            return desired
        others = {kept: sha256 for kept, sha256 in desired.convertors.items() if kept != name}
        return msgspec.structs.replace(desired, convertors={**others, name: before} if before else others)

    return change


def read_actor_options(options: dict[str, Any] | None, seed_options: dict[str, Any] | None, *, embedded: bool) -> ActorOptions:
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


def check_target(name: object, target: Any, init_args: tuple[Any, ...]) -> None:
    if not isinstance(name, str):
        raise BadType(f"a backend's name must be a str, not {type(name).__name__}")
    is_function = callable(target) and hasattr(target, "__code__")
    if not (isinstance(target, str | type) or is_function):
        raise BadType(
            f"backend {name!r} needs a function, a class or an import string 'pkg.mod:attr', not a {type(target).__name__}: "
            "wrap it in a function, or give its class and constructor arguments"
        )
    if is_function:
        _check_signature(name, target)
    if is_function and init_args:
        raise BadValue(f"backend {name!r} is a function, which takes no constructor arguments: use a class, or leave them out")


def _check_signature(name: str, function: Any) -> None:
    try:
        make_method(function)
    except BadType as error:
        raise BadValue(f"backend {name!r} cannot be called: {error}") from error


def check_fits(name: str, target: Any, config: BackendConfig) -> None:
    """What can be said before anything is sent; code named by an import string is checked where it is imported."""
    if isinstance(target, str):
        return
    if (config.max_batch_size or 1) > 1 and not accepts_batch(target):
        raise BadValue(f"backend {name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    if config.user_config is not None and not (isinstance(target, type) and hasattr(target, "reconfigure")):
        raise BadValue(f"backend {name!r} has a user_config but no reconfigure(user_config) to take it: use a class that has one")
