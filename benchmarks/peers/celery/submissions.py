"""Sends the task of server.py, persistent, as Celery does by itself, and confirmed: `apply_async` waits for each confirm."""

import asyncio

from in_flight import Caller
from server import app, noop

app.conf.broker_transport_options = {"confirm_publish": True}
assert noop.apply_async().get(timeout=60) == "ok"
asyncio.run(Caller(begin=noop.apply_async, finish=lambda result: None).serve())
