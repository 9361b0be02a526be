"""Declarations that are committed together: `with serve.deploying():`, and the file of `mqserve run`.

A block belongs to the thread or task that opened it (a context variable). What is declared in it is validated at once, against the
document that stood at its start and what the block has declared since, and committed at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.convertors import CONVERTOR_TYPES, Convertor, register_url_convertor

from ..broker.errors import BadValue, UnknownEndpoint
from ..broker.values import code
from ..broker.values.backend_code import Packed
from ..controller import changes
from ..controller.pipeline_changes import create_pipeline, delete_pipeline
from ..controller.schedule_changes import Now, delete_schedule, pause_schedule, resume_schedule, set_schedule
from ..controller.state.config import BackendConfig
from ..controller.state.documents import Backend, CodeKind, Desired, Endpoint, Schedule
from ..controller.state.resources import ActorOptions
from .deployments import Declared, Deployments, TellReady

Later = Callable[[], Declared]


@dataclass(frozen=True, slots=True)
class Declaration:
    """One function or class that was decorated with `@serve.endpoint`, or one app of `serve.mount`."""

    name: str
    target: Any
    route: str | None
    methods: Sequence[str]
    config: BackendConfig
    actor_options: dict[str, Any] | None = field(default=None)
    init_args: tuple[Any, ...] = ()
    factory: bool = False
    is_mount: bool = False


class Block:
    """Has the methods of Deployments that change the instance, and records what they are called with.

    `commits_on_need` is set for the file of `mqserve run`, which nobody wrote as a block: a handle that it calls finds its endpoint.
    """

    def __init__(
        self,
        deployments: Deployments,
        call: Callable[[Coroutine[Any, Any, Any]], Any],
        deploy: Callable[[Declaration], None],
        *,
        commits_on_need: bool,
        tell: TellReady,
    ) -> None:
        self.deployments = deployments
        self._call = call
        self.deploy = deploy  # takes a decorated function or class into this block
        self._commits_on_need = commits_on_need
        self._tell = tell
        self._is_open = True
        self._inner = 0  # number of blocks of the program inside this one that are open
        self._begin()

    def __repr__(self) -> str:
        return f"<Block {'open' if self._is_open else 'closed'}, {len(self._declared)} declared>"

    def _begin(self) -> None:
        self._start: Desired = self._call(self.deployments.read())
        self.draft: Desired = self._start
        self._declared: tuple[Later, ...] = ()
        self._deleted: frozenset[str] = frozenset()  # backends
        self._convertors: tuple[tuple[str, Convertor[Any] | None], ...] = ()  # those that this process had under names declared here

    def is_of(self, deployments: Deployments) -> bool:
        return self._is_open and self.deployments is deployments

    @property
    def takes_decorated(self) -> bool:
        """Whether a decorated function is deployed with this block. `mqserve run` looks for those of its file by itself."""
        return self._is_open and not self._commits_on_need

    @contextmanager
    def inner(self) -> Iterator[None]:
        """A block inside this one: it joins this one, and an exception takes back what it has declared."""
        before = self.draft, self._declared, self._deleted, self._convertors
        self._inner += 1
        try:
            yield
        except BaseException:
            self._take_back(before[-1])
            self.draft, self._declared, self._deleted, self._convertors = before
            raise
        finally:
            self._inner -= 1

    def commit(self) -> None:
        """Commits what was declared, if anything was, and returns when it is in effect."""
        if not self._declared:
            return
        try:
            declared = [later() for later in self._declared]
            self._call(self.deployments.deploy(declared, self._tell))
        except BaseException:
            self._take_back(())
            raise

    def close(self, *, commits: bool) -> None:
        self._is_open = False
        if commits:
            self.commit()
        else:
            self._take_back(())

    def before_call(self, endpoint: str, *, is_missing: bool, waits: bool) -> None:
        """Called when a handle is about to send to an endpoint, which may be `is_missing` from the instance. Commits what the file of
        `mqserve run` has declared until then, so that a call finds what the lines before it say. Raises UnknownEndpoint if another block
        declares the endpoint, unless the request `waits` for it."""
        if self._commits_on_need and not self._inner:
            if self._declared:
                self.commit()
                self._begin()
        elif is_missing and not waits and endpoint in self.draft.endpoints:
            raise UnknownEndpoint(f"Endpoint '{endpoint}' is declared in a deploying() block that is still open: call it after the block.")

    def _take_back(self, kept: tuple[tuple[str, Convertor[Any] | None], ...]) -> None:
        """Restores this process's convertors, which routes declared after them were compiled with."""
        for name, before in reversed(self._convertors[len(kept) :]):
            if before is None:
                CONVERTOR_TYPES.pop(name, None)
            else:
                register_url_convertor(name, before)

    # What Deployments has, too.

    async def create_backend(self, name: str, packed: Packed, kind: CodeKind, config: BackendConfig, options: ActorOptions) -> None:
        await self.create_backend_later(name, lambda: packed, kind, config, options)

    async def create_backend_later(
        self, name: str, pack: Callable[[], Packed], kind: CodeKind, config: BackendConfig, options: ActorOptions
    ) -> None:
        """For a decorated target, which can be packed only once its module is complete."""
        words = f"create_backend({name!r})"
        if name in self._deleted:
            raise BadValue(
                f"backend {name!r} is deleted in this deploying() block: replace its code with update_backend, or delete it "
                "in a block of its own before"
            )

        def declare() -> Declared:
            packed = pack()
            backend = msgspec.structs.replace(self.deployments.new_backend(name, packed, kind, config, options), settings=stand_in.settings)
            return Declared(words, changes.create_backend(backend), packed, goes_first=True)

        settings = deepcopy(config.model_dump(exclude_unset=True))  # the program may change its own
        stand_in = Backend(name, "", name, settings, options, kind=kind)
        self._record(changes.create_backend(stand_in), declare)

    async def update_backend(self, name: str, packed: Packed, kind: CodeKind, options: ActorOptions | None) -> None:
        update = self.deployments.new_code(name, packed, kind, options)
        self._add(Declared(f"update_backend({name!r})", update, packed, goes_first=True))

    async def update_backend_config(self, name: str, config: BackendConfig | dict[str, Any]) -> None:
        self._add(Declared(f"update_backend_config({name!r})", changes.update_backend_config(name, config), goes_first=True))

    async def delete_backend(self, name: str, *, force: bool = False) -> None:
        self._add(Declared(f"delete_backend({name!r})", changes.delete_backend(name, force=force)))
        self._deleted |= {name}

    async def create_endpoint(self, endpoint: Endpoint) -> None:
        self._add(Declared(f"create_endpoint({endpoint.name!r})", changes.create_endpoint(endpoint)))

    async def delete_endpoint(self, name: str) -> None:
        self._add(Declared(f"delete_endpoint({name!r})", changes.delete_endpoint(name)))

    async def create_pipeline(self, pipeline: Endpoint) -> None:
        """Its stages may be decorated functions, which `mqserve run` deploys when the file has been executed."""
        comes_last = self._commits_on_need and not set(pipeline.stages) <= self.draft.endpoints.keys()
        declared = Declared(f"create_pipeline({pipeline.name!r})", create_pipeline(pipeline), comes_last=comes_last)
        self._record(create_pipeline(pipeline, checks_stages=not comes_last), lambda: declared)

    async def delete_pipeline(self, name: str) -> None:
        self._add(Declared(f"delete_pipeline({name!r})", delete_pipeline(name)))

    async def set_traffic(self, name: str, traffic: object) -> None:
        self._add(Declared(f"set_traffic({name!r})", changes.set_traffic(name, traffic)))

    async def shadow_traffic(self, name: str, backend: str, proportion: object) -> None:
        self._add(Declared(f"shadow_traffic({name!r})", changes.shadow_traffic(name, backend, proportion)))

    async def register_convertor(self, name: str, packed: code.Code | code.CodeHere, convertor: Convertor[Any]) -> None:
        change = changes.register_convertor(name, code.FOR_ALL + packed.sha256, convertor)
        is_new = name not in self.draft.convertors
        self._add(Declared(f"register_convertor({name!r})", change, proxy_code=packed, goes_first=is_new))
        self._convertors = (*self._convertors, (name, CONVERTOR_TYPES.get(name)))

    async def set_middlewares(self, packed: code.Code | code.CodeHere | None) -> None:
        sha256 = code.FOR_ALL + packed.sha256 if packed is not None else ""
        self._add(Declared("set_middlewares", changes.set_middlewares(sha256), proxy_code=packed))

    async def set_schedule(self, schedule: Schedule, now: Now) -> None:
        """The endpoint may be that of a decorated function, which `mqserve run` deploys when the file has been executed."""
        comes_last = self._commits_on_need and schedule.endpoint not in self.draft.endpoints
        declared = Declared(f"schedule({schedule.name!r})", set_schedule(schedule, now), comes_last=comes_last)
        self._record(set_schedule(schedule, now, checks_endpoint=not comes_last), lambda: declared)

    async def pause_schedule(self, name: str) -> None:
        self._add(Declared(f"pause_schedule({name!r})", pause_schedule(name)))

    async def resume_schedule(self, name: str, now: Now) -> None:
        self._add(Declared(f"resume_schedule({name!r})", resume_schedule(name, now)))

    async def delete_schedule(self, name: str) -> None:
        self._add(Declared(f"delete_schedule({name!r})", delete_schedule(name)))

    async def complete(self) -> None:
        self._add(Declared("complete", changes.complete))

    def _add(self, declared: Declared) -> None:
        self._record(declared.change, lambda: declared)

    def _record(self, change: changes.Change, later: Later) -> None:
        self.draft = change(self.draft)
        self._declared = (*self._declared, later)


