"""WebSockets to ASGI backends, by the `websockets` client, in both forms."""

import asyncio
import json
import os
import socket as sockets_of_python
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from urllib.parse import quote

import httpx
import pytest
from websockets import Subprotocol
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect

import mqserve as serve
from mqserve.replicas import stuck
from tests import socket_apps
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally

HANDSHAKE = "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


class Sockets:
    """Mounts apps for one test, or a module; returns the ws:// URL of their prefix."""

    def __init__(self, client: serve.Client) -> None:
        self._client = client
        self._names: list[str] = []

    def __call__(self, app: Any, *args: Any, **options: Any) -> str:
        name = new_name("ws")
        self._client.mount(f"/{name}", app, *args, **options)
        self._names.append(name)
        return f"{self._client.http_url().replace('http', 'ws', 1)}/{name}"

    def undo(self) -> None:
        for name in self._names:
            self._client.delete_endpoint(name)
            self._client.delete_backend(name)


@pytest.fixture(scope="module")
def url(client: serve.Client) -> Iterator[str]:
    """The URL of the FastAPI app, which most tests ask."""
    sockets = Sockets(client)
    yield sockets(socket_apps.app)
    sockets.undo()


@pytest.fixture
def mount(client: serve.Client) -> Iterator[Sockets]:
    sockets = Sockets(client)
    yield sockets
    sockets.undo()


def echoes(socket: ClientConnection, said: str | bytes) -> bool:
    socket.send(said)
    return socket.recv(timeout=20) == said


