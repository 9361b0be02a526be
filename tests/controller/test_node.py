"""A node and its proxies: one follows another at once, under an id of its own. The children are of the test's making."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from mqserve.broker.files.manifest import read_folders
from mqserve.broker.files.transfer import restore_files, save_files
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.lifeline import Stop
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.code import Code
from mqserve.broker.values.signing import Signer
from mqserve.controller.node import Node, NodeOptions, Share
from mqserve.controller.state.beats import MemberState, NodeBeat, ProxyBeat, beats_of, read_beats
from mqserve.controller.state.documents import Assignment, Backend, Desired, HttpOptions, Observed
from mqserve.controller.state.reading import read_desired
from mqserve.controller.state.resources import Demand

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
SIGNER = Signer([b"k" * 32], "tests")


class Child:
    """Ends when it is told to, or by `end`."""

    pid = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = 0
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

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
        self.replicas: list[Child] = []
        self.is_listening = False
        self.is_full = False

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> Child:
        if backend == "refused":
            raise ValueError("embedded null byte")  # as subprocess says it
        self.replicas.append(Child(replica_id))
        return self.replicas[-1]

    def proxy(self, proxy_id: str, host: str, port: int, node: str, *, shares_port: bool) -> Child:
        if self.is_full:
            raise OSError("no more processes")
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
    node = asyncio.create_task(Node(NodeOptions("n"), store, KEYS, launcher, SIGNER).run(stop))
    try:
        await until(lambda: launcher.proxies)
        yield
    finally:
        stop.set()
        for child in [*launcher.proxies, *launcher.replicas]:
            child.end()
        await node


async def says(store: EmbeddedStore, proxy: Child, state: str) -> None:
    beat = ProxyBeat(proxy.name, store.now_ms(), state=MemberState(state), node="n")
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


async def replace_observed(store: EmbeddedStore, observed: Observed) -> None:
    assert await store.replace(KEYS.observed, await store.get(KEYS.observed), observed.to_bytes())


async def test_an_assignment_that_cannot_be_started_is_said_to_have_ended_and_the_others_run() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        bad = {"refused#1": Assignment("refused", "n", 1), "gone#1": Assignment("gone", "n", 1, Demand(num_gpus=1), gpus=(7,))}
        await replace_observed(store, Observed(epoch=1, version=1, proxies=("n",), replicas={**bad, "b#1": Assignment("b", "n", 1)}))
        await until(lambda: launcher.replicas)

        async def ended() -> dict[str, str]:
            return beats_of(read_beats(await store.fields(KEYS.beats)), NodeBeat)[0].ended

        async with asyncio.timeout(20):
            while set(said := await ended()) != set(bad):
                await asyncio.sleep(0.02)
        assert said["refused#1"] == "embedded null byte"
        assert [replica.name for replica in launcher.replicas] == ["b#1"] and not launcher.proxies[0].told


async def test_what_runs_of_an_instance_that_was_cleared_ends_on_a_node_that_stays() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        await replace_observed(store, Observed(epoch=1, version=1, proxies=("n",), replicas={"b#1": Assignment("b", "n", 1)}))
        await until(lambda: launcher.replicas)
        assert await store.replace(KEYS.desired, await store.get(KEYS.desired), Desired(version=1, closing=True).to_bytes())
        await asyncio.sleep(0.1)
        assert not launcher.replicas[0].told, "its controller says when"
        await store.delete(KEYS.desired, KEYS.observed)
        await store.announce()
        await until(lambda: launcher.replicas[0].told and launcher.proxies[0].told)


async def test_documents_that_are_lost_stop_nothing() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        await store.delete(KEYS.desired, KEYS.observed)
        await store.announce()
        await asyncio.sleep(0.2)
        assert not launcher.proxies[0].told


@pytest.mark.parametrize("first_beats", [False, True])
async def test_a_child_that_hangs_is_killed_whether_or_not_its_beat_is_there(monkeypatch: pytest.MonkeyPatch, first_beats: bool) -> None:
    monkeypatch.setattr("mqserve.controller.node.SILENT_CHILD_AFTER_S", 0.5)
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        (hung,) = launcher.proxies
        if first_beats:
            await says(store, hung, "ready")
            await asyncio.sleep(0.1)
            await store.drop_fields(KEYS.beats, f"proxy:{hung.name}")
        await until(lambda: len(launcher.proxies) == 2)
        assert await hung.wait() == "killed"


async def test_a_replica_that_starts_may_be_silent_for_its_start_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.controller.node.SILENT_CHILD_AFTER_S", 0.5)
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        backends = {name: Backend(name, "sha", name, {"start_timeout_s": timeout_s}) for name, timeout_s in (("hasty", 0.1), ("slow", 60))}
        assert await store.replace(KEYS.desired, await store.get(KEYS.desired), Desired(version=1, backends=backends).to_bytes())
        assigned = {f"{name}#1": Assignment(name, "n", 1) for name in backends}
        await replace_observed(store, Observed(epoch=1, version=1, replicas=assigned))
        await until(lambda: len(launcher.replicas) == 2)
        hasty, slow = sorted(launcher.replicas, key=lambda replica: replica.name)
        await until(lambda: hasty.has_ended)
        assert not slow.has_ended


async def test_a_node_gives_back_the_files_that_a_store_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "app.py").write_text("x = 1\n")
    files = read_folders({tmp_path / "code": ("",)}, ())
    record = Code("f", target="app:f", files=files.sha256).with_seal(SIGNER)
    desired = Desired(instance="i", version=1, backends={"f": Backend("f", record.sha256, "f")})
    store, launcher = EmbeddedStore(), Launcher()
    await save_files(store, KEYS, files)
    await restore_files(store, KEYS, files.sha256)  # as its replicas do
    await store.set(KEYS.code(record.sha256), record.to_bytes())
    names = [KEYS.code(sha256) for sha256 in (files.sha256, *files.manifest.chunks)]
    async with running_node(store, launcher):
        await store.delete(*names)
        await store.set(KEYS.desired, msgspec.structs.replace(desired, epoch=2).to_bytes())
        await store.announce()
        async with asyncio.timeout(10):
            while await store.extend(names, 1):
                await asyncio.sleep(0.01)
    assert await store.get(names[0]) == files.raw


async def set_workers(store: EmbeddedStore, count: int) -> None:
    before = await store.get(KEYS.desired)
    version = read_desired(before).version + 1
    assert await store.replace(KEYS.desired, before, Desired(version=version, http=HttpOptions(workers=count)).to_bytes())


async def test_a_node_runs_as_many_proxies_as_there_are_workers() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        (alone,) = launcher.proxies
        await set_workers(store, 3)
        await until(lambda: len(launcher.proxies) == 4)
        assert alone.told, "it has the port alone, and counts for itself"
        assert [proxy.name.partition("#")[0] for proxy in launcher.proxies[1:]] == ["proxy-n.1", "proxy-n.2", "proxy-n.3"]
        await set_workers(store, 2)
        await until(lambda: [proxy.told for proxy in launcher.proxies] == [1, 0, 0, 1])


async def test_a_worker_that_cannot_live_does_not_delay_the_others() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        await set_workers(store, 2)
        await until(lambda: len(launcher.proxies) == 3)
        for _ in range(3):
            last = max((proxy for proxy in launcher.proxies if ".2#" in proxy.name), key=launcher.proxies.index)
            known = len(launcher.proxies)
            last.end("killed")
            await until(lambda known=known: len(launcher.proxies) > known)  # type: ignore[misc]
        first = launcher.proxies[1]
        first.end("killed")
        async with asyncio.timeout(2):  # less than the pause of the other
            await until(lambda: launcher.proxies[-1].name.startswith("proxy-n.1#"))


async def test_the_reason_of_a_worker_that_failed_stays_until_the_next_one_starts() -> None:
    store, launcher = EmbeddedStore(), Launcher()
    async with running_node(store, launcher):
        await set_workers(store, 2)
        await until(lambda: len(launcher.proxies) == 3)
        failed = launcher.proxies[2]
        await says(store, failed, "failed")
        launcher.is_full = True
        failed.end("exit code 3")
        await asyncio.sleep(0.2)
        assert f"proxy:{failed.name}" in await store.fields(KEYS.beats)
        launcher.is_full = False
        async with asyncio.timeout(20):
            while f"proxy:{failed.name}" in await store.fields(KEYS.beats):
                await asyncio.sleep(0.02)


async def test_proxies_that_die_at_the_same_time_are_all_forgotten_and_the_node_goes_on() -> None:
    class SlowStore(EmbeddedStore):
        async def drop_fields(self, key: str, *fields: str) -> None:
            await asyncio.sleep(0.05)
            await super().drop_fields(key, *fields)

    store, launcher = SlowStore(), Launcher()
    async with running_node(store, launcher):
        await set_workers(store, 2)
        await until(lambda: len(launcher.proxies) == 3)
        dead = launcher.proxies
        for proxy in dead:
            await says(store, proxy, "ready")
        for proxy in list(dead):
            proxy.end("killed")
        await until(lambda: len(launcher.proxies) == 5)
        async with asyncio.timeout(20):
            while any(field.startswith("proxy:") for field in await store.fields(KEYS.beats)):
                await asyncio.sleep(0.02)
