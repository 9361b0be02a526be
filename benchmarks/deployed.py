"""Instances with any number of backends and routes (`programs/deployed.py`), and load that goes to all of their routes in turn."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.ports import free_port

from .subjects import PROGRAMS, ROOT, Servers, Subject, kind_of_mqserve, running


@contextmanager
def running_deployed(name: str, servers: Servers | None, backends: int, routes: int) -> Iterator[Subject]:
    """Runs an instance until its last route answers: embedded without `servers`, else distributed."""
    port = free_port()
    command = [sys.executable, str(PROGRAMS / "deployed.py"), str(port), str(backends), str(routes)]
    env = {"PYTHONPATH": str(ROOT)}
    if servers is not None:
        env |= {**servers.urls, "MQSERVE_SECRET_KEY": secrets.token_hex(32), "MQSERVE_NAMESPACE": f"bench-{secrets.token_hex(4)}"}
    with running(name, command, port, kind_of_mqserve, env, [f"r{routes - 1}"], servers) as subject:
        yield subject
