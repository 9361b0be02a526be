"""Rows of docs/reliability.md in which RabbitMQ fails: it restarts, takes a consumer's queue or channel away, is changed under us."""

import os
import pickle
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pika
import pytest
from yarl import URL

from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.values.signing import SealScope, Signer
from tests.broker.traffic import AckingHands, accepted, accepted_at_last, text, until
from tests.faults.crowd import Crowd
from tests.faults.servers_say import messages_of
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import NOISE_S, CommandLine, Deploy, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ
from tests.tallies import Tally

# The queue by itself.


@pytest.mark.row(28)
@pytest.mark.anyio
async def test_a_consumer_of_a_deleted_queue_does_not_keep_the_others_down(broker_wire: Wire, namespace: str) -> None:
    async with open_rabbitmq(broker_wire.url, namespace, "test") as queue:
        hands = AckingHands()
        for backend in "ab":
            await queue.declare(backend, 1, None)
            await queue.consume(backend, 1, 10, hands)
        await queue.delete("a", 1, only_if_empty=False)
        await accepted(queue, text("before the loss"), backend="b")
        await until(lambda: hands.seen == ["before the loss"])
        broker_wire.reset()
        await accepted_at_last(queue, text("after the loss"), backend="b")
        await until(lambda: hands.seen[-1] == "after the loss")


@pytest.mark.row(25)
@pytest.mark.anyio
async def test_a_consumer_comes_back_when_its_queue_does(broker_url: str, namespace: str) -> None:
    async with open_rabbitmq(broker_url, namespace, "test") as queue:
        hands = AckingHands()
        await queue.declare("b", 1, None)
        await queue.consume("b", 1, 10, hands)
        await queue.delete("b", 1, only_if_empty=False)
        await queue.declare("b", 1, None)
        await accepted(queue, text("a"))
        await until(lambda: hands.seen == ["a"])


# An instance on it.

BACK_WITHIN_S = 10.0 + 10.0  # what is promised, and what a busy machine may add


def stop_and_start_the_app(broker: PrivateRabbitMQ) -> None:
    broker.ctl("stop_app")
    broker.ctl("start_app")


def kill_and_start(broker: PrivateRabbitMQ) -> None:
    broker.restart(kindly=False)


@pytest.mark.row(5)
@distributed_only
@pytest.mark.parametrize("restart", [stop_and_start_the_app, kill_and_start])
def test_a_restart_of_the_broker_loses_no_confirmed_message_and_every_caller_is_told_in_time(
    deploy: Deploy, broker_server: PrivateRabbitMQ, shared_namespace: str, tmp_path: Path, restart: Callable[[PrivateRabbitMQ], None]
) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)

    def work(request: Any) -> None:
        gate.pass_through()
        tally.note(request.data)

    jobs, url = deploy(work), deploy.at(lambda request: "well", request_timeout_s=8)
    wanted = {f"job {number}" for number in range(50)}
    publish_persistently(broker_server.url, shared_namespace, jobs, wanted)
    wait_until(lambda: gate.came == 1)
    with Crowd(url) as load:
        load.wait_for(20)
        restart(broker_server)
        answering_again = time.monotonic()
        wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
        assert time.monotonic() - answering_again < BACK_WITHIN_S
        load.wait_for(20)
    assert load.slowest_s < 8 + NOISE_S, load
    assert set(load.statuses) <= {200, 503, 504}, load
    assert all("retry-after" in response.headers for response in load.responses if response.status_code == 503)
    gate.open()
    wait_until(lambda: set(tally.lines) == wanted, told=lambda: tally)
    wait_until(lambda: messages_of(broker_server, jobs) == 0)


