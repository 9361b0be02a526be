"""Reads a backend and its code from the store, and constructs its handler."""

from __future__ import annotations

import asyncio

from ..broker.errors import BackendFailed, BadValue
from ..broker.failures import Failure
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values import code
from ..controller.state.documents import Backend, Desired
from .handler import Handler, make_handler
from .worker import Raised, Worker


async def read_backend(store: Store, keys: StoreKeys, namespace: str, name: str) -> tuple[Backend, dict[str, str]]:
    """Returns the backend from the desired document, and the instance's convertors (name -> hash of their code). Raises BadValue if there
    is no such backend."""
    desired = Desired.from_bytes(await store.get(keys.desired))
    if name not in desired.backends:
        known = ", ".join(sorted(desired.backends)) or "none"
        raise BadValue(f"there is no backend {name!r} in {namespace!r} (known: {known}): create it first")
    return desired.backends[name], desired.convertors


async def construct(store: Store, keys: StoreKeys, settings: Settings, worker: Worker, backend: Backend) -> Handler:
    """Constructs the handler in the worker's thread, within the backend's start timeout. Raises BackendFailed with the traceback of user
    code, or with the message of its `sys.exit()`."""
    raw = await store.get_large(keys.code(backend.code))

    def make() -> Handler:
        if raw is None:
            raise BadValue(f"the code of {backend.name} is not in the store: deploy it again")
        target, args = code.unpack(raw, backend.code, settings.signer)
        return make_handler(target, args)

    try:
        async with asyncio.timeout(backend.config.start_timeout_s):
            handler: Handler = await worker.call(make, constructs=True)
    except TimeoutError:
        raise BackendFailed(
            f"backend {backend.name!r} ({backend.code_name}) was not constructed within its start_timeout_s of "
            f"{backend.config.start_timeout_s:g} s: raise it, or do less in the constructor"
        ) from None
    except Raised as raised:
        raise BackendFailed(told(backend, "cannot be constructed", raised.failure)) from None
    if (backend.config.max_batch_size or 1) > 1 and not handler.accepts_batch:
        raise BackendFailed(f"backend {backend.name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    return handler


def told(backend: Backend, what: str, failure: Failure) -> str:
    """Returns an error message for operators, with the traceback of the user's code."""
    return f"backend {backend.name!r} ({backend.code_name}) {what}: {failure.words}\n{failure.traceback}".rstrip()
