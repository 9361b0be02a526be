"""What a handle does: choose the backend, encode here in the caller's thread, publish on the runtime, hand out the future."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

from .broker.caller import Caller
from .broker.codecs import encode_value
from .broker.documents import until
from .broker.envelope import MINTED_ID_LENGTH, Meta, mint_id
from .broker.errors import InstanceError, MQServeError, UnknownEndpoint
from .broker.results import Result
from .broker.signing import Claim
from .controller.state import Desired, choose
from .futures import WAIT_LIMIT_S, Future, read_result
from .links import Links
from .runtime import Runtime

APPEAR_BUDGET_S = 60.0  # how long a handle made with missing_ok waits for its endpoint


class Sender:
    """Shared by all handles of a client; `desired` is replaced by whoever follows the document."""

    def __init__(self, runtime: Runtime, links: Links, caller: Caller) -> None:
        self._runtime = runtime
        self._links = links
        self._caller = caller
        self._signer = links.settings.signer
        self.desired = Desired()

    def __repr__(self) -> str:
        return f"<Sender with {len(self.desired.endpoints)} endpoints>"

    def send(self, meta: Meta, shard_key: str, data: Any, arguments: dict[str, Any], *, wait_for_endpoint: bool) -> Future:
        """A future at once. Futures among the arguments are resolved before the request is sent.

        Raises UnknownEndpoint and NotEncodable; whatever happens later is the future's.
        """
        future_id = mint_id()
        pending: concurrent.futures.Future[Result] = concurrent.futures.Future()
        awaited = [value for value in (data, *arguments.values()) if isinstance(value, Future)]
        is_missing = meta.endpoint not in self.desired.endpoints
        if is_missing and not wait_for_endpoint:
            # Another process may have made it just now: a handle that arrived by pickle is quicker than the document.
            if not self._runtime.call(self._is_there(meta.endpoint)):
                raise UnknownEndpoint(f"Endpoint '{meta.endpoint}' does not exist.")
            is_missing = False
        if awaited or is_missing:
            self._runtime.submit(self._send_later(meta, shard_key, data, arguments, future_id, pending))
        else:
            self._send_now(meta, shard_key, data, arguments, future_id, pending)
        return Future(future_id, pending, lambda result: read_result(result, future_id, self._signer))

    def _send_now(
        self, meta: Meta, shard_key: str, data: Any, arguments: dict[str, Any], future_id: str, pending: concurrent.futures.Future[Result]
    ) -> None:
        desired = self.desired
        endpoint = desired.endpoints.get(meta.endpoint)
        if endpoint is None:  # deleted while its arguments were awaited
            raise UnknownEndpoint(f"Endpoint '{meta.endpoint}' does not exist.")
        backend, shadows = choose(endpoint, shard_key)
        send = self._prepare(desired, backend, meta, [data, arguments], future_id, pending)
        copies = [self._prepare_shadow(desired, shadow, meta, [data, arguments]) for shadow in shadows]
        self._runtime.post(send)
        for copy in copies:
            self._runtime.post(copy)

    def _prepare(
        self, desired: Desired, backend: str, meta: Meta, content: list[Any], future_id: str, pending: concurrent.futures.Future[Result]
    ) -> Callable[[], None]:
        content_type, body = encode_value(content, self._signer, Claim("request", backend, future_id))
        config = desired.backends[backend].config

        def send() -> None:
            try:
                ticket = self._caller.send(
                    backend,
                    body,
                    content_type,
                    meta,
                    origin="handle",
                    timeout_s=config.request_timeout_s,
                    future_id=future_id,
                    at_most_once=config.delivery == "at_most_once",
                )
            except MQServeError as error:
                pending.set_exception(error)
            else:
                ticket.future.add_done_callback(lambda done: _pass_on(done, pending))

        return send

    def _prepare_shadow(self, desired: Desired, backend: str, meta: Meta, content: list[Any]) -> Callable[[], None]:
        shadow_id = mint_id()  # a seal is good for one id and one backend, so each copy has its own
        content_type, body = encode_value(content, self._signer, Claim("request", backend, shadow_id))
        timeout_s = desired.backends[backend].config.request_timeout_s
        return lambda: self._caller.send_shadow(
            backend, body, content_type, meta, origin="handle", timeout_s=timeout_s, shadow_id=shadow_id
        )

    async def _send_later(
        self, meta: Meta, shard_key: str, data: Any, arguments: dict[str, Any], future_id: str, pending: concurrent.futures.Future[Result]
    ) -> None:
        try:
            if meta.endpoint not in self.desired.endpoints:
                await self._until_there(meta.endpoint)
            data = await _resolved(data)
            arguments = {name: await _resolved(value) for name, value in arguments.items()}
            await asyncio.to_thread(self._send_now, meta, shard_key, data, arguments, future_id, pending)
        except Exception as error:
            if not pending.done():
                pending.set_exception(error)

    async def _is_there(self, endpoint: str) -> bool | None:
        self.desired = Desired.from_bytes(await self._links.store.get(self._links.keys.desired))
        return True if endpoint in self.desired.endpoints else None

    async def _until_there(self, endpoint: str) -> None:
        try:
            await until(self._links.store, lambda: self._is_there(endpoint), APPEAR_BUDGET_S)
        except TimeoutError:
            raise UnknownEndpoint(f"Endpoint '{endpoint}' does not exist, and did not appear within {APPEAR_BUDGET_S:g} s.") from None

    def future(self, future_id: str, backend: str | None) -> Future:
        """See `Client.future`."""
        keys = [future_id] if backend is None else [f"{backend}/{future_id}"]
        if backend is not None and len(future_id) == MINTED_ID_LENGTH:
            keys.append(future_id)  # it may be either
        found: list[str] = []

        async def find() -> Result:
            async with asyncio.timeout(WAIT_LIMIT_S):
                key, result = await self._caller.first_result(keys)
            found.append(key)
            return result

        return Future(future_id, self._runtime.submit(find()), lambda result: read_result(result, found[0], self._signer, backend))


async def _resolved(value: Any) -> Any:
    return await value if isinstance(value, Future) else value


def _pass_on(done: asyncio.Future[Result], pending: concurrent.futures.Future[Result]) -> None:
    if not pending.set_running_or_notify_cancel():
        return
    if done.cancelled():
        pending.set_exception(InstanceError("the client was shut down before the result arrived"))
    elif (error := done.exception()) is not None:
        pending.set_exception(error)
    else:
        pending.set_result(done.result())
