"""Webhooks over RabbitMQ: receivers that are down, slow, broken, or lead elsewhere, and controllers that are killed meanwhile."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from standardwebhooks import Webhook as Library

from mqserve.broker.callbacks import CallbackRules
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.redis.store import open_redis
from mqserve.broker.values.webhook_signing import WebhookSigner, derived_secret, written
from mqserve.broker.webhooks import VERSION, WAITS_S, Webhook
from mqserve.controller.receivers import Receivers
from mqserve.controller.webhooks import WebhookSending
from tests.broker.test_webhooks import BODY, LOCAL, SECRETS
from tests.broker.traffic import until
from tests.faults.three_controllers import CHANGE_OF_LEADERS_S, Cluster, running_cluster
from tests.instances import SECRET_KEY, new_namespace, wait_until
from tests.ports import free_port
from tests.receivers import Answer, Receiver, receiving
from tests.servers import PrivateRabbitMQ
from tests.test_webhooks import CALLBACKS

FORBIDDEN = "http://169.254.169.254/latest/meta-data"


# Receivers.


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between two tries, and half of one for each."""
    for module in ("broker.webhooks", "broker.rabbitmq.webhooks"):
        monkeypatch.setattr(f"mqserve.{module}.WAITS_S", (1,) * len(WAITS_S))
    monkeypatch.setattr("mqserve.controller.receivers.ATTEMPT_S", 0.5)


class Names:
    """All names are of this machine, but for `moving`: it is elsewhere each time but for the first and the fifth."""

    def __init__(self) -> None:
        self.asked: defaultdict[str, int] = defaultdict(int)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked[host] += 1
        is_elsewhere = host.startswith("moving") and self.asked[host] not in (1, 5)
        return ["127.0.0.2"] if is_elsewhere else ["127.0.0.1"]


def slowly(number: int) -> Answer:
    if number <= 3:
        time.sleep(1)
    return 200, {}


ANSWERS = {
    "failing": lambda number: (500 if number <= 10 else 200, {}),
    "redirecting": lambda number: (302, {"Location": FORBIDDEN}) if number <= 3 else (204, {}),
    "slow": slowly,
    "moving": lambda number: (503 if number == 1 else 200, {}),
}
TRIES = {"failing": 11, "redirecting": 4, "slow": 4, "moving": 2, "down": 1}


@pytest.mark.anyio
@pytest.mark.usefixtures("short_waits")
async def test_each_receiver_has_it_once_it_takes_it_and_a_forbidden_address_never(broker_url: str, store_url: str, namespace: str) -> None:
    signer, names, down = WebhookSigner(SECRETS, namespace), Names(), free_port()
    async with open_rabbitmq(broker_url, namespace, "test") as queue, open_redis(store_url, namespace) as store:
        with ExitStack() as stack:
            receivers = {name: stack.enter_context(receiving(answer)) for name, answer in ANSWERS.items()}
            forbidden = stack.enter_context(receiving(address="127.0.0.2", port=receivers["moving"].port))
            rules = CallbackRules(("*.hooks.example:*",), http=True)
            senders = [WebhookSending(queue.webhooks, store, signer, rules, Receivers(LOCAL, names)) for _ in range(2)]
            for sender in senders:
                sender.go_on()
            await queue.webhooks.declare()
            for name, port in [("down", down), *((name, receiver.port) for name, receiver in receivers.items())]:
                await queue.webhooks.send(Webhook(VERSION, f"msg_{name}", f"http://{name}.hooks.example:{port}/", BODY, store.now_ms()))
            await until(lambda: names.asked["down.hooks.example"] >= 3)
            receivers["down"] = stack.enter_context(receiving(port=down))
            await until(lambda: {name: len(receiver.received) for name, receiver in receivers.items()} == TRIES)
            await asyncio.sleep(1.5)  # nothing comes behind what was taken
            assert {name: len(receiver.received) for name, receiver in receivers.items()} == TRIES
            assert names.asked["moving.hooks.example"] == 5 and not forbidden.received
            for name, receiver in receivers.items():
                for received in receiver.received:
                    assert received.headers["webhook-id"] == f"msg_{name}"
                    assert Library(written(SECRETS[0])).verify(received.body, received.headers) == {"type": "job.succeeded"}
            for sender in senders:
                await sender.stop()
        assert await queue.webhooks.declare() == 0, "none is given up"
        await queue.webhooks.delete_if_empty()