def publish_persistently(url: str, namespace: str, backend: str, jobs: set[str]) -> None:
    """Each is confirmed when this returns."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for job in jobs:
            properties = pika.BasicProperties(content_type="text/plain", message_id=uuid.uuid4().hex, delivery_mode=2)
            channel.basic_publish(f"{namespace}.requests", backend, job.encode(), properties, mandatory=True)


@pytest.fixture
def impatient_broker(broker_server: PrivateRabbitMQ) -> Iterator[PrivateRabbitMQ]:
    """It takes the channel of a consumer that has not acked within two seconds."""
    set_patience(broker_server, consumer_timeout_ms=2000, looks_every_ms=500)
    yield broker_server
    set_patience(broker_server, consumer_timeout_ms=1_800_000, looks_every_ms=60_000)


def set_patience(broker: PrivateRabbitMQ, consumer_timeout_ms: int, looks_every_ms: int) -> None:
    """For channels that are opened from now on, so those there are are closed."""
    for name, value in (("consumer_timeout", consumer_timeout_ms), ("channel_tick_interval", looks_every_ms)):
        broker.eval(f"application:set_env(rabbit, {name}, {value})")
    broker.eval('[rabbit_networking:close_connection(Pid, "patience") || Pid <- rabbit_networking:connections()]')


@pytest.fixture
def cut_off(joining: CommandLine, broker_wire: Wire) -> Iterator[CommandLine]:
    """The command line of somebody whose RabbitMQ is away; `broker_wire.mend` brings it back."""
    broker_wire.refuse()
    shell = joining.with_variables(MQSERVE_BROKER_URL=broker_wire.url)
    yield shell
    shell.close()


@pytest.mark.row(5)
@distributed_only
def test_a_proxy_that_starts_without_the_broker_refuses_and_says_why_and_serves_once_it_is_there(
    deploy: Deploy, cut_off: CommandLine, joining: CommandLine, broker_wire: Wire
) -> None:
    port = free_port()
    url, mine = deploy.at(lambda request: "well"), f"http://127.0.0.1:{port}"
    proxy = cut_off.start("proxy", "--port", str(port))
    wait_until(lambda: answers(f"{mine}/-/healthz"), told=lambda: proxy.output)
    red, refused = httpx.get(f"{mine}/-/readyz"), httpx.get(url.replace(deploy.url, mine), timeout=30)
    assert (red.status_code, red.json()["broker"]) == (503, False)
    assert (refused.status_code, refused.json()["detail"]) == (503, "the message broker is away: try again later")
    assert "goes on without RabbitMQ" in proxy.output and "no connection to RabbitMQ" in proxy.output
    wait_until(lambda: "no connection to RabbitMQ" in joining.run("status").stdout)
    broker_wire.mend()
    wait_until(lambda: answers(f"{mine}/-/readyz"), told=lambda: proxy.output)
    assert httpx.get(url.replace(deploy.url, mine), timeout=30).text == "well"
    wait_until(lambda: "no connection to RabbitMQ" not in joining.run("status").stdout)


@pytest.mark.row(5)
@distributed_only
def test_a_replica_that_starts_without_the_broker_says_why_it_waits_and_takes_once_it_is_there(
    deploy: Deploy, cut_off: CommandLine, joining: CommandLine, broker_wire: Wire
) -> None:
    url, name = deploy.named(lambda request: os.getpid())
    replica = cut_off.start("replica", name)
    replica.wait_for("goes on without RabbitMQ")
    wait_until(lambda: "no connection to RabbitMQ" in (shown := joining.run("status").stdout) and "starting" in shown)
    broker_wire.mend()
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
    assert "no connection to RabbitMQ" not in joining.run("status").stdout


@distributed_only
@pytest.mark.parametrize("role", ["proxy", "replica"])
def test_a_member_whose_password_is_wrong_says_so_and_goes_on_asking(
    deploy: Deploy, joining: CommandLine, broker_url: str, role: str
) -> None:
    wrong = str(URL(broker_url).with_user("nobody").with_password("hunter2"))
    arguments = ["proxy", "--port", "0"] if role == "proxy" else ["replica", deploy(lambda request: "well")]
    program = joining.with_variables(MQSERVE_BROKER_URL=wrong).start(*arguments)
    program.wait_for("goes on without RabbitMQ until it is there: RabbitMQ refuses the login of user 'nobody'")
    program.wait_for("cannot publish (RabbitMQ refuses the login of user 'nobody'")
    assert "hunter2" not in program.output and not program.ended


@pytest.mark.row(25)
@distributed_only
def test_a_channel_that_the_broker_closed_over_a_long_run_comes_back_and_the_request_is_answered(
    deploy: Deploy, impatient_broker: PrivateRabbitMQ, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through(str(os.getpid()))
        return os.getpid()

    url = deploy.at(work, num_replicas=2)
    wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
    with ThreadPoolExecutor(1) as background:
        asked = background.submit(httpx.post, url, timeout=60)
        wait_until(lambda: len(set(gate.names)) == 2, told=lambda: gate)  # delivered again, to the other replica
        gate.open()
        assert asked.result().status_code == 200
    answered: set[int] = set()

    def all_consume() -> bool:
        answered.add(httpx.get(url, timeout=30).json())
        return answered == {int(name) for name in gate.names}

    wait_until(all_consume, told=lambda: f"one does not consume any more: {answered} of {gate.names}")


@pytest.mark.row(28)
@distributed_only
def test_a_queue_that_was_replaced_under_us_degrades_its_own_backend_only_until_there_is_a_new_one(
    deploy: Deploy, broker_url: str, shared_namespace: str
) -> None:
    url, name = deploy.named(lambda request: "mine", request_timeout_s=3)
    deleted_url, deleted = deploy.named(lambda request: "mine", request_timeout_s=3)
    other = deploy.at(lambda request: "other")
    with Crowd(other) as load:
        load.wait_for(10)
        with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
            channel = connection.channel()
            for backend in (name, deleted):
                channel.queue_delete(f"{shared_namespace}.backend.{backend}.1")
            channel.queue_declare(f"{shared_namespace}.backend.{name}.1", durable=True, arguments={"x-max-length": 7})
        assert httpx.get(deleted_url, timeout=30).status_code in (200, 503, 504)  # 200: it was declared again meanwhile
        for degraded in (url, deleted_url):
            wait_until(lambda degraded=degraded: httpx.get(degraded, timeout=30).status_code == 200)  # type: ignore[misc]
        load.wait_for(10)
    assert set(load.statuses) == {200}, load


KINDS_OF_RUBBISH: dict[str, Callable[[random.Random], tuple[pika.BasicProperties, bytes]]] = {
    "random bytes": lambda chance: (pika.BasicProperties(content_type="application/json"), b"\xff" + chance.randbytes(50)),
    "a random header": lambda chance: (pika.BasicProperties(headers={"mq": b"\xc1" + chance.randbytes(20)}), b"{}"),
    "another version": lambda chance: (
        pika.BasicProperties(headers={"mq": msgspec.msgpack.encode({"v": chance.randrange(2, 1000)})}),
        b"{}",
    ),
    "another key's seal": lambda chance: (
        pika.BasicProperties(content_type="application/x-python-pickle", message_id="theirs"),
        Signer([chance.randbytes(32)], "theirs").seal(pickle.dumps(Opened()), SealScope("request", "b", "theirs")),
    ),
}


class Opened:
    """Whoever unpickles it leaves a trace."""

    def __reduce__(self) -> Any:
        return os.mkdir, (TRACE,)


TRACE = f"/tmp/mqserve-opened-{uuid.uuid4().hex}"


@pytest.mark.row(29)
@distributed_only
def test_rubbish_of_every_kind_is_set_aside_unopened_and_the_replica_lives(
    deploy: Deploy, broker_server: PrivateRabbitMQ, shared_namespace: str
) -> None:
    url, name = deploy.named(lambda request: (request.data, os.getpid())[1])
    pid, chance, each = httpx.get(url, timeout=30).json(), random.Random(29), 25
    with pika.BlockingConnection(pika.URLParameters(broker_server.url)) as connection:
        channel = connection.channel()
        for make in KINDS_OF_RUBBISH.values():
            for _ in range(each):
                properties, body = make(chance)
                channel.basic_publish(f"{shared_namespace}.requests", name, body, properties)
        reasons = []
        for _, properties, _ in channel.consume(f"{shared_namespace}.dead.{name}", auto_ack=True, inactivity_timeout=30):
            reasons.append(properties.headers["mq-reason"] if properties else "nothing more came")
            if len(reasons) == each * len(KINDS_OF_RUBBISH) or not properties:
                break
    assert len(reasons) == each * len(KINDS_OF_RUBBISH) and all(reasons), reasons[-3:]
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert not os.path.exists(TRACE)
    assert httpx.get(url, timeout=30).json() == pid
