"""From the store to a constructed handler: the backend's record, its convertors, its code."""

from __future__ import annotations

import asyncio
import traceback

from ..broker import code
from ..broker.errors import BackendFailed, BadValue
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller.convertors import Convertors
from ..controller.state import Backend, Desired
from .handler import Handler, make_handler
from .worker import Worker


async def read_backend(store: Store, keys: StoreKeys, settings: Settings, name: str, convertors: Convertors) -> Backend:
    """The backend as it is wanted now, with the instance's convertors registered. Raises BadValue when there is none of that name."""
    desired = Desired.from_bytes(await store.get(keys.desired))
    backend = desired.backends.get(name)
    if backend is None:
        known = ", ".join(sorted(desired.backends)) or "none"
        raise BadValue(f"there is no backend {name!r} in {settings.namespace!r} (known: {known}): create it first")
    await convertors.register(desired.convertors)
    return backend


async def construct(store: Store, keys: StoreKeys, settings: Settings, worker: Worker, backend: Backend) -> Handler:
    """In the worker's thread, under the backend's start timeout. Raises BackendFailed with the user's traceback."""
    raw = await store.get_large(keys.code(backend.code))

    def make() -> Handler:
        if raw is None:
            raise BadValue(f"the code of {backend.name} is not in the store: deploy it again")
        target, args = code.unpack(raw, backend.code, settings.signer)
        return make_handler(target, args)

    try:
        async with asyncio.timeout(backend.config.start_timeout_s):
            handler: Handler = await worker.call(make)
    except TimeoutError:
        raise BackendFailed(
            f"backend {backend.name!r} ({backend.code_name}) was not constructed within its start_timeout_s of "
            f"{backend.config.start_timeout_s:g} s: raise it, or do less in the constructor"
        ) from None
    except Exception as error:
        raise BackendFailed(failure(backend, "cannot be constructed", error)) from error
    if (backend.config.max_batch_size or 1) > 1 and not handler.accepts_batch:
        raise BackendFailed(f"backend {backend.name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    return handler


def failure(backend: Backend, what: str, error: BaseException) -> str:
    """A sentence for operators, with the traceback of the user's code."""
    told = "".join(traceback.format_exception(error)).strip()
    return f"backend {backend.name!r} ({backend.code_name}) {what}: {type(error).__name__}: {error}\n{told}"