def ended(socket: ClientConnection) -> tuple[int, str]:
    """The code and the reason with which the server closes it."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            socket.recv(timeout=30)
    assert closed.value.rcvd is not None, closed.value
    return closed.value.rcvd.code, closed.value.rcvd.reason


def denied(url: str) -> Response:
    with pytest.raises(InvalidStatus) as refused, connect(url):
        pass
    return refused.value.response


def problem_of(answer: Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    return str(json.loads(answer.body or b"")["detail"])


def is_taken(url: str) -> bool:
    try:
        with connect(url):
            return True
    except InvalidStatus:
        return False


def dial(address: str) -> sockets_of_python.socket:
    host, port = address.split(":")
    return sockets_of_python.create_connection((host, int(port)), timeout=20)


def vanish(socket: ClientConnection) -> None:
    """Ends the connection without a close."""
    socket.socket.shutdown(sockets_of_python.SHUT_RDWR)


def wait_for(tally: Tally, lines: int) -> None:
    wait_until(lambda: len(tally) == lines)


def stands_still(count: Callable[[], int]) -> None:
    """Returns when a count that has begun has not changed for a second."""
    wait_until(count)
    before, since = count(), time.monotonic()

    def is_still() -> bool:
        nonlocal before, since
        if (now := count()) != before:
            before, since = now, time.monotonic()
        return time.monotonic() - since > 1

    wait_until(is_still)


# What is said.


def test_text_and_bytes_come_back_in_order(url: str) -> None:
    with connect(f"{url}/echo") as socket:
        for number in range(300):
            socket.send(f"text {number} ü")
            socket.send(b"bytes %d \xff" % number)
        assert [socket.recv(timeout=20) for _ in range(600)] == [
            said for number in range(300) for said in (f"text {number} ü", b"bytes %d \xff" % number)
        ]
        assert echoes(socket, "") and echoes(socket, b"")


@pytest.mark.anyio
async def test_sessions_of_one_replica_run_side_by_side(url: str) -> None:
    async def talk(number: int) -> None:
        async with connect_async(f"{url}/echo") as socket:
            for turn in range(20):
                await socket.send(f"{number} {turn}")
                assert await socket.recv() == f"{number} {turn}"

    async with asyncio.timeout(60):
        await asyncio.gather(*(talk(number) for number in range(50)))


def test_sixteen_megabytes_go_both_ways_in_one_message(url: str) -> None:
    whole = os.urandom(16 * 1024 * 1024)
    with connect(f"{url}/echo", max_size=None) as socket:
        assert echoes(socket, whole)
        assert echoes(socket, "after it")


def test_a_larger_message_ends_its_session_with_1009(url: str) -> None:
    with connect(f"{url}/echo", max_size=None) as socket:
        socket.send(b"x" * (16 * 1024 * 1024 + 1))
        assert ended(socket) == (1009, ANY)


def test_text_that_is_none_ends_its_session_with_1007(url: str) -> None:
    with connect(f"{url}/echo") as socket:
        socket.send(b"\xff\xfe", text=True)
        assert ended(socket) == (1007, ANY)


def test_a_client_that_breaks_the_protocol_under_what_the_app_sends_is_no_bug(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tally = Tally(tmp_path)
    with connect(f"{url}/pours?tally={tally.path}&count=2000", max_queue=1) as socket:
        stands_still(lambda: len(tally))
        socket.send(b"\xff\xfe", text=True)
        assert ended(socket) == (1007, ANY)
    wait_until(lambda: "left 1006" in tally.lines)
    assert not [record for record in caplog.records if "a bug in mqserve" in record.message]


def test_an_app_of_starlette_has_websockets_too(mount: Sockets) -> None:
    with connect(f"{mount(socket_apps.starlette_app)}/echo") as socket:
        assert all(echoes(socket, str(number)) for number in range(10))


def test_routes_of_an_ingress_class_share_its_instance(mount: Sockets) -> None:
    url = mount(socket_apps.Counter)
    with connect(f"{url}/count") as one, connect(f"{url}/count") as other:
        for number, socket in enumerate((one, other, one), start=1):
            socket.send("count me")
            assert socket.recv(timeout=20) == f"hello {number}"


def test_the_app_gets_the_scope_of_its_prefix(url: str) -> None:
    prefix = "/" + url.rpartition("/")[2]
    with connect(f"{url}/scope/7?a=1", additional_headers={"X-Mine": "yes"}) as socket:
        told = json.loads(socket.recv(timeout=20))
    assert told == {
        "type": "websocket", "scheme": "ws", "path": f"{prefix}/scope/7", "root_path": prefix, "http_version": "1.1",
        "number": 7, "query": "a=1", "header": "yes", "url": f"{url}/scope/7?a=1",
    }  # fmt: skip


# Handshakes.


def test_the_app_chooses_the_subprotocol_and_sets_headers(url: str) -> None:
    with connect(f"{url}/echo", subprotocols=[Subprotocol("chat"), Subprotocol("other")]) as socket:
        assert socket.subprotocol == "chat" and socket.response is not None
        assert socket.response.headers["x-from"] == "the app" and socket.response.headers["connection"] == "Upgrade"
        assert len(socket.response.headers["x-request-id"]) == 32
        assert not socket.response.headers.get("sec-websocket-extensions")


def test_a_subprotocol_that_no_header_can_carry_is_an_error_of_the_app(url: str) -> None:
    assert denied(f"{url}/chooses?subprotocol={quote('chat' + chr(13) + chr(10) + 'x-evil: 1')}").status_code == 500


def test_a_denial_of_the_app_is_answered_before_the_upgrade(url: str) -> None:
    assert denied(f"{url}/refused").status_code == 403
    answer = denied(f"{url}/denied")
    assert (answer.status_code, json.loads(answer.body or b""), answer.headers["www-authenticate"]) == (401, {"why": "no ticket"}, "Ticket")


def test_an_app_that_fails_before_it_accepts_is_a_500(url: str) -> None:
    assert denied(f"{url}/raises-early").status_code == denied(f"{url}/forgets").status_code == 500


def test_an_unknown_path_is_a_404(url: str) -> None:
    assert denied(url.rpartition("/")[0] + "/nowhere").status_code == 404
    assert denied(f"{url}/nowhere").status_code == 403  # the app's own answer


def test_a_backend_that_is_no_app_takes_no_websockets(deploy: Deploy) -> None:
    plain = deploy.at(lambda request: "plain")
    answer = denied(plain.replace("http", "ws", 1))
    assert answer.status_code == 404 and "takes no WebSockets" in problem_of(answer)
    assert httpx.get(plain).text == "plain"


def test_the_path_of_a_websocket_is_nothing_to_a_plain_request(url: str) -> None:
    http = url.replace("ws", "http", 1)
    assert httpx.get(f"{http}/echo").status_code == 404
    assert httpx.get(f"{http}/plain", headers={"connection": "upgrade", "upgrade": "h2c"}).json() == "plain"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\n", 400),  # no key
        (f"{HANDSHAKE}Sec-WebSocket-Version: 12\r\n", 400),
        (f"{HANDSHAKE}Sec-WebSocket-Version: 13\r\nContent-Length: 3\r\n", 400),
        (f"{HANDSHAKE}Sec-WebSocket-Version: 13\r\nTransfer-Encoding: chunked\r\n", 400),
        (f"{HANDSHAKE}Sec-WebSocket-Version: 13\r\nHost: another\r\n", 400),
        (f"{HANDSHAKE}Sec-WebSocket-Version: 13\r\nX-Large: {'x' * 70_000}\r\n", 431),
    ],
)
def test_a_malformed_handshake_is_refused(url: str, head: str, status: int) -> None:
    host, path = url.removeprefix("ws://").split("/")
    with closing(dial(host)) as wire:
        wire.sendall(f"GET /{path}/echo HTTP/1.1\r\nHost: {host}\r\n{head}\r\n".encode())
        assert wire.makefile("rb").readline().split()[1] == str(status).encode()


def test_large_headers_arrive(url: str) -> None:
    with connect(f"{url}/scope/1", additional_headers={"X-Mine": "x" * 30_000}) as socket:
        assert len(json.loads(socket.recv(timeout=20))["header"]) == 30_000


def test_a_handshake_that_no_app_answers_in_time_is_a_504(mount: Sockets, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    url = mount("tests.socket_apps:app", config={"request_timeout_s": 0.5})
    assert denied(f"{url}/late?gate={tmp_path / 'never'}&tally={tally.path}").status_code == 504
    wait_until(lambda: tally.lines == ["asked", "cancelled"])


def test_a_client_that_leaves_during_the_handshake_cancels_it(url: str, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    with pytest.raises(TimeoutError), connect(f"{url}/late?gate={tmp_path / 'never'}&tally={tally.path}", open_timeout=0.5):
        pass
    wait_until(lambda: tally.lines == ["asked", "cancelled"])


def test_a_client_that_speaks_before_the_answer_is_refused(url: str, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    host, path = url.removeprefix("ws://").split("/")
    head = f"GET /{path}/late?gate={tmp_path / 'never'}&tally={tally.path} HTTP/1.1\r\nHost: {host}\r\n"
    with closing(dial(host)) as wire:
        wire.sendall(f"{head}{HANDSHAKE}Sec-WebSocket-Version: 13\r\n\r\n".encode())
        wait_for(tally, 1)
        wire.sendall(b"\x81\x80abcd")  # an empty text
        assert wire.makefile("rb").readline().split()[1] == b"400"
        wait_until(lambda: tally.lines == ["asked", "cancelled"])


def test_a_replica_has_max_sessions_and_not_one_more(mount: Sockets) -> None:
    url = mount("tests.socket_apps:app", config={"max_sessions": 2})
    with connect(f"{url}/echo"), connect(f"{url}/echo") as second:
        answer = denied(f"{url}/echo")
        assert answer.status_code == 503 and "max_sessions" in problem_of(answer) and answer.headers["retry-after"] == "1"
        second.close()
        wait_until(lambda: is_taken(f"{url}/echo"))


def test_sessions_take_no_room_of_requests(mount: Sockets) -> None:
    url = mount("tests.socket_apps:app", config={"max_concurrent_queries": 1})
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(f"{url}/echo")) for _ in range(5)]
        assert httpx.get(f"{url.replace('ws', 'http', 1)}/plain").json() == "plain"
        assert all(echoes(socket, "here") for socket in sockets)


# Ends.


def test_the_app_closes_with_a_code_and_a_reason(url: str) -> None:
    for code, reason in ((1000, ""), (3456, "for a reason"), (4999, "ü" * 60)):
        with connect(f"{url}/closes?code={code}&reason={quote(reason)}") as socket:
            assert socket.recv(timeout=20) == "before"
            assert ended(socket) == (code, reason)


def test_a_reason_that_no_close_has_room_for_is_cut_between_two_characters(url: str) -> None:
    with connect(f"{url}/closes?code=3001&reason={quote('ü' * 100)}") as socket:
        assert socket.recv(timeout=20) == "before"
        assert ended(socket) == (3001, "ü" * 61)


def test_the_app_hears_how_its_client_has_ended(url: str, tmp_path: Path) -> None:
    def close_plainly(socket: ClientConnection) -> None:
        socket.close()

    def close_with_a_code(socket: ClientConnection) -> None:
        socket.close(3001, "done")

    for close, heard in ((close_plainly, "1000 "), (close_with_a_code, "3001 done"), (vanish, "1006 ")):
        tally = Tally(tmp_path)
        with connect(f"{url}/hears?tally={tally.path}") as socket:
            socket.send("one")
            socket.send("two")
            wait_for(tally, 2)
            close(socket)
            wait_for(tally, 3)
        assert tally.lines == ["one", "two", heard]


def test_an_app_that_raises_is_a_1011_and_one_that_returns_a_1000(url: str) -> None:
    with connect(f"{url}/raises") as socket:
        assert ended(socket) == (1011, "")
    with connect(f"{url}/returns") as socket:
        assert ended(socket) == (1000, "")


def test_sending_after_the_close_raises_in_the_app(mount: Sockets, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    with connect(f"{mount(socket_apps.plain_app)}/?{tally.path}") as socket:
        assert socket.recv(timeout=20) == b"one" and ended(socket) == (3001, "done")
    wait_until(lambda: len(tally))
    assert tally.lines[0].startswith("websocket.disconnect 3001 Unexpected ASGI message 'websocket.send'")


def test_a_replica_that_ends_closes_its_sessions_with_1012(client: serve.Client, tmp_path: Path) -> None:
    sockets, tally = Sockets(client), Tally(tmp_path)
    url = sockets("tests.socket_apps:app", config={"graceful_shutdown_timeout_s": 0.5})
    with connect(f"{url}/hears?tally={tally.path}") as socket:
        socket.send("one")
        wait_until(lambda: len(tally))
        sockets.undo()
        assert ended(socket) == (1012, ANY)
    wait_until(lambda: len(tally) > 1)
    assert tally.lines[1].startswith("1012")


def test_an_app_that_blocks_its_loop_ends_all_sessions_of_its_replica_with_1012_and_another_replica_serves(
    client: serve.Client, mount: Sockets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stuck, "STUCK_AFTER_S", 1.0)  # in this process; those of the distributed form take their ten seconds
    gate = tmp_path / "gate"
    url = mount("tests.socket_apps:app")
    with connect(f"{url}/blocks?gate={gate}") as blocking, connect(f"{url}/echo") as other:
        assert echoes(other, "before")
        blocking.send("now")
        assert ended(other) == (1012, ANY)
        assert ended(blocking) == (1012, ANY)
    wait_until(lambda: is_taken(f"{url}/echo"))
    gate.touch()


def test_sessions_go_on_while_their_replica_drains(client: serve.Client, mount: Sockets) -> None:
    url = mount("tests.socket_apps:app", config={"graceful_shutdown_timeout_s": 30})
    name = url.rpartition("/")[2]
    with connect(f"{url}/echo") as socket, ThreadPoolExecutor() as threads:
        assert echoes(socket, "before")
        updating = threads.submit(client.update_backend, name, "tests.socket_apps:app")
        wait_until(lambda: is_taken(f"{url}/echo"))
        assert echoes(socket, "during")
        socket.close()
        updating.result(timeout=30)


# Credit.


def test_a_slow_client_pauses_the_app(url: str, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    with connect(f"{url}/pours?tally={tally.path}&count=2000", max_queue=1) as socket:
        assert str(socket.recv(timeout=20)).startswith("0 ")
        stands_still(lambda: len(tally))
        assert len(tally) < 500
        for number in range(1, 2000):
            assert str(socket.recv(timeout=20)).startswith(f"{number} ")


def test_a_client_that_leaves_ends_an_app_that_waits_to_send(url: str, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    with connect(f"{url}/pours?tally={tally.path}&count=2000", max_queue=1) as socket:
        stands_still(lambda: len(tally))
        vanish(socket)
        wait_until(lambda: "left 1006" in tally.lines)


def test_a_slow_app_pauses_its_client(url: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    sent = 0

    async def pour() -> None:
        nonlocal sent
        async with connect_async(f"{url}/slow?gate={gate}") as socket:
            for sent in range(1, 2001):  # noqa: B007  # the test reads it
                await socket.send(socket_apps.CHUNK)
            await socket.send("end")
            assert await socket.recv() == str(2000 * len(socket_apps.CHUNK))

    with ThreadPoolExecutor() as threads:
        pouring = threads.submit(asyncio.run, pour())
        stands_still(lambda: sent)
        assert 0 < sent < 500
        gate.touch()
        pouring.result(timeout=60)