@pytest.mark.anyio
@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_restart_of_rabbitmq_loses_no_webhook(broker_server: PrivateRabbitMQ, namespace: str, how: str) -> None:
    store, signer = EmbeddedStore(namespace), WebhookSigner(SECRETS, namespace)
    async with open_rabbitmq(broker_server.url, namespace, "test") as queue:
        with receiving(lambda number: (503 if number <= 150 else 204, {})) as receiver:
            sender = WebhookSending(queue.webhooks, store, signer, CallbackRules(("localhost:*",), http=True), Receivers(LOCAL))
            await queue.webhooks.declare()
            url, since_ms = f"http://localhost:{receiver.port}/", store.now_ms()
            sent = [Webhook(VERSION, f"msg_{number}", url, BODY, since_ms) for number in range(100)]
            await asyncio.gather(*map(queue.webhooks.send, sent))
            sender.go_on()
            await until(lambda: len(receiver.received) >= 50)
            await asyncio.to_thread(getattr(broker_server, how))
            await asyncio.to_thread(broker_server.start)
            await until(lambda: {taken.headers["webhook-id"] for taken in receiver.taken} == {webhook.id for webhook in sent}, 60)
            await sender.stop()


# Controllers that are killed.


def slow_and_broken(number: int) -> Answer:
    time.sleep(0.3)
    return (500 if number % 3 == 0 else 204), {}


@pytest.fixture
def namespace() -> str:
    return new_namespace("webhooks")


@pytest.fixture
def cluster(broker_url: str, store_url: str, namespace: str, tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path, broker_url, store_url, namespace, **CALLBACKS) as cluster:
        yield cluster


def test_every_end_is_told_under_one_id_while_controllers_are_killed(cluster: Cluster, namespace: str) -> None:
    client, port = cluster.client, free_port()
    client.create_backend("b", lambda request: request.data)
    client.create_endpoint("b", backend="b")
    handle = client.get_handle("b").options(callback_url=f"http://localhost:{port}/")
    jobs = [handle.submit(number) for number in range(20)]
    kill_the_leader(cluster)  # while nobody can be told
    with receiving(slow_and_broken, port=port) as receiver:
        jobs += [handle.submit(number) for number in range(20)]
        wait_for_another_post(receiver)
        kill_the_leader(cluster)
        jobs += [handle.submit(number) for number in range(20)]
        wait_for_another_post(receiver)
        for controller in cluster.controllers:
            controller.kill()
        cluster.complete()
        # each may meet several failures, after each of which its pause is twice as long: two minutes on a busy machine
        wait_until(lambda: told_of(receiver, namespace).keys() >= {job.id for job in jobs}, 240, told=lambda: told_of(receiver, namespace))
        ids = told_of(receiver, namespace)
    assert ids.keys() == {job.id for job in jobs} and all(len(of_job) == 1 for of_job in ids.values())
    assert len(set.union(*ids.values())) == len(jobs)
    client.delete_endpoint("b")
    client.delete_backend("b", force=True)


def kill_the_leader(cluster: Cluster) -> None:
    leader = cluster.leader()
    leader.kill()
    cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
    cluster.complete()


def wait_for_another_post(receiver: Receiver) -> None:
    came = len(receiver.received)
    wait_until(lambda: len(receiver.received) > came)


def told_of(receiver: Receiver, namespace: str) -> dict[str, set[str]]:
    """By job, the ids of the webhooks that the receiver has taken, each with a good signature."""
    library = Library(written(derived_secret(SECRET_KEY.encode(), namespace)))
    ids = defaultdict[str, set[str]](set)
    for taken in list(receiver.taken):
        ids[library.verify(taken.body, taken.headers)["data"]["id"]].add(taken.headers["webhook-id"])
    return ids
