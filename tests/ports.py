"""Ports of the loopback interface for the servers and programs of the tests."""

import os
import random
import socket

_given_ports: set[int] = set()


def _ports_of_this_worker() -> range:
    """A share of the ports for each of pytest-xdist's workers, since one probes a port while another has it but does not listen yet."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return range(20_000 + number % workers, 30_000, workers)


PORTS = _ports_of_this_worker()


def free_port() -> int:
    """A free port of the loopback interface; never the same one twice.

    Below the ephemeral ports: a client that dials a stopped server may be given the server's port as its own, and then
    either talks to itself or keeps the server from coming back.
    """
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given_ports:
            _given_ports.add(port)
            return port
