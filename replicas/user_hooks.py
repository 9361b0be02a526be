"""The hooks of a replica's user code: `reconfigure` at each change of its user_config, `check_health` in regular intervals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

from ..broker.errors import BackendFailed
from ..broker.failures import describe
from ..broker.process.printable import printable
from ..controller.state.documents import Backend
from .handler import Handler
from .hook_calls import Raised
from .loading import told
from .worker import Worker

logger = logging.getLogger(__name__)

FAILURES_TOLERATED = 3  # in a row; then the replica is replaced
RECONFIGURE_BUDGET_S = 60.0


class ConfigLost(BackendFailed):
    """The code refused a user config and then the last good one as well: nobody knows which one it follows."""


class UserHooks:
    """Calls the hooks of one replica. Knows the last user_config that the code accepted, and why it refused a later one."""

    def __init__(self, worker: Worker, handler: Handler) -> None:
        self._worker = worker
        self._handler = handler
        self._told: Any = None
        self.version = 0  # the config version followed
        self.refused = ""  # why the last one was refused, empty if it was not
        self._wanted: Backend | None = None
        self._news, self._idle = asyncio.Event(), asyncio.Event()

    def __repr__(self) -> str:
        return f"<UserHooks at {self.version}{', refused' if self.refused else ''}>"

    def want(self, backend: Backend) -> None:
        """Has `apply_forever` apply this user_config. That may take as long as the call that holds the thread: a job may run for days."""
        self._wanted = backend
        self._idle.clear()
        self._news.set()

    async def settled(self) -> None:
        """Waits until the last one that was wanted is followed, or refused."""
        await self._idle.wait()

    async def apply_forever(self, replica_id: str) -> None:
        """Applies what is wanted. Raises ConfigLost."""
        while True:
            await self._news.wait()
            self._news.clear()
            assert self._wanted is not None
            try:
                await self.apply(self._wanted)
            except ConfigLost:
                raise
            except BackendFailed as error:
                logger.warning("%s keeps its last good user_config: %s", replica_id, error)
            if not self._news.is_set():
                self._idle.set()

    async def apply(self, backend: Backend) -> None:
        """Calls `reconfigure` if the user_config has changed. Raises BackendFailed if the code refuses it or is not healthy afterwards;
        the code then gets the last good one again."""
        if backend.config_version == self.version:
            return
        wanted = backend.config.user_config
        if wanted != self._told:
            try:
                await self._tell(backend, wanted)
            except BackendFailed as error:
                self.version, self.refused = backend.config_version, str(error)
                if self._told is not None:
                    await self._go_back(backend, error)
                raise
            self._told = wanted
        self.version, self.refused = backend.config_version, ""

    async def _go_back(self, backend: Backend, refusal: BackendFailed) -> None:
        try:
            await self._tell(backend, self._told)
        except BackendFailed as error:
            raise ConfigLost(f"{refusal}\nIt did not take its last good user_config again, either, so its replica ends: {error}") from None

    async def check_health_forever(self, backend: Backend) -> None:
        """Raises BackendFailed after three failed checks in a row. Returns at once if the code has no `check_health`."""
        check = self._handler.hook("check_health")
        failures = 0
        while check is not None:
            await asyncio.sleep(backend.config.health_check_period_s)
            if self._worker.in_plain_call:
                continue  # a request holds the thread, and a long call is no failure
            try:
                async with asyncio.timeout(backend.config.health_check_timeout_s):
                    await self._worker.call(check)
                failures = 0
            except (Raised, TimeoutError) as error:
                failures += 1
                if isinstance(error, Raised):
                    failure = error.failure
                else:
                    limit_s = backend.config.health_check_timeout_s
                    failure = describe(
                        TimeoutError(f"it took longer than health_check_timeout_s ({limit_s:g} s): raise that, or check less")
                    )
                logger.warning("check_health of %s failed (%d in a row): %s", backend.name, failures, printable(failure.words))
                if failures >= FAILURES_TOLERATED:
                    raise BackendFailed(told(backend, f"is not healthy ({failures} checks failed)", failure)) from None

    async def _tell(self, backend: Backend, user_config: Any) -> None:
        reconfigure, check = self._handler.hook("reconfigure"), self._handler.hook("check_health")
        if reconfigure is None:
            raise BackendFailed(
                f"backend {backend.name!r} has a user_config but no reconfigure(user_config) to take it: give its class one"
            )
        try:
            await self._call(lambda: reconfigure(deepcopy(user_config)), constructs=True)  # all readers share it
            if check is not None:
                await self._call(check)
        except Raised as raised:
            raise BackendFailed(told(backend, "refuses its user_config", raised.failure)) from None
        except TimeoutError:
            raise BackendFailed(f"backend {backend.name!r} did not take its user_config within {RECONFIGURE_BUDGET_S:g} s") from None

    async def _call(self, hook: Callable[[], Any], *, constructs: bool = False) -> None:
        """Calls a hook. Raises TimeoutError if it takes longer than RECONFIGURE_BUDGET_S. What it waits for the thread does not count."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:

            def begins() -> None:
                with suppress(RuntimeError):  # it has ended already
                    limit.reschedule(loop.time() + RECONFIGURE_BUDGET_S)

            def call() -> Any:
                with suppress(RuntimeError):  # the replica's loop has ended
                    loop.call_soon_threadsafe(begins)
                return hook()

            await self._worker.call(call, constructs=constructs)
