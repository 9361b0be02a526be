"""The module-level functions: the methods of a Client, called on the current client (see `clients.py`)."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Never, overload

from ..broker.errors import InstanceError
from ..broker.settings import Settings
from ..controller.state.config import BackendConfig
from ..controller.state.documents import CatchUp
from ..instance.starting import StartOptions, parse_http_options
from ..replicas.context import check_not_importing, is_importing
from . import groups
from .answers import check_results
from .client import Client
from .clients import clients
from .declared import declare_with_file, make_mount
from .deploying import is_file_of_run
from .futures import Future
from .groups import Group
from .handle import AsyncHandle, Handle
from .jobs import Job
from .schedules import ScheduleStatus
from .streams import Stream

_is_under_run = False


def start(
    detached: bool = False,
    http_options: dict[str, Any] | None = None,
    *,
    broker_url: str | None = None,
    store_url: str | None = None,
    namespace: str | None = None,
    node_id: str = "",
    with_node: bool = True,
) -> Client:
    """Starts an instance and returns its client; it ends with this process unless `detached`.

    http_options: host, port, location ("HeadOnly", "EveryNode", "NoServer" or None), workers (proxies on one port), middlewares,
    debug, futures_path (where requests are found by their ids). Without URLs (here or in MQSERVE_BROKER_URL and MQSERVE_STORE_URL)
    everything runs inside this process. Under `mqserve run` it returns the client of the running instance.

    Raises InstanceError if the namespace has a live instance or this process runs one, BadValue for a bad option or a port in use,
    BrokerUnavailable and StoreUnavailable within ten seconds.
    """
    check_not_importing("serve.start()")
    clients.were_asked_for = True
    if _is_under_run and (running := clients.own()) is not None:
        return _join_run(running, detached, http_options)
    http, middlewares = parse_http_options(http_options)
    settings = Settings.read(broker_url=broker_url, store_url=store_url, namespace=namespace)
    return clients.start(settings, StartOptions(http, middlewares, detached, with_node, node_id))


def _join_run(client: Client, detached: bool, http_options: dict[str, Any] | None) -> Client:
    """Handles `serve.start` in a file under `mqserve run`: it applies the middlewares; the command line has decided the rest."""
    _, middlewares = parse_http_options(http_options)
    if others := sorted(set(http_options or {}) - {"middlewares"}):
        raise InstanceError(
            f"the instance of `mqserve run` is up already, so http_options {', '.join(others)} come too late: "
            "give them as flags (--host, --port, --location, --debug), or start this file with `python`"
        )
    if detached:
        raise InstanceError("the instance of `mqserve run` ends with it: for a detached one use `mqserve start`, then connect()")
    if middlewares:
        client.set_middlewares(middlewares)
    return client.give_again()


def connect(
    *,
    broker_url: str | None = None,
    store_url: str | None = None,
    namespace: str | None = None,
    results: Literal["any", "plain"] = "any",
) -> Client:
    """Joins the instance that runs under the namespace; a second call for the same place returns the same client.

    Missing arguments come from the environment. Without arguments it joins, inside a replica, the replica's own instance, in a process
    that started an instance that one, else the one that the environment names. Raises InstanceError if there is none, BrokerUnavailable
    and StoreUnavailable.

    results: "plain" makes this client open no pickle in any result from now on; a result that needs one raises NotEncodable.
    """
    check_results(results)
    check_not_importing("serve.connect()")
    clients.were_asked_for = True
    if broker_url is None and store_url is None and namespace is None:
        client = clients.connect()
    else:
        client = clients.connect(Settings.read(broker_url=broker_url, store_url=store_url, namespace=namespace))
    if results == "plain":
        client.sender.only_plain = True
    return client


def start_under_run(settings: Settings, options: StartOptions) -> Client:
    """Starts the instance of `mqserve run`; `serve.start()` in the user's file returns the same client."""
    global _is_under_run
    client = clients.start(settings, options).give_again()
    _is_under_run = True
    clients.were_asked_for = False
    return client


def deploying() -> AbstractContextManager[None]:
    """See `Client.deploying`."""
    return clients.current().deploying()


def create_backend(
    backend_tag: str,
    func_or_class: Any,
    *init_args: Any,
    actor_options: dict[str, Any] | None = None,
    ray_actor_options: dict[str, Any] | None = None,
    config: BackendConfig | dict[str, Any] | None = None,
    factory: bool = False,
) -> None:
    """See `Client.create_backend`."""
    clients.current().create_backend(
        backend_tag,
        func_or_class,
        *init_args,
        actor_options=actor_options,
        ray_actor_options=ray_actor_options,
        config=config,
        factory=factory,
    )