_blocks: ContextVar[tuple[Block, ...]] = ContextVar("deploying", default=())


class EnteredOnce:
    """A block for one `with`: a second one would declare into what is committed. Raises BadValue for that."""

    def __init__(self, block: AbstractContextManager[None]) -> None:
        self._block = block
        self._was_entered = False

    def __repr__(self) -> str:
        return f"<deploying() block, {'entered' if self._was_entered else 'not entered'}>"

    def __enter__(self) -> None:
        if self._was_entered:
            raise BadValue("this deploying() block was entered before: call deploying() anew for each `with`")
        self._was_entered = True
        self._block.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._block.__exit__(*raised)


@contextmanager
def opened(block: Block) -> Iterator[None]:
    """Opens the block for this thread or task, and commits it at the end; an exception commits nothing."""
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    except BaseException:
        block.close(commits=False)
        raise
    finally:
        _blocks.set(tuple(other for other in _blocks.get() if other is not block))
    block.close(commits=True)


def open_block(deployments: Deployments) -> Block | None:
    """Returns the open block of this thread or task for the client of these deployments, if there is one."""
    blocks = _blocks.get()
    return next((block for block in blocks if block.is_of(deployments)), None) if blocks else None


def is_file_of_run() -> bool:
    """Whether this thread or task executes the file of `mqserve run`, outside of any block that the file has opened."""
    return bool(_blocks.get()) and all(not block.takes_decorated for block in _blocks.get())


def deploy_in_block(declaration: Declaration) -> bool:
    """Takes a decorated function into the block of this thread or task that was opened last; returns whether there is one."""
    block = next((block for block in reversed(_blocks.get()) if block.takes_decorated), None)
    if block is not None:
        block.deploy(declaration)
    return block is not None
