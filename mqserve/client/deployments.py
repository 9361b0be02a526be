"""The slow half of a client: commits a change and waits until the instance has made it true, or undoes it and says why not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.convertors import Convertor

from ..broker.documents import until
from ..broker.errors import BackendFailed, BadSignature, BadType, BadValue, MQServeError
from ..broker.values import backend_code, code
from ..broker.values.backend_code import Packed
from ..connections import Connections
from ..controller import changes
from ..controller.environments import check_environment, seal_environment
from ..controller.pipeline_changes import create_pipeline, delete_pipeline
from ..controller.schedule_changes import Now, delete_schedule, pause_schedule, resume_schedule, set_schedule
from ..controller.state.beats import MemberState, read_beats
from ..controller.state.config import BackendConfig
from ..controller.state.documents import Backend, CodeKind, Desired, Endpoint, Schedule
from ..controller.state.reading import read_observed
from ..controller.state.resources import ActorOptions
from ..controller.undoing import undo
from .effects import DELETE_BUDGET_S, READY_MARGIN_S, ROUTE_BUDGET_S, Awaited, Refusal, Seen, listed
from .membership import Membership

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_EVERY_S = 5.0

TellReady = Callable[[str, float], None]
"""Called with the name of a backend that got ready, and with the seconds that this took."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One change that is committed together with others: how its caller wrote it, and the code that it names."""

    words: str
    change: changes.Change
    backend_code: Packed | None = None
    proxy_code: code.Code | code.CodeHere | None = None
    goes_first: bool = False  # it takes time and is in no caller's way: a change of a backend, a convertor that no route can use yet
    comes_last: bool = False  # it needs what the file of `mqserve run` declares only at its end


class _Step:
    """Changes that one commit makes, and what that commit replaces by what: of the last try, since others may have committed before."""

    def __init__(self, declared: Sequence[Declared]) -> None:
        self._declared = declared
        self.before = self.made = Desired()
        self.was_tried = False  # it may have been committed

    def __repr__(self) -> str:
        return f"<_Step of {len(self._declared)}>"

    def change(self, desired: Desired) -> Desired:
        self.before, self.made = desired, apply(self._declared, desired)
        self.was_tried = True
        return self.made