def mount(
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
    """See `Client.mount`. In a file under `mqserve run` it declares, as `@serve.endpoint` does, and in a replica that imports the file it
    does nothing."""
    if not (is_importing() or is_file_of_run()):
        return clients.current().mount(
            route, app, *init_args, name=name, methods=methods, actor_options=actor_options, config=config, factory=factory, **misplaced
        )
    declare_with_file(make_mount(route, app, init_args, name, methods, config, actor_options, misplaced, factory=factory))


def update_backend(
    backend_tag: str,
    func_or_class: Any,
    *init_args: Any,
    actor_options: dict[str, Any] | None = None,
    ray_actor_options: dict[str, Any] | None = None,
    factory: bool = False,
) -> None:
    """See `Client.update_backend`."""
    clients.current().update_backend(
        backend_tag, func_or_class, *init_args, actor_options=actor_options, ray_actor_options=ray_actor_options, factory=factory
    )


def update_backend_config(backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
    """See `Client.update_backend_config`."""
    clients.current().update_backend_config(backend_tag, config_options)


def get_backend_config(backend_tag: str) -> BackendConfig:
    """See `Client.get_backend_config`."""
    return clients.current().get_backend_config(backend_tag)


def list_backends() -> dict[str, BackendConfig]:
    """See `Client.list_backends`."""
    return clients.current().list_backends()


def delete_backend(backend_tag: str, force: bool = False) -> None:
    """See `Client.delete_backend`."""
    clients.current().delete_backend(backend_tag, force)


def create_endpoint(endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ()) -> None:
    """See `Client.create_endpoint`."""
    clients.current().create_endpoint(endpoint_name, backend=backend, route=route, methods=methods)


def list_endpoints() -> dict[str, dict[str, Any]]:
    """See `Client.list_endpoints`."""
    return clients.current().list_endpoints()


def delete_endpoint(endpoint: str) -> None:
    """See `Client.delete_endpoint`."""
    clients.current().delete_endpoint(endpoint)


def set_traffic(endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
    """See `Client.set_traffic`."""
    clients.current().set_traffic(endpoint_name, traffic_policy_dictionary)


def shadow_traffic(endpoint_name: str, backend_tag: str, proportion: float) -> None:
    """See `Client.shadow_traffic`."""
    clients.current().shadow_traffic(endpoint_name, backend_tag, proportion)


def register_convertor(name: str, convertor: Any) -> None:
    """See `Client.register_convertor`."""
    clients.current().register_convertor(name, convertor)


def schedule(
    name: str,
    endpoint: str | Handle | AsyncHandle,
    *,
    cron: str,
    timezone: str = "UTC",
    data: Any = None,
    catch_up: CatchUp = "skip",
) -> None:
    """See `Client.schedule`."""
    clients.current().schedule(name, endpoint, cron=cron, timezone=timezone, data=data, catch_up=catch_up)


def list_schedules() -> dict[str, ScheduleStatus]:
    """See `Client.list_schedules`."""
    return clients.current().list_schedules()


def pause_schedule(name: str) -> None:
    """See `Client.pause_schedule`."""
    clients.current().pause_schedule(name)


def resume_schedule(name: str) -> None:
    """See `Client.resume_schedule`."""
    clients.current().resume_schedule(name)


def run_schedule(name: str) -> Job:
    """See `Client.run_schedule`."""
    return clients.current().run_schedule(name)


def delete_schedule(name: str) -> None:
    """See `Client.delete_schedule`."""
    clients.current().delete_schedule(name)


def create_pipeline(name: str, stages: Sequence[str], *, route: str | None = None, methods: Sequence[str] = ()) -> None:
    """See `Client.create_pipeline`."""
    clients.current().create_pipeline(name, stages, route=route, methods=methods)


def list_pipelines() -> dict[str, dict[str, Any]]:
    """See `Client.list_pipelines`."""
    return clients.current().list_pipelines()


def delete_pipeline(name: str) -> None:
    """See `Client.delete_pipeline`."""
    clients.current().delete_pipeline(name)


@overload
def get_handle(endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
@overload
def get_handle(endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
@overload
def get_handle(endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...


def get_handle(endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
    """See `Client.get_handle`."""
    return clients.current().get_handle(endpoint_name, sync, missing_ok)  # type: ignore[call-overload,no-any-return]


def future(future_id: str, backend: str | None = None, *, endpoint: str | None = None) -> Future:
    """See `Client.future`."""
    return clients.current().future(future_id, backend, endpoint=endpoint)


def job(job_id: str, backend: str | None = None, *, endpoint: str | None = None) -> Job:
    """See `Client.job`."""
    return clients.current().job(job_id, backend, endpoint=endpoint)


@overload
def submit_many(handle: Handle, items: Iterable[Any], then: Handle | AsyncHandle | None = None) -> Group: ...
@overload
def submit_many(handle: AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None) -> Coroutine[Any, Any, Group]: ...


def submit_many(
    handle: Handle | AsyncHandle, items: Iterable[Any], then: Handle | AsyncHandle | None = None
) -> Group | Coroutine[Any, Any, Group]:
    """See `Client.submit_many`."""
    return groups.submit_many(handle, items, then)


def group(group_id: str) -> Group:
    """See `Client.group`."""
    return clients.current().group(group_id)


def stream(stream_id: str, after: int = 0) -> Stream:
    """See `Client.stream`."""
    return clients.current().stream(stream_id, after)


def shutdown() -> None:
    """Shuts down the instance that was started or joined last. Does nothing if there is none, or when called again."""
    clients.shutdown()
