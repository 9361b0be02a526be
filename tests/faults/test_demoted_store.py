"""Row 10 of docs/reliability.md where nobody is told: the old primary of Redis lives on as a copy, and its connections with it."""

import time

import httpx
import pytest

from tests.faults.wire import Wire
from tests.instances import Deploy, answers, started, wait_until
from tests.servers import PrivateRedis


@pytest.mark.row(10)
def test_a_store_that_was_demoted_is_left_for_the_one_its_address_leads_to_now(broker_url: str, namespace: str) -> None:
    """Connections to a demoted primary stay open, and answer: a process that keeps them would write nowhere for ever."""
    with (
        PrivateRedis() as old_primary,
        PrivateRedis() as new_primary,
        Wire(old_primary.url) as wire,
        started(broker_url=broker_url, store_url=wire.url, namespace=namespace) as client,
    ):
        deploy = Deploy(client)
        url = deploy.at(lambda request: "well")
        assert httpx.get(url).text == "well"
        old_primary.say("CONFIG", "SET", "repl-diskless-sync-delay", 0)
        new_primary.say("REPLICAOF", "127.0.0.1", old_primary.port)
        wait_until(lambda: new_primary.say("INFO", "replication")["master_link_status"] == "up")
        new_primary.say("REPLICAOF", "NO", "ONE")
        wire.lead_to(new_primary.url)  # what is open stays open
        old_primary.say("REPLICAOF", "127.0.0.1", new_primary.port)
        try:
            wait_until(lambda: answers(f"{deploy.url}/-/readyz") and httpx.get(url, timeout=30).status_code == 200)
            time.sleep(3)
            assert answers(f"{deploy.url}/-/readyz") and httpx.get(url, timeout=30).text == "well"
            deploy.undo()
        finally:
            old_primary.say("REPLICAOF", "NO", "ONE")
