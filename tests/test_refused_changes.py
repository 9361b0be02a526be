"""A change that a proxy refuses is undone, but not what somebody else did meanwhile. The proxy is one that only beats."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.convertors import StringConvertor

from mqserve.broker.errors import BackendFailed
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.code import Code, pack
from mqserve.client.deployments import Deployments
from mqserve.client.membership import Membership
from mqserve.connections import Connections
from mqserve.controller import changes
from mqserve.controller.state.beats import ProxyBeat
from mqserve.controller.state.documents import Desired, HttpOptions
from mqserve.controller.state.reading import read_desired

pytestmark = pytest.mark.anyio

BEFORE = Desired(instance="i", version=1, http=HttpOptions(middlewares="before"), convertors={"hex": "before"})
TEXT = StringConvertor()
CODE = pack("some.module:thing", (), Settings.read({}).signer)

Refused = Callable[[Deployments, Code], Coroutine[Any, Any, None]]
CHANGES: dict[str, tuple[Refused, changes.Change]] = {
    "middlewares": (lambda deployments, code: deployments.set_middlewares(code), changes.set_middlewares("others")),
    "convertor": (lambda deployments, code: deployments.register_convertor("hex", code, TEXT), changes.register_convertor("hex", "others")),
    "first-convertor": (
        lambda deployments, code: deployments.register_convertor("new", code, TEXT),
        changes.register_convertor("new", "others"),
    ),
}


class Instance:
    """Its documents, and a proxy that refuses what comes after BEFORE; `meanwhile` is what somebody commits in the moment before."""

    def __init__(self) -> None:
        settings = Settings.read({})
        self.store, self.keys = EmbeddedStore(), StoreKeys(settings.namespace)
        connections = Connections(settings, EmbeddedQueue(), self.store, self.keys, "test")
        self.deployments = Deployments(connections, Membership(connections, "i", owns=True), lambda desired: None)

    async def desired(self) -> Desired:
        return read_desired(await self.store.get(self.keys.desired))

    async def refuse(self, meanwhile: changes.Change | None) -> None:
        await self.store.set(self.keys.desired, BEFORE.to_bytes())
        await self._beat(follows=(1, 1))
        while (desired := await self.desired()).version == 1:
            await asyncio.sleep(0)
        if meanwhile is not None:
            await changes.commit(self.store, self.keys, "i", meanwhile)
            desired = await self.desired()  # the proxy reads both at once
        await self._beat(follows=(1, 1), refuses=(desired.epoch, desired.version), refused="it cannot be made")

    async def _beat(self, **facts: Any) -> None:
        beat = ProxyBeat("p", self.store.now_ms(), **facts)
        await self.store.put_field(self.keys.beats, beat.field, beat.to_bytes())
        await self.store.announce()


async def refused(change: Refused, meanwhile: changes.Change | None) -> Desired:
    """The document that is left."""
    instance = Instance()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(instance.refuse(meanwhile))
        await asyncio.sleep(0)
        with pytest.raises(BackendFailed, match="it cannot be made"):
            await change(instance.deployments, CODE)
    return await instance.desired()


@pytest.mark.parametrize("kind", CHANGES)
async def test_what_a_proxy_refuses_is_undone(kind: str) -> None:
    change, _ = CHANGES[kind]
    left = await refused(change, None)
    assert (left.http, left.convertors, left.version) == (BEFORE.http, BEFORE.convertors, 3)


@pytest.mark.parametrize("kind", CHANGES)
async def test_what_somebody_set_meanwhile_is_not_undone(kind: str) -> None:
    change, meanwhile = CHANGES[kind]
    left = await refused(change, meanwhile)
    expected = meanwhile(BEFORE)
    assert (left.http, left.convertors) == (expected.http, expected.convertors)
