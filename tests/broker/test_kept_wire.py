"""A connection to Redis that is kept: one for all who ask, another one when it has ended, and none after the close."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from mqserve.broker.redis.client import blocking_client
from mqserve.broker.redis.hot_wire import HotWire, Lost, dial
from mqserve.broker.redis.kept_wire import KeptWire
from tests.broker.odd_redis import OddRedis, odd_redis
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


class Dials:
    """Dials the server, and keeps what it dialled; with `may_go_on` cleared it waits at the end of each dial."""

    def __init__(self, server: OddRedis) -> None:
        self._client = blocking_client(server.url)
        self.wires: list[HotWire] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def __call__(self) -> HotWire:
        wire = await dial(self._client, 10)
        self.wires.append(wire)
        await self.may_go_on.wait()
        return wire


@pytest.fixture
async def server() -> AsyncIterator[OddRedis]:
    async with odd_redis() as server:
        yield server


async def test_all_who_ask_share_one_connection(server: OddRedis) -> None:
    dials = Dials(server)
    wire = KeptWire(dials, 10)
    assert wire.wire is None
    assert await asyncio.gather(*(wire.ask("GET", "a") for _ in range(5))) == [b"OK"] * 5
    assert [wire.wire] == dials.wires
    wire.close()


async def test_another_one_is_dialled_after_a_silence_and_after_a_hang_up(server: OddRedis) -> None:
    dials = Dials(server)
    wire = KeptWire(dials, 0.2)
    server.answers["GET"] = [b"", b"+once more\r\n"]
    assert await wire.ask("GET", "a") == b"once more"
    assert len(dials.wires) == 2
    wire.hang_up()
    assert await wire.ask("GET", "a") == b"once more"
    assert len(dials.wires) == 3
    wire.close()


async def test_after_the_close_nothing_is_opened(server: OddRedis) -> None:
    dials = Dials(server)
    wire = KeptWire(dials, 10)
    await wire.open()
    wire.close()
    for asked in (wire.ask("GET", "a"), wire.open()):
        with pytest.raises(Lost, match="closed by this process"):
            await asked
    assert len(dials.wires) == 1 and not dials.wires[0].is_open


async def test_what_is_being_dialled_at_the_close_is_closed_too(server: OddRedis) -> None:
    dials = Dials(server)
    wire = KeptWire(dials, 10)
    dials.may_go_on.clear()
    asked = [asyncio.create_task(wire.ask("GET", "a")) for _ in range(3)]
    await until(lambda: dials.wires)
    wire.close()
    dials.may_go_on.set()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(end) for end in ends] == [Lost] * 3
    assert len(dials.wires) == 1 and not dials.wires[0].is_open
