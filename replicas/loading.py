"""Reads a backend and its code from the store, and constructs its handler."""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import Any

from ..broker.errors import BackendFailed, BadEnvelope, BadSignature, BadValue
from ..broker.failures import Failure
from ..broker.files.import_errors import mend_of, shadowed
from ..broker.files.transfer import Restored, restore_files
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values import code
from ..broker.values.main_module import RunFile, stand_in_for
from ..controller.state.documents import Backend, CodeKind
from ..controller.state.reading import read_desired
from .app_copies import check_is_alone, own_copy
from .context import importing
from .handler import Handler, make_handler
from .hook_calls import Raised
from .worker import Worker


async def read_backend(store: Store, keys: StoreKeys, namespace: str, name: str) -> tuple[Backend, dict[str, str]]:
    """Returns the backend from the desired document, and the instance's convertors (name -> hash of their code). Raises BadValue if there
    is no such backend."""
    desired = read_desired(await store.get(keys.desired))
    if name not in desired.backends:
        known = ", ".join(sorted(desired.backends)) or "none"
        raise BadValue(f"there is no backend {name!r} in {namespace!r} (known: {known}): create it first")
    return desired.backends[name], desired.convertors


async def construct(store: Store, keys: StoreKeys, settings: Settings, worker: Worker, backend: Backend) -> Handler:
    """Constructs the handler in the worker's thread, and starts an app, within the backend's start timeout. Raises BackendFailed with the
    traceback of user code, or with the message of its `sys.exit()`."""
    record, restored = await _fetch(store, keys, settings, backend)
    if backend.kind is CodeKind.APP_OBJECT and isinstance(record, code.CodeHere):
        await check_is_alone(store, keys, backend, record.target)

    def make() -> Handler:
        target, args = _import(record, restored, settings)
        return make_handler(target, args, is_factory=record.factory, must_be_app=backend.kind.is_app)

    doing = "cannot be constructed"
    try:
        async with asyncio.timeout(backend.config.start_timeout_s):
            handler: Handler = await worker.call(make, constructs=True)
            if (app := handler.app) is not None:
                doing = "is an app that does not start"
                await worker.call(lambda: app.start(worker.keep), constructs=True)
    except TimeoutError:
        raise BackendFailed(
            f"backend {backend.name!r} ({backend.code_name}) was not constructed within its start_timeout_s of "
            f"{backend.config.start_timeout_s:g} s: raise it, or do less in the constructor or in the startup of the app"
        ) from None
    except Raised as raised:
        raise BackendFailed(told(backend, doing, raised.failure)) from None
    if backend.config.on_death == "replay" and (handler.accepts_batch or handler.app is not None):
        what = "takes batches, which" if handler.accepts_batch else "is an ASGI app, whose answers"
        raise BackendFailed(f"backend {backend.name!r} {what} cannot be replayed: leave on_death at 'fail'")
    if handler.app is not None and backend.config.max_batch_size is not None:
        raise BackendFailed(f"backend {backend.name!r} is an ASGI app, which takes no batches of requests: leave max_batch_size out")
    if handler.app is not None and backend.config.retry is not None:
        raise BackendFailed(
            f"backend {backend.name!r} is an ASGI app, which makes an answer of each exception, so nothing is tried again: leave retry out"
        )
    if (backend.config.max_batch_size or 1) > 1 and not handler.accepts_batch:
        raise BackendFailed(f"backend {backend.name!r} has a max_batch_size but takes no batches: decorate it with @serve.accept_batch")
    return handler


async def _fetch(store: Store, keys: StoreKeys, settings: Settings, backend: Backend) -> tuple[code.Code | code.CodeHere, Restored | None]:
    """Reads the record and restores its files. Raises BackendFailed if one is missing or nobody with the key has deployed it."""
    try:
        raw = await store.get_large(keys.code(backend.code))
        if raw is None:
            raise BadValue("it is not in the store: deploy it again")
        record = code.open_record(raw, backend.code, settings.signer)
        if isinstance(record, code.CodeHere) or not record.files:
            return record, None
        return record, await restore_files(store, keys, record.files)
    except (BadValue, BadSignature, BadEnvelope) as error:
        raise BackendFailed(f"backend {backend.name!r} ({backend.code_name}) cannot be loaded: {error}") from error


def _import(record: code.Code | code.CodeHere, restored: Restored | None, settings: Settings) -> tuple[Any, list[Any]]:
    """Imports the target, in the worker's thread. The folders go on `sys.path` only now, so that no file of the user shadows what mqserve
    imports. They replace those that they are copies of: the files there may be other ones by now."""
    with importing():
        if isinstance(record, code.CodeHere):
            target, args = code.make(record, settings.signer)
            return (own_copy(record.target, target) if isinstance(record.target, str) else target), args
        if restored is not None:
            sys.path[:] = [*map(str, restored.paths), *(path for path in sys.path if path not in restored.origins)]
            importlib.invalidate_caches()
            if why := shadowed(restored):
                raise ImportError(why)
        try:
            if restored is not None and record.run_file:
                RunFile.read(restored.find(record.run_file)).execute()
            elif record.home:
                stand_in_for(record.home)
            return code.make(record, settings.signer)
        except ImportError as error:
            if restored is None or not (mend := mend_of(error, restored)):
                raise
            raise ImportError(f"{error}: {mend}", name=error.name, path=error.path) from error


def told(backend: Backend, what: str, failure: Failure) -> str:
    """Returns an error message for operators, with the traceback of the user's code."""
    return f"backend {backend.name!r} ({backend.code_name}) {what}: {failure.words}\n{failure.traceback}".rstrip()
