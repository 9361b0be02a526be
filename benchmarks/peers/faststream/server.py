"""FastStream RPC over RabbitMQ: python server.py starts its worker."""

import os

import uvloop
from faststream import FastStream
from faststream.rabbit import RabbitBroker

broker = RabbitBroker(os.environ["PEER_BROKER_URL"], logger=None)


@broker.subscriber("peer-faststream")
async def noop() -> str:
    return "ok"


if __name__ == "__main__":
    uvloop.run(FastStream(broker).run())
