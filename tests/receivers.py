"""Receivers of webhooks for the tests: HTTP servers of this process that note what comes, and answer as they are told."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = tuple[int, dict[str, str]]


class Received(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """`answer` returns the status and headers for each request, of which it gets the number. Those that were answered with success are
    in `taken`, too."""

    def __init__(self, address: str, port: int, answer: Callable[[int], Answer]) -> None:
        self.received: list[Received] = []
        self.taken: list[Received] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received = Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                receiver.received.append(received)
                status, headers = answer(len(receiver.received))
                if status < 300:
                    receiver.taken.append(received)
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer((address, port), Handler)
        self.port = int(self.server.server_address[1])


@contextmanager
def receiving(
    answer: Callable[[int], Answer] = lambda number: (200, {}), *, address: str = "127.0.0.1", port: int = 0
) -> Iterator[Receiver]:
    receiver = Receiver(address, port, answer)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()
