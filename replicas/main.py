"""The life of a replica: load the code, construct, open the broker, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from ..broker.backoff import delays
from ..broker.errors import BackendFailed, MQServeError, StoreUnavailable, words_of
from ..broker.process.lifeline import Stop, stop_event
from ..broker.process.printable import printable
from ..broker.process.stopping import unless
from ..broker.queue import Queue
from ..broker.rabbitmq.queue import PROBE_SELDOM_EVERY_S, open_rabbitmq
from ..broker.redis.store import open_redis
from ..broker.results import Result
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller.state.beats import BEAT_EVERY_S, MemberState, ReplicaBeat
from ..controller.state.convertors import Convertors
from ..controller.state.documents import Backend, Desired, Observed
from ..controller.state.following import follow_state
from ..controller.state.presence import Presence
from .asgi_apps import HostedApp
from .context import ReplicaContext, enter_context
from .execute import Execution
from .handler import Handler
from .hook_calls import Raised
from .loading import construct, read_backend
from .metrics import ReplicaMetrics
from .request_loop import RequestLoop
from .stages import Job
from .user_hooks import UserHooks
from .worker import Worker

logger = logging.getLogger(__name__)

ORPHAN_DRAIN_S = 4.0  # the longest drain of a replica whose parent was killed
_LAST_BREATH_S = 0.1  # from the failure of the worker's loop to the end of its thread
_LEAST_SHUTDOWN_S = 3.0  # of an app, however long the drain before it took
FAILED_EXIT = 3  # the user's code could not be loaded or constructed


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """Names the replica. An external one was started by hand, so the controller neither counts nor stops it."""

    backend: str
    replica_id: str
    node: str = ""
    external: bool = False


async def main(settings: Settings, options: ReplicaOptions) -> int:
    """Runs a replica as a process and returns the exit code."""
    stop = stop_event()
    enter_context(ReplicaContext(options.backend, options.replica_id), whole_process=True)
    async with open_redis(settings.store_url, settings.namespace, settings.result_files) as store:
        replica = Replica(settings, options, store)
        try:
            seals = settings.header_seals
            open_queue = partial(
                open_rabbitmq, settings.broker_url, settings.namespace, options.replica_id,
                seals=seals, may_be_away=True, probe_every_s=PROBE_SELDOM_EVERY_S,
            )  # fmt: skip
            await replica.run(open_queue, stop)
        except MQServeError as error:
            logger.error("%s: %s", options.replica_id, error)
            return FAILED_EXIT
    return 0


class Replica:
    """One copy of a backend, in a process of its own or, in the embedded form, beside others."""

    def __init__(self, settings: Settings, options: ReplicaOptions, store: Store) -> None:
        self._settings = settings
        self._options = options
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._convertors = Convertors(store, self._keys, settings.signer)
        self._state = MemberState.STARTING
        self._error = ""
        self._instance = ""  # id of the instance that it serves
        self._backend: Backend | None = None
        self._queue: Queue | None = None
        self._requests: RequestLoop | None = None
        self._hooks: UserHooks | None = None
        self._is_app = self._takes = False
        self._convertors_of: tuple[int, int] | None = None  # (epoch, version) of the desired document whose convertors it has
        self._convertor_error = ""
        self._told_convertors: Mapping[str, str] = {}  # those of that version
        self._drained_by = 0.0  # monotonic
        field = f"replica:{options.replica_id}"
        self._presence = Presence(store, self._keys.beats, field, lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Replica {self._options.replica_id} {self._state}>"

    async def run(self, open_queue: Callable[[], AbstractAsyncContextManager[Queue]], stop: Stop) -> None:
        """Serves until `stop` is set or the replica is no longer assigned, then drains.

        Raises BackendFailed if the code cannot be loaded or constructed; the last beat has the same reason.
        """
        backend, convertors = await read_backend(self._store, self._keys, self._settings.namespace, self._options.backend)
        self._backend = backend
        context = ReplicaContext(backend.name, self._options.replica_id)
        worker = Worker(context, backend.config, self._on_done, self._before_suspects)
        app: HostedApp | None = None
        failure: MQServeError | None = None  # raised outside the group, which would wrap it
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._presence.beat_forever())
            try:
                if not self._settings.embedded:  # this process has them, and may meanwhile have later ones of the same names
                    await self._convertors.register(convertors)
                # before the broker: a constructor that holds the GIL would make a connection miss its heartbeats
                handler = await unless(stop, construct(self._store, self._keys, self._settings, worker, backend))
                if handler is None:
                    return
                app = handler.app
                self._is_app = app is not None
                self._hooks = hooks = UserHooks(worker, handler)
                await hooks.apply(backend)
                async with open_queue() as self._queue:
                    await self._serve(self._queue, worker, handler, hooks, stop)
            except* MQServeError as group:
                failure = first_failure(group)
                if isinstance(failure, BackendFailed):
                    self._state, self._error = MemberState.FAILED, str(failure)
            finally:
                if app is not None:
                    await self._stop_app(worker, app)
                worker.stop()
                await self._presence.leave(with_last_words=self._state is MemberState.FAILED)
                beating.cancel()
        if failure is not None:
            raise failure

    async def _serve(self, queue: Queue, worker: Worker, handler: Handler, hooks: UserHooks, stop: Stop) -> None:
        assert self._backend is not None
        backend = self._backend
        worker.serve(Execution(backend.name, handler, self._settings.signer, self._store.files.limit))
        if trouble := await self._store.files.trouble():
            logger.error("%s: %s", self._options.replica_id, trouble)
        metrics = ReplicaMetrics(backend.name, self._options.replica_id)
        requests = RequestLoop(self._settings, backend, queue, self._store, worker, handler, metrics, self._options.replica_id)
        self._requests = requests
        metrics.ready()
        self._takes = True
        await self._presence.beat()  # before the first request comes, which may kill this process
        try:
            async with asyncio.TaskGroup() as tasks:
                minding = [
                    tasks.create_task(self._follow(requests, hooks, stop)),
                    tasks.create_task(hooks.apply_forever(self._options.replica_id)),
                    tasks.create_task(hooks.check_health_forever(backend)),
                    tasks.create_task(_stop_with(worker, stop)),
                    tasks.create_task(requests.keep_taking_forever(lambda: self._say(MemberState.READY))),
                ]
                to_the_end = [tasks.create_task(requests.tune_forever()), tasks.create_task(requests.listen())]
                await stop.wait()
                self._say(MemberState.DRAINING)
                drain_s = ORPHAN_DRAIN_S if stop.orphaned else math.inf
                self._drained_by = time.monotonic() + min(drain_s, backend.config.graceful_shutdown_timeout_s)
                for task in minding:
                    task.cancel()
                await requests.drain(drain_s)
                for task in to_the_end:
                    task.cancel()
        finally:
            metrics.end()
            await requests.abandon()  # the end of a process would requeue as well, but an embedded replica has no process of its own
        worker.thread.check()

    async def _stop_app(self, worker: Worker, app: HostedApp) -> None:
        """Runs the shutdown of an app's lifespan, in what is left of the time to drain."""
        try:
            async with asyncio.timeout(max(_LEAST_SHUTDOWN_S, self._drained_by - time.monotonic())):
                await worker.call(app.stop)
        except TimeoutError:
            logger.warning(
                "the app of %s has not shut down in time: give it a longer graceful_shutdown_timeout_s", self._options.replica_id
            )
        except (Raised, MQServeError) as error:
            logger.warning("the app of %s has not shut down: %s", self._options.replica_id, printable(str(error)))

    async def _follow(self, requests: RequestLoop, hooks: UserHooks, stop: Stop) -> None:
        """Applies new configuration and new generations of the queue. Sets `stop` and returns when the replica is no longer wanted."""
        await self._follow_convertors()
        async for read_desired, read_observed in follow_state(self._store, self._keys):
            desired, observed = read_desired or Desired(), read_observed or Observed()
            name = self._options.backend
            self._look_for_the_end(requests, read_desired)
            if observed.epoch:  # 0 if the store lost the document
                requests.demand_seals(observed.sealed)
                requests.limit_jobs(observed.job_limit_s)
            if observed.epoch and not self._is_wanted(observed):
                logger.info("%s is not wanted any more", self._options.replica_id)
                stop.set()
                return
            if read_desired is not None:
                await self._learn_convertors(read_desired)
            if name in desired.backends:
                requests.configure(desired.backends[name].config)
                hooks.want(desired.backends[name])
                if not requests.generations:
                    await hooks.settled()  # before it takes its first request
            if generations := observed.queues.get(name, ()):
                requests.want({generation: observed.shards_of(name, generation) for generation in generations})

    def _look_for_the_end(self, requests: RequestLoop, desired: Desired | None) -> None:
        """Tells the requests whether the backend ends. A missing document is no end, since the store may have lost it; nor is a document
        of another instance, which may serve the messages in the queue."""
        name = self._options.backend
        self._instance = self._instance or (desired.instance if desired is not None else "")
        if desired is None or desired.instance != self._instance:
            return
        if desired.closing:
            requests.will_end(f"the instance of backend {name!r} was shut down", keeps_queue=desired.keeps_queues)
        elif name not in desired.backends:
            requests.will_end(f"backend {name!r} was deleted", keeps_queue=False, at_once=name in desired.forced)
        else:
            requests.goes_on()

    async def _follow_convertors(self) -> None:
        """Has the clients that add a convertor from now on wait for this replica. The beat is written before the document is read and any
        request is taken: a client that does not see the beat has committed before, so the replica reads its convertor."""
        self._convertors_of = (0, 0)
        for pause_s in delays():
            if await self._presence.beat():
                return
            await asyncio.sleep(pause_s)

    async def _learn_convertors(self, desired: Desired) -> None:
        """Registers the instance's convertors, also those added after this replica started, and tells the clients that wait for that.
        Without one, requests of its routes get 422."""
        error = ""
        for pause_s in delays():
            try:
                await self._convertors.register(desired.convertors)
                break
            except StoreUnavailable:
                await asyncio.sleep(pause_s)
            except Exception as failure:  # a convertor is user code
                error = words_of(failure)
                logger.warning("%s cannot make the convertors of its instance: %s", self._options.replica_id, error)
                break
        is_news = (desired.convertors, error) != (self._told_convertors, self._convertor_error)
        self._convertors_of, self._told_convertors, self._convertor_error = (desired.epoch, desired.version), desired.convertors, error
        if is_news:
            self._presence.tell()

    def _is_wanted(self, observed: Observed) -> bool:
        if self._options.external:
            return self._options.backend in observed.queues
        return self._options.replica_id in observed.replicas

    def _on_done(self, job: Job, result: Result) -> None:
        assert self._requests is not None
        self._requests.on_done(job, result)

    async def _before_suspects(self, jobs: Sequence[Job]) -> None:
        assert self._requests is not None
        await self._requests.before_suspects(jobs)

    def _say(self, state: MemberState) -> None:
        self._state = state
        self._presence.tell()

    def _beat(self) -> ReplicaBeat:
        options, requests, hooks = self._options, self._requests, self._hooks
        error = self._error or (self._queue.why_down if self._queue and self._state is MemberState.STARTING else "")
        return ReplicaBeat(
            id=options.replica_id, at=self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), state=self._state,
            error=error, node=options.node, external=options.external, backend=options.backend,
            version=self._backend.version if self._backend else 0, generations=requests.generations if requests else (),
            follows=(0, hooks.version if hooks else 0), refused=hooks.refused if hooks else "",
            running=requests.running if requests else 0, served=requests.served if requests else 0, noted=self._store.health.noted,
            seal_key=self._settings.signer.current_key_id, takes=self._takes, is_app=self._is_app,
            convertors=self._convertors_of, convertor_error=self._convertor_error,
        )  # fmt: skip


async def _stop_with(worker: Worker, stop: Stop) -> None:
    """Sets `stop` once user code has ended the worker's loop: the replica drains, and its other requests are answered. Raises
    BackendFailed if the thread has ended too, since then none of them can be."""
    await worker.thread.failed.wait()
    await asyncio.sleep(_LAST_BREATH_S)
    if worker.thread.has_ended:
        worker.thread.check()
    stop.set()


def first_failure(group: BaseExceptionGroup[MQServeError]) -> MQServeError:
    """Returns the first error in the group."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, MQServeError)
    return found