class Deployments:
    """Lives on the runtime. `on_commit` is given each new version of the desired document."""

    def __init__(self, connections: Connections, membership: Membership, on_commit: Callable[[Desired], None]) -> None:
        self._connections = connections
        self._membership = membership
        self._on_commit = on_commit

    def __repr__(self) -> str:
        return f"<Deployments of {self._connections.settings.namespace!r}>"

    async def read(self) -> Desired:
        return await self._membership.read()

    async def create_backend(self, name: str, packed: Packed, kind: CodeKind, config: BackendConfig, options: ActorOptions) -> None:
        await self._save(packed)
        committed = await self._commit(changes.create_backend(self.new_backend(name, packed, kind, config, options)))
        try:
            await self._until_ready(committed, name)
            await self._tell_kinds(committed)
        except BaseException:
            try:
                await self.delete_backend(name)
            except MQServeError as error:  # the reason why it did not get ready says more
                logger.warning("backend %s, which did not get ready, could not be deleted: %s", name, error)
            raise

    async def update_backend(self, name: str, packed: Packed, kind: CodeKind, options: ActorOptions | None) -> None:
        await self._save(packed)
        before: list[Backend] = []  # what each try replaces: a roll-back goes to the last one, and not past what others deployed meanwhile
        update = self.new_code(name, packed, kind, options)

        def change(desired: Desired) -> Desired:
            before.append(changes.find_backend(desired, name))
            return update(desired)

        committed = await self._commit(change)
        try:
            await self._until_ready(committed, name)
        except BackendFailed as error:
            await self._commit(changes.roll_back(committed.backends[name], before[-1], str(error)))
            raise
        await self._tell_kinds(committed)
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
            return True if (await self._see()).is_gone(name) else None

        await self._until(
            committed, is_gone, graceful_s + DELETE_BUDGET_S, f"backend {name!r} is not gone yet: its replicas are still draining"
        )
        await self._let_go(before)

    async def deploy(self, declared: Sequence[Declared], tell: TellReady) -> None:
        """Makes these changes together, and returns when all of them are in effect; if one cannot be, all are undone. `tell` is called for
        each backend that gets ready.

        Backends and new convertors are committed first, and once they are ready the rest: so no request goes to a backend that is not there
        yet, or has parameters that its replica cannot convert, and callers see either nothing of it or all. Raises BackendFailed, and any
        error of a change, with the words of its declaration.
        """
        declared = sorted(declared, key=lambda one: one.comes_last)
        await self._save(*[one.backend_code for one in declared if one.backend_code is not None])
        for one in declared:
            if one.proxy_code is not None:
                await self._save_for_all(one.proxy_code)
        apply(declared, await self.read())  # an error in the second step would come late
        steps: list[_Step] = []
        try:
            if first := [one for one in declared if one.goes_first]:
                steps.append(_Step(first))
                await self._tell_kinds(await self._take(steps[-1], tell))
            if others := [one for one in declared if not one.goes_first]:
                steps.append(_Step(others))
                await self._take(steps[-1], tell)
        except BaseException as error:
            tried = [step for step in steps if step.was_tried]
            failure = await _whatever_comes(self._undo(tried, str(error) or "its deployment was interrupted")) if tried else ""
            if failure and isinstance(error, MQServeError):
                raise BackendFailed(f"{error} (and what was made until then could not be undone: {failure})") from error
            raise
        named = {backend.code for backend in steps[-1].made.backends.values()} if steps else set()
        passed = [backend for step in steps for seen in (step.before, step.made) for backend in seen.backends.values()]
        await self._let_go([backend for backend in passed if backend.code not in named])

    async def _take(self, step: _Step, tell: TellReady) -> Desired:
        committed = await self._commit(step.change)
        version, now_ms = (committed.epoch, committed.version), self._connections.store.now_ms()
        await self._until_in_effect(committed, Awaited(step.before, step.made, version, now_ms), tell)
        return committed

    async def _tell_kinds(self, committed: Desired) -> None:
        """Notes of named code whether its replicas, which are ready, have found it to be an ASGI app: later endpoints depend on it."""
        named = {name: backend.version for name, backend in committed.backends.items() if backend.kind is CodeKind.NAMED}
        if not named:
            return
        replicas = (await self._see()).replicas()
        found: dict[str, tuple[int, CodeKind]] = {}
        for name, version in named.items():
            ready = [beat for beat in replicas.get(name, ()) if beat.version == version and beat.state is MemberState.READY]
            if ready:
                found[name] = version, CodeKind.APP if ready[0].is_app else CodeKind.HANDLER
        if found:
            await self._commit(changes.tell_kinds(found))

    async def _until_in_effect(self, committed: Desired, awaited: Awaited, tell: TellReady) -> None:
        began = told_at = time.monotonic()

        async def look() -> bool | None:
            nonlocal told_at
            for name in awaited.look(await self._see()):
                tell(name, time.monotonic() - began)
            if awaited.is_over:
                return True
            if time.monotonic() - told_at > PROGRESS_EVERY_S:
                told_at = time.monotonic()
                logger.info("deploying for %.0f s: %s", told_at - began, awaited.names())
            return None

        await self._until(committed, look, awaited.budget_s, f"not all was in effect within {awaited.budget_s:g} s", awaited.names)

    async def _undo(self, steps: Sequence[_Step], reason: str) -> str:
        """Also waits until new backends are gone, so that their names are free again. Returns why it could not be done, or an empty
        string."""

        def change(desired: Desired) -> Desired:
            for step in reversed(steps):
                desired = undo(step.before, step.made, reason)(desired)
            return desired

        try:
            left = await self._commit(change)
            made = [backend for step in steps for name, backend in step.made.backends.items() if name not in step.before.backends]
            undone = [backend for backend in made if backend.name not in left.backends]
            drain_s = max((backend.config.graceful_shutdown_timeout_s for backend in undone), default=0.0)

            async def are_gone() -> bool | None:
                seen = await self._see()
                return True if all(seen.is_gone(backend.name) for backend in undone) else None

            await self._until(left, are_gone, drain_s + DELETE_BUDGET_S, "what was undone still drains")
            await self._let_go(undone)
        except MQServeError as failure:
            logger.warning(
                "a deployment that failed was not undone in order: %s; `mqserve status` shows what is left, and delete_endpoint and "
                "delete_backend remove it", failure,
            )  # fmt: skip
            return str(failure)
        return ""

    async def _let_go(self, backends: Sequence[Backend]) -> None:
        """Deletes code of the embedded form, whose records hold the program's objects. No later deployment has the same hash."""
        if self._connections.settings.embedded:
            await self._connections.store.delete(*(self._connections.keys.code(backend.code) for backend in backends))

    async def create_endpoint(self, endpoint: Endpoint) -> None:
        await self._commit_to_proxies(changes.create_endpoint(endpoint), undo=_remove_endpoint(endpoint))

    async def delete_endpoint(self, name: str) -> None:
        await self._commit_to_proxies(changes.delete_endpoint(name))

    async def create_pipeline(self, pipeline: Endpoint) -> None:
        await self._commit_to_proxies(create_pipeline(pipeline), undo=_remove_endpoint(pipeline))

    async def delete_pipeline(self, name: str) -> None:
        await self._commit_to_proxies(delete_pipeline(name))

    async def set_traffic(self, name: str, traffic: object) -> None:
        await self._commit_to_proxies(changes.set_traffic(name, traffic))

    async def shadow_traffic(self, name: str, backend: str, proportion: object) -> None:
        await self._commit_to_proxies(changes.shadow_traffic(name, backend, proportion))

    async def set_schedule(self, schedule: Schedule, now: Now) -> None:
        await self._commit(set_schedule(schedule, now))

    async def pause_schedule(self, name: str) -> None:
        await self._commit(pause_schedule(name))

    async def resume_schedule(self, name: str, now: Now) -> None:
        await self._commit(resume_schedule(name, now))

    async def delete_schedule(self, name: str) -> None:
        await self._commit(delete_schedule(name))

    async def complete(self) -> None:
        await self._commit_to_proxies(changes.complete)

    async def register_convertor(self, name: str, packed: code.Code | code.CodeHere, convertor: Convertor[Any]) -> None:
        sha256 = await self._save_for_all(packed)
        before = (await self._membership.read()).convertors.get(name, "")
        change = changes.register_convertor(name, sha256, convertor)
        await self._commit_to_proxies(change, undo=_restore_convertor(name, sha256, before), of_convertors=True)

    async def set_middlewares(self, packed: code.Code | code.CodeHere | None) -> None:
        sha256 = await self._save_for_all(packed) if packed is not None else ""
        before = (await self._membership.read()).http.middlewares
        await self._commit_to_proxies(changes.set_middlewares(sha256), undo=_restore_middlewares(sha256, before))

    def new_backend(self, name: str, packed: Packed, kind: CodeKind, config: BackendConfig, options: ActorOptions) -> Backend:
        settings, sealed = config.model_dump(exclude_unset=True), self._sealed(name, options)
        return Backend(name, packed.code.sha256, packed.code.name, settings, sealed, kind=kind)

    def new_code(self, name: str, packed: Packed, kind: CodeKind, options: ActorOptions | None) -> changes.Change:
        def change(desired: Desired) -> Desired:
            sealed = self._sealed(name, options) if options is not None else self._sealed_anew(changes.find_backend(desired, name))
            return changes.update_backend(name, packed.code.sha256, packed.code.name, kind, sealed)(desired)

        return change

    async def _save(self, *packed: Packed) -> None:
        await backend_code.save(self._connections.store, self._connections.keys, *packed)

    async def _save_for_all(self, packed: code.Code | code.CodeHere) -> str:
        return await code.save_for_all(self._connections.store, self._connections.keys, packed)

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

    async def _commit_to_proxies(self, change: changes.Change, *, undo: changes.Change | None = None, of_convertors: bool = False) -> None:
        """Returns once all live proxies follow, and with `of_convertors` all replicas have learned them. Raises BackendFailed with the
        words of a member that cannot, after `undo` if there is one."""
        committed = await self._commit(change)
        version = (committed.epoch, committed.version)
        refusal: Refusal | None = None
        behind: list[str] = []

        async def is_answered() -> bool | None:
            nonlocal refusal, behind
            seen = await self._see()
            refusal, behind = seen.refusal(version, of_convertors=of_convertors), seen.behind(version, of_convertors=of_convertors)
            return True if refusal or not behind else None

        late = "the change is stored, but not in effect everywhere yet: see `mqserve status`"
        await self._until(committed, is_answered, ROUTE_BUDGET_S, late, lambda: listed(behind))
        if refusal:
            if undo is not None:
                await self._commit(undo)
            raise BackendFailed(f"{refusal.member} cannot follow the change, which is {'undone' if undo else 'stored'}: {refusal.words}")

    async def _until_ready(self, committed: Desired, name: str) -> None:
        """Raises BackendFailed with the first failure's own words."""
        backend, version = committed.backends[name], (committed.epoch, committed.version)
        config = backend.config
        since_ms = self._connections.store.now_ms()
        unaware: list[str] = []

        async def is_ready() -> bool | None:
            seen = await self._see()
            replicas = seen.replicas().get(name, [])
            unaware[:] = seen.unaware(backend, replicas)
            return True if seen.is_ready(backend, version, since_ms, replicas) else None

        late = f"backend {backend.name!r} was not ready within {config.start_timeout_s + READY_MARGIN_S:g} s"
        await self._until(committed, is_ready, config.start_timeout_s + READY_MARGIN_S, late, lambda: listed(unaware))

    async def _see(self) -> Seen:
        store, keys = self._connections.store, self._connections.keys
        observed = read_observed(await store.get(keys.observed))
        return Seen(observed, read_beats(await store.fields(keys.beats)), store.now_ms())

    async def _until(
        self,
        committed: Desired,
        look: Callable[[], Awaitable[bool | None]],
        budget_s: float,
        late: str,
        missing: Callable[[], str] = str,
    ) -> None:
        """As long as there is the instance in which the change was made. `missing` names what is still awaited."""

        async def look_while_it_goes_on() -> bool | None:
            found = await look()
            if found is None:
                await self._membership.check_goes_on(committed)
            return found

        try:
            await until(self._connections.store, look_while_it_goes_on, budget_s)
        except TimeoutError:
            why = "; ".join(filter(None, (missing(), (await self._see()).reasons())))
            raise BackendFailed(f"{late} ({why or 'no reason was reported: is the controller alive?'})") from None


def apply(declared: Sequence[Declared], desired: Desired) -> Desired:
    """Returns the document with all of these changes, in order. Raises an error of a change with the words of its declaration."""
    for one in declared:
        try:
            desired = one.change(desired)
        except (BadValue, BadType) as error:
            raise type(error)(f"{one.words}: {error}") from error
    return desired


def _remove_endpoint(refused: Endpoint) -> changes.Change:
    """Unless somebody deleted it meanwhile, and made another of its name."""

    def change(desired: Desired) -> Desired:
        found = desired.endpoints.get(refused.name)
        is_refused = found is not None and (found.route or "").rstrip("/") == (refused.route or "").rstrip("/")
        delete = delete_pipeline if refused.stages else changes.delete_endpoint
        return delete(refused.name)(desired) if is_refused else desired

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


async def _whatever_comes(work: Coroutine[Any, Any, T]) -> T:
    """Awaits the work to its end, also if the caller is cancelled meanwhile: a program that is interrupted while it deploys, and ends."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()
