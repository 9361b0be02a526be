"""HTTP byte by byte: bare sockets, and the edge of a proxy alone, under an app that does what its paths say."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import uvicorn

from mqserve.proxy.edge import EdgeProtocol

GIVEN_S = 30.0


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """Exactly one line of it, or none."""
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, found
        return found[0] if found else ""

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection to a proxy, byte by byte."""

    def __init__(self, url: str) -> None:
        parsed = httpx.URL(url)
        self._socket = socket.create_connection((parsed.host, parsed.port), timeout=GIVEN_S)
        self._stream = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def send_no_more(self) -> None:
        """A FIN: this side is closed, and the other one open for the answers."""
        self._socket.shutdown(socket.SHUT_WR)

    def peek(self) -> bytes:
        """The first byte of what is to come, once it is there."""
        return self._socket.recv(1, socket.MSG_PEEK)

    def answer(self, *, bodiless: bool = False) -> Answer | None:
        """The next one, or None when the proxy has closed."""
        line = self._stream.readline()
        if not line:
            return None
        status = int(re.fullmatch(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", line)[1])  # type: ignore[index]
        headers = []
        while (line := self._stream.readline()) != b"\r\n":
            name, value = re.fullmatch(rb"([^:\s]+): ([^\r\n]*)\r\n", line).groups()  # type: ignore[union-attr]
            headers.append((name.decode().lower(), value.decode("latin-1")))
        length = 0 if bodiless or status == 100 else int(dict(headers).get("content-length", "0"))
        return Answer(status, headers, self._stream.read(length))

    def answers(self) -> list[Answer]:
        """All of them, until the proxy closes."""
        return list(iter(self.answer, None))

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextmanager
def wire(url: str) -> Iterator[Wire]:
    connection = Wire(url)
    try:
        yield connection
    finally:
        connection.close()


def ask(url: str, raw: bytes) -> Answer:
    with wire(url) as connection:
        connection.send(raw)
        answer = connection.answer()
        assert answer is not None, "closed without an answer"
        return answer


def assert_refused(answer: Answer | None, status: int) -> None:
    assert answer is not None, "closed without an answer"
    assert (answer.status, answer.header("content-type"), answer.header("connection")) == (status, "application/problem+json", "close")
    assert answer.json()["status"] == status and answer.json()["detail"]


class Echo:
    """An app that reads the body and answers with it, but answers `/early` at once, `/held` when it may and `/large/…` with so much."""

    def __init__(self) -> None:
        self.left: list[str] = []  # by clients that went away
        self.may_answer = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] == "/held" and not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(scope["path"])
                return
            body, more = body + message["body"], message["more_body"]
        if scope["path"].startswith("/large/"):
            body = bytes(int(scope["path"].removeprefix("/large/")))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


class Edge(NamedTuple):
    url: str
    app: Echo
    end: Callable[[], None]


@contextmanager
def serving(protocol: type[EdgeProtocol] = EdgeProtocol) -> Iterator[Edge]:
    app = Echo()

    def end() -> None:
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=60))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Edge(f"http://127.0.0.1:{listener.getsockname()[1]}", app, end)
        finally:
            app.may_answer.set()
            end()
            thread.join()
