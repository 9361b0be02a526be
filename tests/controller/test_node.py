"""A node and its proxies: one follows another at once, under an id of its own. The children are of the test's making."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from mqserve.broker.embedded_store import EmbeddedStore
from mqserve.broker.lifeline import Stop
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.node import Node, NodeOptions, Share
from mqserve.controller.state import Beat, Desired, Observed

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")


class Child:
    """Ends when it is told to, or by `end`."""

    pid = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = 0
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def end(self, how: str = "") -> None:
        if not self._ended.done():
            self._ended.set_result(how)

    def stop(self) -> None:
        self.told += 1

    def kill(self) -> None:
        self.end("killed")


class Launcher:
    def __init__(self) -> None:
        self.proxies: list[Child] = []
        self.is_listening = False

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> Child:
        return Child(replica_id)

    def proxy(self, proxy_id: str, host: str, port: int, node: str) -> Child:
        self.is_listening = True
        self.proxies.append(Child(proxy_id))
        return self.proxies[-1]

    def stop_listening(self) -> None:
        self.is_listening = False


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_node(store: EmbeddedStore, launcher: Launcher) -> AsyncIterator[None]:
    """A node that is to run a proxy, which has started one."""
    stop = Stop()
    await store.set(KEYS.desired, Desired().to_bytes())
    await store.set(KEYS.observed, Observed(epoch=1, proxies=("n",)).to_bytes())
    node = asyncio.create_task(Node(NodeOptions("n"), store, KEYS, launcher).run(stop))
    try:
        await until(lambda: launcher.proxies)
        yield
    finally:
        stop.set()
        for proxy in launcher.proxies:
            proxy.end()
        await node


async def says(store: EmbeddedStore, proxy: Child, state: str) -> None:
    beat = Beat("proxy", proxy.name, store.now_ms(), state=state, node="n")
    await store.put_field(KEYS.beats, beat.field, beat.to_bytes())
    await store.announce()


async def test_a_proxy_that_drains_is_followed_at_once() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        (old,) = launcher.proxies
        await says(store, old, "draining")
        await until(lambda: len(launcher.proxies) == 2)
        new = launcher.proxies[1]
        assert new.name != old.name and new.name.startswith("proxy-n#")
        old.end()
        await asyncio.sleep(0.1)
        assert len(launcher.proxies) == 2 and not new.told


async def test_the_beat_of_a_dead_proxy_goes() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        (dead,) = launcher.proxies
        await says(store, dead, "ready")
        dead.kill()
        await until(lambda: len(launcher.proxies) == 2)
        fields = await store.fields(KEYS.beats)
        async with asyncio.timeout(20):
            while f"proxy:{dead.name}" in fields:
                await asyncio.sleep(0.02)
                fields = await store.fields(KEYS.beats)


async def test_a_node_without_a_proxy_does_not_listen() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        assert launcher.is_listening
        assert await store.replace(KEYS.observed, await store.get(KEYS.observed), Observed(epoch=1, version=1).to_bytes())
        await until(lambda: not launcher.is_listening)
        assert launcher.proxies[0].told and len(launcher.proxies) == 1
