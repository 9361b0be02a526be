"""Calls the task of server.py. Celery waits for results in plain code alone."""

import asyncio

from in_flight import Caller
from server import noop

assert noop.delay().get(timeout=60) == "ok"
asyncio.run(Caller(begin=noop.delay, finish=lambda result: result.get(timeout=60)).serve())
