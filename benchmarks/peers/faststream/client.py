"""Calls server.py by FastStream's RPC, whose replies come to a queue of the caller: they are kept nowhere."""

import os

import uvloop
from aiormq.exceptions import DeliveryError
from faststream.rabbit import RabbitBroker
from in_flight import Caller


async def main():
    async with RabbitBroker(os.environ["PEER_BROKER_URL"], logger=None) as broker:

        async def call():
            return await (await broker.request("", "peer-faststream", timeout=60)).decode()

        while True:  # until server.py has declared its queue
            try:
                await broker.request("", "peer-faststream", timeout=0.5)
                break
            except (TimeoutError, DeliveryError):
                pass
        await Caller(call=call).serve()


uvloop.run(main())
