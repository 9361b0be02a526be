"""The fault tools themselves: a test on a wire that does nothing would prove nothing."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.faults.wire import Wire
from tests.instances import wait_until
from tests.ports import free_port

PATIENCE_S = 0.3  # what does not come in this time is held


@pytest.fixture
def echo() -> Iterator[str]:
    """The URL of a server that says what it hears."""
    listener = socket.create_server(("127.0.0.1", free_port()))

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while heard := connection.recv(65536):
                connection.sendall(heard)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def wire(echo: str) -> Iterator[Wire]:
    with Wire(echo) as wire:
        yield wire


@pytest.fixture
def end(wire: Wire) -> Iterator[socket.socket]:
    """A client's end of the wire, with a server that has answered."""
    host, port = wire.url.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        assert says(connection, b"hello") == b"hello"
        yield connection


def says(connection: socket.socket, words: bytes) -> bytes:
    connection.sendall(words)
    return connection.recv(65536)


def hears_nothing(connection: socket.socket) -> bool:
    connection.settimeout(PATIENCE_S)
    try:
        connection.recv(65536)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(10)
    return False


def test_a_wire_with_a_delay_takes_it_both_ways(wire: Wire, end: socket.socket) -> None:
    wire.delay(0.1)
    began = time.monotonic()
    assert says(end, b"slow") == b"slow"
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("fault", [Wire.blackhole, Wire.hold_answers])
def test_what_is_held_arrives_when_the_wire_is_mended(wire: Wire, end: socket.socket, fault: object) -> None:
    fault(wire)  # type: ignore[operator]
    end.sendall(b"held")
    assert hears_nothing(end)
    wire.mend()
    assert end.recv(100) == b"held"


def test_a_reset_wire_says_so(wire: Wire, end: socket.socket) -> None:
    wire.reset()
    with pytest.raises(ConnectionResetError):
        end.recv(1)
    wait_until(lambda: wire.connections == 0)


def test_a_finished_wire_ends_in_order(wire: Wire, end: socket.socket) -> None:
    wire.finish()
    assert end.recv(1) == b""
    wait_until(lambda: wire.connections == 0)


def test_a_half_closed_wire_still_takes_what_is_said(wire: Wire, end: socket.socket) -> None:
    wire.half_close()
    assert end.recv(1) == b""
    end.sendall(b"anybody there?")
    assert wire.connections == 1


def test_a_wire_that_drops_after_some_bytes_does(wire: Wire, end: socket.socket) -> None:
    wire.drop_after(4)
    assert says(end, b"four"[:3]) == b"fou"
    end.sendall(b"more")
    with pytest.raises(ConnectionResetError):
        while end.recv(100):
            pass


def test_a_wire_that_refuses_resets_new_connections(wire: Wire, end: socket.socket) -> None:
    wire.refuse()
    host, port = wire.url.removeprefix("tcp://").split(":")
    with pytest.raises(ConnectionResetError), socket.create_connection((host, int(port)), timeout=10) as other:
        other.recv(1)


def test_a_stranded_connection_is_held_for_good_and_a_new_one_is_not(wire: Wire, end: socket.socket) -> None:
    wire.strand()
    end.sendall(b"held")
    assert hears_nothing(end)
    host, port = wire.url.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as other:
        assert says(other, b"hello") == b"hello"
    reset_by(end)
    wait_until(lambda: wire.connections == 1)  # the server of the stranded one has heard of nothing


def test_clients_can_be_reset_without_the_server_knowing(wire: Wire, end: socket.socket) -> None:
    wire.reset_clients()
    with pytest.raises(ConnectionResetError):
        end.recv(1)
    time.sleep(PATIENCE_S)
    assert wire.connections == 1


def reset_by(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
