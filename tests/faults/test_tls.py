"""TLS to RabbitMQ and Redis: verified by the authority that is named, and never quietly not."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trustme

from mqserve.broker.envelope import Envelope
from mqserve.broker.errors import BrokerUnavailable, StoreUnavailable
from mqserve.broker.process.loops import IoLoop
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.redis.store import open_redis
from mqserve.broker.settings import Settings
from mqserve.broker.store import Record
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import AckingHands, publish, until
from tests.conftest import running
from tests.faults.wire import Wire
from tests.instances import ROOT, SECRET_KEY, CommandLine
from tests.servers import Certificates, PrivateRabbitMQ, PrivateRedis


class Servers(NamedTuple):
    broker_url: str
    store_url: str
    authority: str

    def settings(self, broker_query: str = "", store_query: str = "", **variables: str) -> Settings:
        urls = {"MQSERVE_BROKER_URL": self.broker_url + broker_query, "MQSERVE_STORE_URL": self.store_url + store_query}
        return Settings.read({**urls, **variables})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both, with certificates for 127.0.0.1 by an authority of their own."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = Certificates(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")
    authority.cert_pem.write_to_path(files.authority)
    certificate.cert_chain_pems[0].write_to_path(files.certificate)
    certificate.private_key_pem.write_to_path(files.key)
    server = contextmanager(running)
    with server(lambda: PrivateRabbitMQ(files)) as broker, server(lambda: PrivateRedis(files)) as store:
        yield Servers(broker.tls_url, store.tls_url, str(files.authority))


async def works(settings: Settings, namespace: str) -> bool:
    """Whether a message, a value and the notice of a result get through."""
    fates: list[object] = []
    notes: list[bytes] = []
    keys = StoreKeys(namespace)
    async with open_rabbitmq(settings.broker_url, namespace, "test") as queue:
        await queue.declare("b", 1, None)
        queue.publish("b", Envelope("", b"x", "text/plain"), fates.append)
        assert await queue.delete("b", 1, only_if_empty=False)
    async with open_redis(settings.store_url, namespace) as store:
        await store.set(keys.desired, b"x", ttl_ms=1000)
        reader = asyncio.create_task(store.read_inbox(keys.inbox("p"), notes.extend, lambda: None))
        await store.record(Record(keys.future("f"), b"result", keys.inbox("p"), b"note", deadline_ms=0))
        await until(lambda: notes == [b"note"])
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        return fates == [None] and await store.get(keys.desired) == b"x"


@pytest.mark.anyio
async def test_the_authority_may_be_one_setting(servers: Servers, namespace: str) -> None:
    assert await works(servers.settings(MQSERVE_CA_FILE=servers.authority), namespace)


@pytest.mark.anyio
async def test_the_authority_may_stand_in_each_url(servers: Servers, namespace: str) -> None:
    settings = servers.settings(f"?cafile={servers.authority}", f"?ssl_ca_certs={servers.authority}", MQSERVE_CA_FILE=__file__)
    assert await works(settings, namespace)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, IoLoop])
def test_messages_of_many_frames_and_many_messages_of_one_turn_arrive_over_tls(
    servers: Servers, namespace: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        async with open_rabbitmq(servers.settings(MQSERVE_CA_FILE=servers.authority).broker_url, namespace, "test") as queue:
            await queue.declare("b", 1, None)
            hands = AckingHands()
            await queue.consume("b", 1, 100, hands)
            bodies = ["x" * size for size in (0, 1, 3_000_000, 200_000)] + [str(number) for number in range(200)]
            fates = [publish(queue, Envelope("", body.encode(), "text/plain")) for body in bodies]
            assert await asyncio.gather(*fates) == [None] * len(bodies)
            await until(lambda: len(hands.seen) == len(bodies))
            assert hands.seen == bodies

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, IoLoop])
def test_an_end_over_tls_is_not_kept_waiting_by_a_broker_that_takes_nothing(
    servers: Servers, namespace: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Neither by what was not sent, nor by the goodbye of TLS."""

    async def main(wire: Wire) -> None:
        settings = Settings.read(
            {"MQSERVE_BROKER_URL": wire.url, "MQSERVE_STORE_URL": servers.store_url, "MQSERVE_CA_FILE": servers.authority}
        )
        async with open_rabbitmq(settings.broker_url, namespace, "test") as queue:
            await queue.declare("b", 1, None)
            wire.blackhole()
            fates = [publish(queue, Envelope("", b"x" * 1_000_000, "text/plain")) for _ in range(30)]
            await asyncio.sleep(0.1)  # for the first of it to be on its way
            begun = time.monotonic()
        assert all(isinstance(fate, BrokerUnavailable) for fate in await asyncio.gather(*fates))
        await until(lambda: not [task for task in asyncio.all_tasks() if "Connection.__" in repr(task.get_coro())])
        assert time.monotonic() - begun < 20

    with Wire(servers.broker_url) as wire, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main(wire))


