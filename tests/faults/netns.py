"""A machine of one's own: a network namespace whose only link can be taken down, so that a peer is gone without a FIN.

Only root may make one. The servers listen on the loopback interface, which the namespace does not have: a `Wire` that
listens on `host` leads there.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import refuse

_numbers = itertools.count(1)


class Machine:
    """Made by `machine`. Commands run on it when `command` is put before them."""

    def __init__(self, name: str, host: str, link: str) -> None:
        self.name = name
        self.host = host  # where it sees us
        self._link = link
        self.command = ["ip", "netns", "exec", name]

    def __repr__(self) -> str:
        return f"<Machine {self.name}>"

    def unplug(self) -> None:
        """Nothing gets there or comes from there, and nobody is told."""
        ip("link", "set", self._link, "down")

    def plug_in(self) -> None:
        ip("link", "set", self._link, "up")


@contextmanager
def machine() -> Iterator[Machine]:
    """Skips the test for anybody but root."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    number, process = next(_numbers), os.getpid()
    name, ours, theirs = f"mqserve-{process}-{number}", f"mq{process}a{number}"[:15], f"mq{process}b{number}"[:15]
    subnet = f"10.{200 + process % 50}.{(process // 50 + number) % 250}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:  # root of a container that may not
        refuse(f"no network namespaces here: {error.stderr}")
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        ip("link", "set", theirs, "netns", name)
        ip("addr", "add", f"{subnet}.1/30", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "addr", "add", f"{subnet}.2/30", "dev", theirs)
        for interface in ("lo", theirs):
            ip("-n", name, "link", "set", interface, "up")
        yield Machine(name, f"{subnet}.1", ours)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", ours], check=False, stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
