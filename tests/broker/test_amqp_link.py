"""A link to a broker that is not there leaves nothing behind."""

import asyncio
import gc
import logging
import warnings
from contextlib import suppress

import pytest

from mqserve.broker.errors import BrokerUnavailable
from mqserve.broker.rabbitmq.connection import Link
from tests.ports import free_port


def test_connections_dialled_in_vain_may_be_collected_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """aio-pika's `__del__` closes what nobody closed, on the loop of the thread it happens to run in: ours end before."""

    async def main() -> None:
        link = Link(f"amqp://guest:guest@127.0.0.1:{free_port()}/", "link of the tests")
        with suppress(BrokerUnavailable):
            await link.up(2)  # several dials
        await link.close()
        del link
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await asyncio.to_thread(gc.collect)
        assert not caught, caught[0].message

    monkeypatch.setattr(logging.getLogger("aiormq"), "disabled", True)  # pytest keeps its records, and with them the connections
    monkeypatch.setattr(logging.getLogger("aiormq.connection"), "disabled", True)
    gc.collect()
    gc.disable()  # or they may be collected here
    try:
        asyncio.run(main())
    finally:
        gc.enable()
