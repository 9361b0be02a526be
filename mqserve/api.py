"""The module-level functions: the same as a Client's methods, on the client this process started or joined last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from .broker import forks
from .broker.errors import InstanceError
from .broker.settings import Settings
from .client import Client
from .controller.state import BackendConfig
from .futures import Future
from .handle import AsyncHandle, Handle
from .instance import StartOptions, parse_http_options
from .session import open_client

_lock = forks.Lock()
_current: Client | None = None
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

    http_options: host, port, location ("HeadOnly", "EveryNode", "NoServer" or None), middlewares, debug. Without URLs (here or in
    MQSERVE_BROKER_URL and MQSERVE_STORE_URL) everything runs inside this process. Under `mqserve run` it is the running instance.

    Raises InstanceError when the namespace has a live instance, BadValue for a bad option or a port in use, BrokerUnavailable and
    StoreUnavailable within ten seconds.
    """
    global _current
    with _lock:
        if _current is not None and not _current._closed and not _current._is_inherited:
            if _is_under_run:
                return _join_run(_current, detached, http_options)
            raise InstanceError("this process has an instance already: use it, or call serve.shutdown() first")
        http, middlewares = parse_http_options(http_options)
        settings = Settings.read(broker_url=broker_url, store_url=store_url, namespace=namespace)
        options = StartOptions(http, middlewares, detached, with_node, node_id)
        _current = open_client(settings, options)
        return _current


def _join_run(client: Client, detached: bool, http_options: dict[str, Any] | None) -> Client:
    """`serve.start` in a file under `mqserve run`: middlewares apply, the rest was decided on the command line."""
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
    return client


def connect(*, broker_url: str | None = None, store_url: str | None = None, namespace: str | None = None) -> Client:
    """Joins the instance that runs under the namespace; inside a replica, its own. Raises InstanceError when there is none."""
    global _current
    with _lock:
        if _current is not None and not _current._closed and not _current._is_out_of_reach:
            return _current
        settings = Settings.read(broker_url=broker_url, store_url=store_url, namespace=namespace)
        if settings.embedded:
            raise InstanceError(
                "there is no instance in this process, and another process's embedded one cannot be joined: call serve.start(), "
                "or set MQSERVE_BROKER_URL and MQSERVE_STORE_URL"
            )
        _current = open_client(settings, None)
        return _current


def current() -> Client:
    """The client that module-level functions act on. Joins the instance of the environment when there is none yet."""
    return connect() if _current is None or _current._closed else _current


def adopt(client: Client) -> None:
    """`mqserve run` started this one: `serve.start()` in the user's file returns it."""
    global _current, _is_under_run
    _current, _is_under_run = client, True


def create_backend(
    backend_tag: str,
    func_or_class: Any,
    *init_args: Any,
    actor_options: dict[str, Any] | None = None,
    ray_actor_options: dict[str, Any] | None = None,
    config: BackendConfig | dict[str, Any] | None = None,
) -> None:
    """See `Client.create_backend`."""
    current().create_backend(
        backend_tag, func_or_class, *init_args, actor_options=actor_options, ray_actor_options=ray_actor_options, config=config
    )


def update_backend(
    backend_tag: str,
    func_or_class: Any,
    *init_args: Any,
    actor_options: dict[str, Any] | None = None,
    ray_actor_options: dict[str, Any] | None = None,
) -> None:
    """See `Client.update_backend`."""
    current().update_backend(backend_tag, func_or_class, *init_args, actor_options=actor_options, ray_actor_options=ray_actor_options)


def update_backend_config(backend_tag: str, config_options: BackendConfig | dict[str, Any]) -> None:
    """See `Client.update_backend_config`."""
    current().update_backend_config(backend_tag, config_options)


def get_backend_config(backend_tag: str) -> BackendConfig:
    """See `Client.get_backend_config`."""
    return current().get_backend_config(backend_tag)


def list_backends() -> dict[str, BackendConfig]:
    """See `Client.list_backends`."""
    return current().list_backends()


def delete_backend(backend_tag: str, force: bool = False) -> None:
    """See `Client.delete_backend`."""
    current().delete_backend(backend_tag, force)


def create_endpoint(endpoint_name: str, *, backend: str | None = None, route: str | None = None, methods: Sequence[str] = ("GET",)) -> None:
    """See `Client.create_endpoint`."""
    current().create_endpoint(endpoint_name, backend=backend, route=route, methods=methods)


def list_endpoints() -> dict[str, dict[str, Any]]:
    """See `Client.list_endpoints`."""
    return current().list_endpoints()


def delete_endpoint(endpoint: str) -> None:
    """See `Client.delete_endpoint`."""
    current().delete_endpoint(endpoint)


def set_traffic(endpoint_name: str, traffic_policy_dictionary: dict[str, float]) -> None:
    """See `Client.set_traffic`."""
    current().set_traffic(endpoint_name, traffic_policy_dictionary)


def shadow_traffic(endpoint_name: str, backend_tag: str, proportion: float) -> None:
    """See `Client.shadow_traffic`."""
    current().shadow_traffic(endpoint_name, backend_tag, proportion)


def register_convertor(name: str, convertor: Any) -> None:
    """See `Client.register_convertor`."""
    current().register_convertor(name, convertor)


@overload
def get_handle(endpoint_name: str, *, missing_ok: bool = False) -> Handle: ...
@overload
def get_handle(endpoint_name: str, sync: Literal[True], missing_ok: bool = False) -> Handle: ...
@overload
def get_handle(endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...


def get_handle(endpoint_name: str, sync: bool = True, missing_ok: bool = False) -> Handle | AsyncHandle:
    """See `Client.get_handle`."""
    return current().get_handle(endpoint_name, sync, missing_ok)  # type: ignore[call-overload,no-any-return]


def future(future_id: str, backend: str | None = None) -> Future:
    """See `Client.future`."""
    return current().future(future_id, backend)


def shutdown() -> None:
    """Ends the instance of this process; nothing where there is none."""
    if _current is not None:
        _current.shutdown()
