"""Deploys that go at once, since a graceful end would wait for replicas that are no more; and who takes part."""

from collections.abc import Iterator

import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.instances import Deploy


@pytest.fixture
def deploy(client: serve.Client) -> Iterator[Deploy]:
    """Deploys to the module's instance, until the end of the test."""
    deploy = Deploy(client)
    yield deploy
    deploy.undo(force=True)


@pytest.fixture
def members(client: serve.Client, store_url: str, shared_namespace: str) -> Iterator[Members]:
    """Who takes part in the module's instance."""
    members = Members(store_url, shared_namespace)
    yield members
    members.close()
