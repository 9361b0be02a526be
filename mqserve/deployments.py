"""The slow half of a client: commits a change and waits until the instance has made it true, or undoes it and says why not."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from .broker import code
from .broker.documents import until
from .broker.errors import BackendFailed, BadType, BadValue, InstanceError, MQServeError
from .controller import desired as changes
from .controller.environments import seal_environment
from .controller.resources import ActorOptions, parse_actor_options
from .controller.state import Backend, BackendConfig, Desired, Observed, read_beats
from .links import Links
from .replicas.batching import accepts_batch

logger = logging.getLogger(__name__)

ROUTE_BUDGET_S = 30.0
DELETE_BUDGET_S = 60.0
READY_MARGIN_S = 15.0


class Deployments:
    """Lives on the runtime. `on_commit` is given each new version of the desired document."""

    def __init__(self, links: Links, instance: str, on_commit: Callable[[Desired], None]) -> None:
        self._links = links
        self._instance = instance
        self._on_commit = on_commit

    def __repr__(self) -> str:
        return f"<Deployments of {self._links.settings.namespace!r}>"

    async def create_backend(self, name: str, packed: code.Code, config: BackendConfig, options: ActorOptions) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed)
        backend = Backend(name, sha256, packed.name, config.model_dump(exclude_unset=True), self._sealed(name, options))
        committed = await self._commit(changes.create_backend(backend))
        try:
            await self._until_ready(committed, name)
        except BaseException:
            try:
                await self.delete_backend(name)
            except MQServeError as error:  # the reason why it did not get ready says more
                logger.warning("backend %s, which did not get ready, could not be deleted: %s", name, error)
            raise

    async def update_backend(self, name: str, packed: code.Code, options: ActorOptions | None) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed)
        sealed = None if options is None else self._sealed(name, options)  # what stays as it is keeps its seal, and gets none from us
        before: list[Backend] = []  # what each try replaces: a roll-back goes to the last one, and not past what others deployed meanwhile

        def change(desired: Desired) -> Desired:
            before.append(changes.find_backend(desired, name))
            return changes.update_backend(name, sha256, packed.name, sealed)(desired)

        committed = await self._commit(change)
        try:
            await self._until_ready(committed, name)
        except BackendFailed as error:
            await self._commit(changes.roll_back(committed.backends[name], before[-1], str(error)))
            raise

    async def update_backend_config(self, name: str, config: BackendConfig | dict[str, Any]) -> None:
        before = changes.find_backend(await self.read_desired(), name)
        committed = await self._commit(changes.update_backend_config(name, config))
        try:
            await self._until_ready(committed, name)
        except BackendFailed:
            await self._commit(changes.restore_user_config(committed.backends[name], before.config.user_config))
            raise

    async def delete_backend(self, name: str, *, force: bool = False) -> None:
        await self._commit(changes.delete_backend(name, force=force))

        async def is_gone() -> bool | None:
            observed = Observed.from_bytes(await self._links.store.get(self._links.keys.observed))
            held = {*observed.queues, *observed.retiring, *(assignment.backend for assignment in observed.replicas.values())}
            return None if name in held else True

        await self._until(is_gone, DELETE_BUDGET_S, f"backend {name!r} is not gone yet: its replicas are still draining")

    async def register_convertor(self, name: str, packed: code.Code) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed)
        before = (await self.read_desired()).convertors.get(name, "")
        await self.commit_to_proxies(changes.register_convertor(name, sha256), undo=_restore_convertor(name, sha256, before))

    async def set_middlewares(self, packed: code.Code | None) -> None:
        sha256 = await code.save(self._links.store, self._links.keys, packed) if packed is not None else ""
        before = (await self.read_desired()).http.middlewares
        await self.commit_to_proxies(changes.set_middlewares(sha256), undo=_restore_middlewares(sha256, before))

    def _sealed(self, backend: str, options: ActorOptions) -> ActorOptions:
        return seal_environment(options, backend, self._links.settings.signer)

    async def _commit(self, change: changes.Change) -> Desired:
        committed = await changes.commit(self._links.store, self._links.keys, self._instance, change)
        self._on_commit(committed)
        return committed

    async def commit_to_proxies(self, change: changes.Change, *, undo: changes.Change | None = None) -> None:
        """Returns once all live proxies follow. Raises BackendFailed with the words of one that cannot, after `undo` if there is one."""
        committed = await self._commit(change)
        version = (committed.epoch, committed.version)
        refused = ""

        async def is_answered() -> bool | None:
            nonlocal refused
            beats = read_beats(await self._links.store.fields(self._links.keys.beats)).values()
            now_ms = self._links.store.now_ms()
            proxies = [beat for beat in beats if beat.kind == "proxy" and beat.state == "ready" and now_ms - beat.at < 5000]
            refused = next((proxy.refused for proxy in proxies if proxy.refuses >= version), "")
            return True if refused or all(proxy.follows >= version for proxy in proxies) else None

        await self._until(is_answered, ROUTE_BUDGET_S, "the change is stored, but not all proxies follow it yet: see `mqserve status`")
        if refused:
            if undo is not None:
                await self._commit(undo)
            raise BackendFailed(f"a proxy cannot follow the change, which is {'undone' if undo else 'stored'}: {refused}")

    async def read_desired(self) -> Desired:
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
            has_its_queue = backend.generation <= max(observed.queues.get(backend.name, (0,)))  # the old one is unbound with that
            takes_old_code = any(other.backend == name and other.version < backend.version for other in observed.replicas.values())
            return True if has_its_queue and not takes_old_code and len(ready) >= config.num_replicas else None

        late = f"backend {backend.name!r} was not ready within {config.start_timeout_s + READY_MARGIN_S:g} s"
        await self._until(is_ready, config.start_timeout_s + READY_MARGIN_S, late)

    async def _until(self, look: Callable[[], Awaitable[bool | None]], budget_s: float, late: str) -> None:
        try:
            await until(self._links.store, look, budget_s)
        except TimeoutError:
            observed = Observed.from_bytes(await self._links.store.get(self._links.keys.observed))
            beats = read_beats(await self._links.store.fields(self._links.keys.beats)).values()
            told = {beat.id: beat.error for beat in beats if beat.kind == "replica" and beat.error}
            why = "; ".join(f"{name}: {problem}" for name, problem in {**told, **observed.problems}.items())
            raise BackendFailed(f"{late} ({why or 'no reason was reported: is the controller alive?'})") from None


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
    if is_function and not _takes_one(target):
        raise BadValue(f"backend {name!r} is a function that takes no request: give it one parameter, such as def handler(request)")
    if is_function and init_args:
        raise BadValue(f"backend {name!r} is a function, which takes no constructor arguments: use a class, or leave them out")


def _takes_one(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # it has none to look at
        return True
    return True


def check_fits(name: str, target: Any, config: BackendConfig) -> None:
    """What can be said before anything is sent; code named by an import string is checked where it is imported."""
    if isinstance(target, str):
        return
    if (config.max_batch_size or 1) > 1 and not accepts_batch(target):
        raise BadValue(f"backend {name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    if config.user_config is not None and not (isinstance(target, type) and hasattr(target, "reconfigure")):
        raise BadValue(f"backend {name!r} has a user_config but no reconfigure(user_config) to take it: use a class that has one")
