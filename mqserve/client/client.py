"""The client: one process's access to an instance. Every function of `mqserve` is a method here or of its lifetime."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, Never, overload

from starlette.convertors import register_url_convertor

from ..broker.errors import BadValue
from ..broker.queue_names import check_name
from ..broker.values import code
from ..broker.values.backend_code import Packed, pack_backend
from ..broker.values.main_module import RunFile
from ..broker.values.whole_numbers import whole_number
from ..controller import changes
from ..controller.endpoint_parsing import parse_endpoint
from ..controller.pipeline_changes import parse_pipeline
from ..controller.schedule_changes import find_schedule
from ..controller.state.config import BackendConfig
from ..controller.state.documents import CatchUp, CodeKind, Desired
from ..controller.state.firings import read_firings
from ..instance.starting import parse_middlewares
from ..replicas.app_copies import holds_an_app
from ..replicas.context import is_constructing
from .arguments import check_fits, check_target, kind_of, make_convertor, mounted, read_actor_options
from .declared import make_mount
from .deploying import Block, Declaration, EnteredOnce, open_block, opened
from .deployments import Deployments, TellReady
from .futures import Future, get, wait
from .groups import Group, submit_many
from .handle import AsyncHandle, Handle
from .jobs import Job
from .lifetime import Lifetime
from .listing import check_id, endpoints_of, key_of, pipelines_of, unknown_endpoint, url_among
from .schedules import ScheduleStatus, check_handle, make_schedule
from .streams import Stream


class Client(Lifetime):
    """A client of one instance, made by `serve.start` and `serve.connect`. Its methods may be called from any thread; each returns once
    its change is in effect. In a forked child it opens connections of its own at its first use there, or raises an error that says why it
    cannot.

    A `with` block on the call that opened it ends what that call opened: `with serve.start()` the instance, unless that is detached, and
    `with serve.connect()` the client.
    """

    run_file: RunFile | None = None  # the program's `__main__` under `mqserve run`, if replicas may execute it, too

    # Backends.

    def create_backend(
        self,
        backend_tag: str,
        func_or_class: Any,
        *init_args: Any,
        actor_options: dict[str, Any] | None = None,
        ray_actor_options: dict[str, Any] | None = None,
        config: BackendConfig | dict[str, Any] | None = None,
        factory: bool = False,
    ) -> None:
        """Deploys a function, a class, an ASGI app or an import string; returns once all replicas are ready. With `factory` it is a
        function that returns an ASGI app, called in each replica with `init_args`.

        Raises BadValue for a name that is taken, a bad config, or arguments for a function; BadType for an object that is none of these;
        NotEncodable for code that cannot be pickled; BackendFailed with the remote traceback if a replica does not get ready: the backend
        is then removed again.
        """
        options = read_actor_options(actor_options, ray_actor_options, embedded=self.settings.embedded)
        check_target(backend_tag, func_or_class, init_args, factory=factory)
        parsed, kind = changes.parse_config(config), self._kind_of(func_or_class, factory=factory)
        check_fits(backend_tag, func_or_class, parsed, kind)
        check_name(backend_tag, "a backend")
        packed = self._pack(func_or_class, init_args, factory=factory)
        self._call(self._changing.create_backend(backend_tag, packed, kind, parsed, options))

    def update_backend(
        self,
        backend_tag: str,
        func_or_class: Any,
        *init_args: Any,
        actor_options: dict[str, Any] | None = None,
        ray_actor_options: dict[str, Any] | None = None,
        factory: bool = False,
    ) -> None:
        """Rolls out new code: new replicas start first, then the old ones drain.

        Raises BackendFailed if the new version does not get ready; the old one serves on.
        """
        options = None
        if actor_options is not None or ray_actor_options is not None:
            options = read_actor_options(actor_options, ray_actor_options, embedded=self.settings.embedded)
        check_target(backend_tag, func_or_class, init_args, factory=factory)
        packed, kind = self._pack(func_or_class, init_args, factory=factory), self._kind_of(func_or_class, factory=factory)
        self._call(self._changing.update_backend(backend_tag, packed, kind, options))

    def update_backend_config(self, backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
        """Changes only the given fields, live; returns once the wanted number of replicas is ready and follows the change.

        Raises BackendFailed if the code refuses a new `user_config`; the last good one is then restored.
        """
        self._call(self._changing.update_backend_config(backend_tag, config_options))

    def get_backend_config(self, backend_tag: str) -> BackendConfig:
        """Returns the config of a backend. Raises BadValue for an unknown one."""
        return changes.find_backend(self._read(), backend_tag).config.model_copy(deep=True)

    def list_backends(self) -> dict[str, BackendConfig]:
        return {name: backend.config.model_copy(deep=True) for name, backend in self._read().backends.items()}

    def delete_backend(self, backend_tag: str, force: bool = False) -> None:
        """Drains the backend's queue and replicas; returns when both are gone. With `force`, waiting and running requests are dropped.

        Raises BadValue while an endpoint uses the backend.
        """
        self._call(self._changing.delete_backend(backend_tag, force=force))

    # Endpoints.

    def create_endpoint(
        self, endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ()
    ) -> None:
        """Creates an endpoint, with an HTTP route if one is given, whose traffic goes to a backend; returns when all live proxies know
        it. `methods` are GET by default. If the backend is an ASGI app, the route is a prefix, and all methods go to the app by default.

        Raises BadType and BadValue as Ray Serve 1.x does: for a missing backend name, a bad route or method, a name or route that is
        taken, or an unknown backend. Raises BackendFailed if a proxy cannot match the route; the endpoint is then removed again.
        """
        endpoint = parse_endpoint(endpoint_name, backend, route, methods)
        self._call(self._changing.create_endpoint(endpoint))

    def mount(
        self,
        route: str,
        app: Any,
        *init_args: Any,
        name: str | None = None,
        methods: Sequence[str] = (),
        actor_options: dict[str, Any] | None = None,
        config: BackendConfig | dict[str, Any] | None = None,
        factory: bool = False,
        **misplaced: Never,
    ) -> None:
        """Serves an ASGI app under a prefix such as "/v1": a backend and an endpoint of one `name`, by default that of the prefix. `app` is
        the app, its import string or, with `factory`, a function that returns it.

        Raises as `create_backend` and `create_endpoint` do, and then changes nothing.
        """
        declaration = make_mount(route, app, init_args, name, methods, config, actor_options, misplaced, factory=factory)
        with self.deploying():
            self.deploy(declaration)

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Returns `{name: {"route", "methods", "traffic", "shadows"}}`, and "prefix": True where the route is one."""
        return endpoints_of(self._read())

    def delete_endpoint(self, endpoint: str) -> None:
        """Deletes the endpoint, but not its backends; returns when all live proxies know that."""
        self._call(self._changing.delete_endpoint(endpoint))

    def set_traffic(self, endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
        """Splits the endpoint's requests over backends by weight (the weights sum to 1); returns when all live proxies follow. Shadows
        stay.

        Raises BadValue for an unknown endpoint or backend, a negative weight or another sum; BadType unless the policy is a dict of
        numbers.
        """
        self._call(self._changing.set_traffic(endpoint_name, traffic_policy_dictionary))

    def shadow_traffic(self, endpoint_name: str, backend_tag: str, proportion: float) -> None:
        """Copies a share (0 to 1) of the endpoint's requests to a backend, whose results are dropped; 0 ends that."""
        self._call(self._changing.shadow_traffic(endpoint_name, backend_tag, proportion))

    def register_convertor(self, name: str, convertor: Any) -> None:
        """Registers a path convertor (a Starlette `Convertor` class or its import string) for routes: `{value:name}`;
        returns when all live proxies and replicas know it.

        Raises BadValue if it is no convertor, or if a route that uses the name could not be matched with it. Raises BackendFailed if a
        proxy or a replica cannot make it; the last good one is then restored.
        """
        packed = self._pack_for_all(convertor)
        made = make_convertor(convertor)
        self._call(self._changing.register_convertor(name, packed, made))
        register_url_convertor(name, made)

    def set_middlewares(self, middlewares: Sequence[Any]) -> None:
        """Wraps all proxies in these middlewares, the first outermost: Starlette `Middleware` objects, or import strings of middleware
        classes.

        Raises BackendFailed if a proxy cannot build them; the last good ones are then restored.
        """
        parsed = parse_middlewares(middlewares)
        self._call(self._changing.set_middlewares(self._pack_for_all(list(parsed)) if parsed else None))

    # Pipelines.

    def create_pipeline(self, name: str, stages: Sequence[str], *, route: str | None = None, methods: Sequence[str] = ()) -> None:
        """Creates a pipeline: an endpoint whose requests are jobs that go through the endpoints `stages`, each of which gets the result of
        the one before it as `request.data`. A handle calls it by its name, HTTP at its route (GET and POST, if `methods` says nothing).

        Raises BadType and BadValue for a bad name, list or route, an unknown endpoint and one that is a pipeline, a name or route that is
        taken. Raises BackendFailed if a proxy cannot match the route; the pipeline is then removed again.
        """
        self._call(self._changing.create_pipeline(parse_pipeline(name, stages, route, methods)))

    def list_pipelines(self) -> dict[str, dict[str, Any]]:
        """Returns `{name: {"route", "methods", "stages"}}`."""
        return pipelines_of(self._read())

    def delete_pipeline(self, name: str) -> None:
        """Deletes a pipeline, but not its endpoints. What is under way in it goes on. Does nothing for an unknown name."""
        self._call(self._changing.delete_pipeline(name))

    # Schedules.

    def schedule(
        self,
        name: str,
        endpoint: str | Handle | AsyncHandle,
        *,
        cron: str,
        timezone: str = "UTC",
        data: Any = None,
        catch_up: CatchUp = "skip",
    ) -> None:
        """Sends a job to the endpoint at each time that the cron expression names in that time zone; the handler sees `data` as
        `request.data`. Six fields begin with seconds. A handle in the place of the endpoint's name says how the jobs are treated, by its
        options. Whatever is more than a minute late, since no controller or no broker was there, was missed: `catch_up="once"` sends one
        job for all of that.

        A schedule of the same name is replaced; with the same times it goes on where it was, and it stays paused if it was. Raises BadType
        and BadValue for a bad name, expression or zone and for an unknown endpoint, NotEncodable, and TooLarge above 16 KiB of data.
        """
        handle = Handle(endpoint, self) if isinstance(endpoint, str) else check_handle(endpoint)
        signer, key_problem = self.settings.signer, self.sender.key_problem
        made = make_schedule(name, handle, data, cron=cron, timezone=timezone, catch_up=catch_up, signer=signer, key_problem=key_problem)
        if url := handle._options.callback_url:
            self._call(self.sender.jobs.check_callback(url))
        self._call(self._changing.set_schedule(made, self._connections.store.now_ms))

    def list_schedules(self) -> dict[str, ScheduleStatus]:
        """Returns the schedules, each with its next and its last firing."""
        desired, connections = self._read(), self._connections
        last = read_firings(self._call(connections.store.get(connections.keys.firings)))
        now_ms = connections.store.now_ms()
        return {name: ScheduleStatus.of(schedule, last.get(name), now_ms) for name, schedule in desired.schedules.items()}

    def pause_schedule(self, name: str) -> None:
        """Lets a schedule fire no more until it is resumed. Raises BadValue for an unknown one."""
        self._call(self._changing.pause_schedule(name))

    def resume_schedule(self, name: str) -> None:
        """Lets a schedule fire again, from now on. Raises BadValue for an unknown one."""
        self._call(self._changing.resume_schedule(name, self._connections.store.now_ms))

    def run_schedule(self, name: str) -> Job:
        """Sends a job of a schedule now, beside its times, also while it is paused. Raises BadValue for an unknown one, and what `submit`
        does.
        """
        desired = self._call(self._opened.deployments.read())
        jobs = self.sender.jobs
        return jobs.wait(jobs.run_schedule(desired, find_schedule(desired, name)))

    def delete_schedule(self, name: str) -> None:
        """Deletes a schedule. Its jobs stay. Does nothing for an unknown name."""
        self._call(self._changing.delete_schedule(name))

    # Requests.

    @overload
    def get_handle(self, endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...

    def get_handle(self, endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
        """Returns a handle of the endpoint. Raises UnknownEndpoint for an unknown one; with `missing_ok` its requests wait for it to be
        created instead. In a backend's constructor its first call raises that error instead, since an endpoint that is declared together
        with the backend is there once the backend is ready.
        """
        sender = self.sender
        block = self._block()
        is_known = endpoint_name in (block.draft.endpoints if block is not None else sender.desired.endpoints)
        if not is_known:
            found: Desired = self._call(self._opened.deployments.read())
            if endpoint_name in found.endpoints:
                sender.desired = found
            elif not missing_ok and not is_constructing():
                raise unknown_endpoint(endpoint_name, (found if block is None else block.draft).endpoints)
        kind = Handle if sync else AsyncHandle
        return kind(endpoint_name, self, missing_ok=missing_ok)

    def future(self, future_id: str, backend: str | None = None, *, endpoint: str | None = None) -> Future:
        """Returns the future of any request, by the id that mqserve minted or by a publisher's own `message_id` and the `backend` or the
        `endpoint` that it was published to.

        Raises BadType for an id that is no str, BadValue for both.
        """
        check_id("request", "ref.id", future_id)
        return self.sender.future(future_id, backend, key_of(future_id, backend, endpoint))

    def job(self, job_id: str, backend: str | None = None, *, endpoint: str | None = None) -> Job:
        """Returns any job, by the id that mqserve minted or by a publisher's own `message_id` and the `backend` or the `endpoint` that it
        was published to. It asks the store when it is used, which raises UnknownJob for an id that nothing is known of. A publisher's job
        may not be known before it begins, so its `result` waits for it.

        Raises BadType for an id that is no str, BadValue for both.
        """
        check_id("job", "job.id", job_id)
        key, jobs = key_of(job_id, backend, endpoint), self.sender.jobs
        return jobs.job(job_id, job_id) if key == job_id else jobs.job(key, job_id, expires_ms=0)

    @overload
    def submit_many(self, handle: Handle, items: Iterable[Any], then: Handle | AsyncHandle | None = None) -> Group: ...
    @overload
    def submit_many(
        self, handle: AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None
    ) -> Coroutine[Any, Any, Group]: ...

    def submit_many(
        self, handle: Handle | AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None
    ) -> Group | Coroutine[Any, Any, Group]:
        """Sends a job for each item by `handle.submit`, and returns them as a group with one id; with an async handle, await it. An error
        ends the sending, and has a note that says how many jobs were sent before.

        With `then`, a handle of either kind, its endpoint gets one job more once all have succeeded: the list of their results, in the
        order of the items, as `then.submit([…])` would pass it, with the options of that handle. `group.then` is that job, from the start.
        Where one of the others fails, is cancelled or expires, or sending them fails, it fails with MembersFailed. Without items it gets
        [].

        Raises BadType for what is no handle or no series of items, and what `submit` does.
        """
        return submit_many(handle, items, then)

    def group(self, group_id: str) -> Group:
        """Returns a group by its id, in any process. Raises UnknownJob if nothing is known of it, BadType for an id that is no str."""
        check_id("group", "group.id", group_id)
        jobs = self.sender.jobs
        return Group(group_id, jobs.wait(jobs.group(group_id)).facts, jobs)

    def stream(self, stream_id: str, after: int = 0) -> Stream:
        """Goes on with a stream that was begun with `options(resumable=True)`, in this process or another one, behind the chunk with the
        number `after`. It becomes the one that the handler waits for. With `after` 0 the stream may begin later.

        Raises BadType for an id that is no str, BadValue for a number that no chunk has. Iterating raises BadValue if no such stream can be
        read, if none begins within the longest `request_timeout_s` of the backends, or if the chunk after that one is not kept any more.
        """
        check_id("stream", "stream.id", stream_id)
        number = whole_number(after)
        if number is None or not 0 <= number < 2**53:
            raise BadValue(f"after is the number of the last chunk that was taken (see `stream.seq`), from 0 on, not {after!r}")
        return self.sender.resumed(stream_id, number)

    def get(self, refs: Future | Sequence[Future], timeout: float | None = None) -> Any:
        return get(refs, timeout)

    def wait(self, refs: Sequence[Future], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Future], list[Future]]:
        return wait(refs, num_returns=num_returns, timeout=timeout)

    # The instance.

    def deploying(self) -> AbstractContextManager[None]:
        """Returns a block whose declarations take effect together at its end, which waits for all of them.

        Inside, every method that changes the instance validates and records its change, and the lists show what is declared so far. At
        the end the backends start all at once; when they are ready, and new convertors known, all endpoints and traffic change as one.
        If a part cannot take effect, all is undone and BackendFailed says why. An exception in the block commits nothing. The block
        belongs to its thread or task; a block inside another one joins that one.
        """
        return EnteredOnce(self._opened_block(commits_on_need=False, tell=lambda name, took_s: None))

    def deploying_file(self, tell: TellReady) -> AbstractContextManager[None]:
        """The block around the file of `mqserve run`. A handle that the file calls commits what it has declared until then; `tell` is
        called for each backend that gets ready."""
        return self._opened_block(commits_on_need=True, tell=tell)

    def _opened_block(self, *, commits_on_need: bool, tell: TellReady) -> AbstractContextManager[None]:
        deployments = self._deployments
        if (outer := open_block(deployments)) is not None:
            return outer.inner()
        return opened(Block(deployments, self._call, self.deploy, commits_on_need=commits_on_need, tell=tell))

    def deploy(self, declaration: Declaration) -> None:
        """Declares a backend and an endpoint of the same name for what `@serve.endpoint` decorated or `serve.mount` was given, in the block
        that is open."""
        name, target, args, config = declaration.name, declaration.target, declaration.init_args, declaration.config
        options = read_actor_options(declaration.actor_options, None, embedded=self.settings.embedded)
        check_target(name, target, args, factory=declaration.factory)
        kind = self._kind_of(target, factory=declaration.factory)
        if declaration.is_mount:
            kind = mounted(name, kind)
        check_fits(name, target, config, kind)
        endpoint = parse_endpoint(name, name, declaration.route, declaration.methods)
        block = self._block()
        assert block is not None
        pack = partial(self._pack, target, args, factory=declaration.factory)
        with block.inner():
            self._call(block.create_backend_later(name, pack, kind, config, options))
            self._call(block.create_endpoint(endpoint))

    def tell_complete(self) -> None:
        """Says that all that is declared is deployed: from now on `/-/readyz` may report ready."""
        self._call(self._changing.complete())

    def http_url(self) -> str:
        """The URL of the first live proxy, the instance's own before external ones: "http://127.0.0.1:8000"; empty if there is none."""
        store = self._connections.store
        return url_among(self._call(store.fields(self._connections.keys.beats)), store.now_ms())

    def _block(self) -> Block | None:
        return open_block(self._opened.deployments)

    @property
    def _changing(self) -> Deployments | Block:
        """Takes changes: the open block of this thread or task, else the instance itself."""
        deployments = self._deployments
        return open_block(deployments) or deployments

    def _read(self) -> Desired:
        """Returns the document with what is declared in the open block, if there is one."""
        block = self._block()
        if block is not None:
            return block.draft
        found: Desired = self._call(self._opened.deployments.read())
        return found

    def _kind_of(self, target: Any, *, factory: bool) -> CodeKind:
        return kind_of(target, factory=factory, embedded=self.settings.embedded)

    def _pack(self, target: Any, args: tuple[Any, ...], *, factory: bool = False) -> Packed:
        if self.settings.embedded:
            return Packed(code.pack_here(target, args, self.settings.signer, factory=factory))
        has_app = not factory and holds_an_app(target)
        return pack_backend(target, args, self.settings.signer, self.run_file, factory=factory, has_app=has_app)

    def _pack_for_all(self, target: Any) -> code.Code | code.CodeHere:
        return code.pack_for_all(target, self.settings.signer, embedded=self.settings.embedded)
