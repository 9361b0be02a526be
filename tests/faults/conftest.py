"""Deploys that go at once: after a fault, a graceful end would wait for replicas that are no more."""

from collections.abc import Iterator

import pytest

import mqserve as serve
from tests.instances import Deploy


@pytest.fixture
def deploy(client: serve.Client) -> Iterator[Deploy]:
    """Deploys to the module's instance, until the end of the test."""
    deploy = Deploy(client)
    yield deploy
    deploy.undo(force=True)
