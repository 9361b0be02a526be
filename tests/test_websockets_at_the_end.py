"""Instances of their own: their end with WebSocket sessions, in both forms, and a middleware that fails."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import ANY

import pytest
from starlette.middleware import Middleware
from websockets.sync.client import connect

from tests import socket_apps
from tests.instances import started, wait_until
from tests.tallies import Tally
from tests.test_websockets import denied, ended


def test_an_instance_that_ends_closes_its_sessions_and_refuses_the_handshakes_that_wait(
    form: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    urls = {name: request.getfixturevalue(name) for name in ("broker_url", "store_url")} if form == "distributed" else {}
    tally = Tally(tmp_path)
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        with started(**urls) as client:
            client.mount("/ws", socket_apps.app)
            url = client.http_url().replace("http", "ws", 1) + "/ws"
            socket = stack.enter_context(connect(f"{url}/echo"))
            stack.enter_context(
                connect(f"{url}/pours?tally={tally.path}&count=2000", max_queue=1, close_timeout=1)
            )  # whose client takes nothing
            waiting = threads.submit(denied, f"{url}/late?gate={tmp_path / 'never'}&tally={tally.path}")
            wait_until(lambda: "asked" in tally.lines)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert ended(socket) == (1001, ANY) and waiting.result(timeout=20).status_code == 503
    assert {"cancelled", "left 1006"} <= {*tally.lines}, tally.lines[-5:]  # Starlette has one code for all that ends a send


def test_a_session_whose_middleware_raises_ends_for_both_sides(tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    with started(middlewares=[Middleware(socket_apps.Chokes)]) as client:
        client.mount("/ws", socket_apps.app)
        url = client.http_url().replace("http", "ws", 1) + "/ws"
        with connect(f"{url}/hears?tally={tally.path}") as socket:
            socket.send("fine")
            socket.send("choke")
            assert ended(socket) == (1011, "")
        wait_until(lambda: tally.lines == ["fine", "1011 "])
