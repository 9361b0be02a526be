"""Taskiq with RabbitMQ and results in Redis: python server.py starts its worker; client.py imports the task."""

import os
import sys

from taskiq_aio_pika import AioPikaBroker
from taskiq_redis import RedisAsyncResultBackend

broker = AioPikaBroker(os.environ["PEER_BROKER_URL"]).with_result_backend(RedisAsyncResultBackend(os.environ["PEER_STORE_URL"]))


@broker.task(task_name="noop")
async def noop() -> str:
    return "ok"


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "taskiq", "worker", "server:broker", "--workers", "1", "--log-level", "WARNING"])