@pytest.mark.anyio
async def test_a_server_of_an_unknown_authority_is_refused_with_the_mend(servers: Servers, namespace: str) -> None:
    settings = servers.settings()
    with pytest.raises(BrokerUnavailable, match=r"certificate is not trusted.*MQSERVE_CA_FILE"):
        async with open_rabbitmq(settings.broker_url, namespace, "test"):
            pass
    with pytest.raises(StoreUnavailable, match=r"certificate is not trusted.*MQSERVE_CA_FILE"):
        async with open_redis(settings.store_url, namespace):
            pass


@pytest.mark.anyio
async def test_a_certificate_of_another_host_is_refused(servers: Servers, namespace: str) -> None:
    elsewhere = Servers(servers.broker_url.replace("127.0.0.1", "localhost"), servers.store_url.replace("127.0.0.1", "localhost"), "")
    settings = elsewhere.settings(MQSERVE_CA_FILE=servers.authority)
    with pytest.raises(BrokerUnavailable, match="not valid for 'localhost'"):
        async with open_rabbitmq(settings.broker_url, namespace, "test"):
            pass
    with pytest.raises(StoreUnavailable, match="not valid for 'localhost'"):
        async with open_redis(settings.store_url, namespace):
            pass


@pytest.mark.anyio
async def test_who_insists_is_served_without_verification(servers: Servers, namespace: str) -> None:
    assert await works(
        servers.settings("?no_verify_ssl=1", "?ssl_cert_reqs=none&ssl_check_hostname=false", MQSERVE_INSECURE="1"), namespace
    )


@pytest.mark.parametrize("trust", [{"MQSERVE_CA_FILE": "the authority"}, {"MQSERVE_INSECURE": "1"}], ids=["verified", "insecure"])
def test_a_whole_instance_runs_over_tls(servers: Servers, namespace: str, tmp_path: Path, trust: dict[str, str]) -> None:
    """Controller, node, proxy and replica: what the starter was told reaches all of them."""
    settings = servers.settings("?no_verify_ssl=1", "?ssl_cert_reqs=none&ssl_check_hostname=false", MQSERVE_INSECURE="1")
    if "MQSERVE_CA_FILE" in trust:
        settings, trust = servers.settings(), {"MQSERVE_CA_FILE": servers.authority}
    urls = {"MQSERVE_BROKER_URL": settings.broker_url, "MQSERVE_STORE_URL": settings.store_url}
    shell = CommandLine(tmp_path, **urls, **trust, MQSERVE_SECRET_KEY=SECRET_KEY, MQSERVE_NAMESPACE=namespace)
    with shell.start("run", str(ROOT / "examples" / "hello.py"), "--port", "0") as program:
        found = re.search(r"http://\S+", program.wait_for("Ctrl-C stops"))
        assert found and httpx.get(f"{found[0]}/hello/you", timeout=30).text == "Hello, you!"
