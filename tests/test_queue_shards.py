"""`queue_shards`: a backend with several queues behaves as one with one, but for the order."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from mqserve.broker.queue_names import backend_queue
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, new_name, wait_until
from tests.tallies import Tally


def data(request: Any) -> Any:
    return request.data


def behind(gate: Gate) -> Any:
    """A handler that waits at the gate and returns what it got."""

    def handle(request: Any) -> Any:
        gate.pass_through()
        return request.data

    return handle


def test_requests_of_http_and_handles_are_answered_whatever_their_queue(client: serve.Client, deploy: Deploy) -> None:
    url, name = deploy.named(data, queue_shards=3)
    handle = client.get_handle(name)
    assert serve.get([handle.remote(number) for number in range(50)], timeout=60) == list(range(50))
    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(lambda number: httpx.post(url, json=number).json(), range(50))) == list(range(50))


def test_bodies_by_reference_and_async_handlers_and_batches_work_as_ever(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def sizes(requests: list[Any]) -> list[int]:
        return [len(request.data) for request in requests]

    async def size(request: Any) -> int:
        return len(request.data)

    for name in (deploy(sizes, queue_shards=3, max_batch_size=4), deploy(size, queue_shards=3)):
        handle = client.get_handle(name)
        assert serve.get([handle.remote("x" * 2_000_000) for _ in range(6)], timeout=60) == [2_000_000] * 6


def test_another_number_of_queues_loses_no_request_and_runs_each_once(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def handle(request: Any) -> Any:
        tally.note(request.data)
        time.sleep(0.002)
        return request.data

    name = deploy(handle, queue_shards=3, num_replicas=2)
    sending = client.get_handle(name)
    sent: list[serve.Future] = []
    for shards in (1, 4, 2):
        sent += [sending.remote(number) for number in range(len(sent), len(sent) + 150)]
        client.update_backend_config(name, {"queue_shards": shards})
        assert client.get_backend_config(name).queue_shards == shards
    sent += [sending.remote(number) for number in range(len(sent), len(sent) + 150)]
    assert serve.get(sent, timeout=60) == list(range(600))
    assert sorted(map(int, tally.lines)) == list(range(600))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"queue_shards": 0}, "greater than 0"),
        ({"queue_shards": 65}, "64"),
        ({"queue_shards": 3, "max_concurrent_queries": 2}, "hold"),
        ({"queue_shards": 3, "max_batch_size": 1}, "hold"),
        ({"queue_shards": 3, "max_queued_requests": 2}, "divided"),
        ({"queue_shards": 2, "delivery": "at_most_once"}, "at_most_once"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused_with_a_sentence(client: serve.Client, config: dict[str, Any], words: str) -> None:
    with pytest.raises(serve.BadValue, match=words):
        client.create_backend(new_name("refused"), data, config=config)


def test_a_change_that_does_not_fit_is_refused_and_changes_nothing(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(data, queue_shards=3)
    with pytest.raises(serve.BadValue, match="hold"):
        client.update_backend_config(name, {"max_concurrent_queries": 2})
    assert client.get_backend_config(name).max_concurrent_queries is None


def test_the_limit_of_the_queue_is_that_of_all_shards(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def handle(request: Any) -> Any:
        await gate.pass_through_async()
        return request.data

    handle_of = client.get_handle(deploy(handle, queue_shards=3, max_queued_requests=7, max_concurrent_queries=3))
    running = [handle_of.remote("runs") for _ in range(3)]
    wait_until(lambda: gate.came == 3)
    sent = [handle_of.remote("waits") for _ in range(20)]
    wait_until(lambda: sum(is_refused(ref) for ref in sent) == 13)
    gate.open()
    assert serve.get(running, timeout=60) == ["runs"] * 3
    assert serve.get([ref for ref in sent if not is_refused(ref)], timeout=60) == ["waits"] * 7


def test_no_request_waits_behind_a_slow_call_while_another_replica_is_idle(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def handle(request: Any) -> Any:
        if request.data == "slow":
            gate.pass_through()
        return request.data

    handle_of = client.get_handle(deploy(handle, queue_shards=3, num_replicas=2))
    slow = handle_of.remote("slow")
    wait_until(lambda: gate.came == 1)
    assert serve.get([handle_of.remote(number) for number in range(60)], timeout=30) == list(range(60))
    gate.open()
    assert slow.result(30) == "slow"


def is_refused(ref: serve.Future) -> bool:
    try:
        ref.result(0)
    except serve.Overloaded:
        return True
    except TimeoutError:
        return False
    return False


# What only RabbitMQ has: several queues that others see.


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


def send(channel: BlockingChannel, namespace: str, key: str, body: bytes, **properties: Any) -> None:
    channel.confirm_delivery()
    channel.basic_publish(
        f"{namespace}.requests", key, body, pika.BasicProperties(content_type="application/json", **properties), mandatory=True
    )


@distributed_only
def test_any_client_publishes_to_each_queue_by_its_routing_key(
    client: serve.Client, deploy: Deploy, channel: BlockingChannel, shared_namespace: str
) -> None:
    name = deploy(data, queue_shards=3)
    for key in (name, f"{name}#1", f"{name}#2"):
        send(channel, shared_namespace, key, b'"hello"', message_id=key)
        assert client.future(key, backend=name).result(30) == "hello"
    with pytest.raises(pika.exceptions.UnroutableError):
        send(channel, shared_namespace, f"{name}#3", b"1")


@distributed_only
def test_a_message_that_cannot_be_read_is_a_dead_letter_of_its_backend_whatever_its_queue(
    deploy: Deploy, channel: BlockingChannel, shared_namespace: str, joining: CommandLine
) -> None:
    name = deploy(data, queue_shards=3)
    for shard in ("", "#1", "#2"):
        send(channel, shared_namespace, f"{name}{shard}", b"{")
    wait_until(lambda: channel.queue_declare(f"{shared_namespace}.dead.{name}", passive=True).method.message_count == 3)


@distributed_only
def test_what_waits_is_the_sum_of_all_queues(
    client: serve.Client, deploy: Deploy, joining: CommandLine, tmp_path: Path, channel: BlockingChannel, shared_namespace: str
) -> None:
    gate = Gate(tmp_path)
    name = deploy(behind(gate), queue_shards=3)
    refs = [client.get_handle(name).remote(number) for number in range(30)]
    wait_until(lambda: sum(waiting(channel, shared_namespace, name)) >= 27)
    assert min(waiting(channel, shared_namespace, name)) >= 8, "each queue has its share"
    wait_until(lambda: waiting_in_status(joining, name) == 29)
    gate.open()
    assert serve.get(refs, timeout=60) == list(range(30))


def waiting_in_status(joining: CommandLine, name: str) -> int:
    backends = json.loads(joining.run("status", "--json").stdout)["backends"]
    return next(int(backend["waiting"]) for backend in backends if backend["name"] == name)


def waiting(channel: BlockingChannel, namespace: str, backend: str) -> list[int]:
    queues = [backend_queue(namespace, backend, 1, shard) for shard in range(3)]
    return [channel.queue_declare(queue, passive=True).method.message_count for queue in queues]


@distributed_only
def test_no_queue_is_left_of_a_backend_that_was_deleted(client: serve.Client, broker_url: str, shared_namespace: str) -> None:
    for force in (False, True):
        name = new_name("b")
        client.create_backend(name, data, config={"queue_shards": 3})
        client.update_backend_config(name, {"queue_shards": 2})
        client.delete_backend(name, force=force)
        assert not [queue for queue in all_queues(name, shared_namespace) if is_there(broker_url, queue)]


def all_queues(backend: str, namespace: str) -> list[str]:
    return [backend_queue(namespace, backend, generation, shard) for generation in (1, 2, 3) for shard in range(4)]


def is_there(broker_url: str, queue: str) -> bool:
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        try:
            connection.channel().queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


@distributed_only
@pytest.mark.parametrize("generation", [1, 3])
def test_what_waits_in_queues_that_an_earlier_instance_left_behind_is_answered(
    client: serve.Client, channel: BlockingChannel, broker_url: str, shared_namespace: str, generation: int
) -> None:
    """It had more of them than the backend has now."""
    name = new_name("b")
    arguments = {"x-queue-type": "classic", "x-max-priority": 4, "x-overflow": "reject-publish"}
    for shard in range(3):
        queue = backend_queue(shared_namespace, name, generation, shard)
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.basic_publish("", queue, b"1", pika.BasicProperties(content_type="application/json", message_id=f"{name} {shard}"))
    client.create_backend(name, data)
    assert [client.future(f"{name} {shard}", backend=name).result(60) for shard in range(3)] == [1, 1, 1]
    wait_until(lambda: not is_there(broker_url, backend_queue(shared_namespace, name, generation, 2)))
    client.delete_backend(name)
