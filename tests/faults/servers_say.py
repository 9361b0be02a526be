"""What stands in the servers, read without our own code."""

from typing import Any

import msgspec
import pika
import pika.exceptions
import redis

from tests.servers import PrivateRabbitMQ


def messages_of(broker: PrivateRabbitMQ, backend: str) -> int:
    """In a backend's queue: waiting, or with a replica and not acked."""
    queues = 'rabbit_amqqueue:info_all(<<"/">>, [name, messages])'
    is_its_own = f'string:find(element(4, proplists:get_value(name, Queue)), <<".backend.{backend}.">>) =/= nomatch'
    return int(broker.eval(f"lists:sum([proplists:get_value(messages, Queue) || Queue <- {queues}, {is_its_own}])"))


def stored_result(environment: dict[str, str], request_id: str) -> Any:
    """The map that the protocol describes."""
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        return msgspec.msgpack.decode(store.get(f"mqserve:{environment['MQSERVE_NAMESPACE']}:future:{{{request_id}}}"))


def is_marked(environment: dict[str, str], request_id: str) -> bool:
    """Whether a run of it was seen to last."""
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        return bool(store.exists(f"mqserve:{environment['MQSERVE_NAMESPACE']}:start:{{{request_id}}}"))


def forget_mark(environment: dict[str, str], request_id: str) -> None:
    """As a Redis that lost its data."""
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        assert store.delete(f"mqserve:{environment['MQSERVE_NAMESPACE']}:start:{{{request_id}}}")


def dead_letter(broker_url: str, namespace: str, backend: str) -> dict[str, Any]:
    """The headers of the next one, taken off its queue."""
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        _, properties, _ = next(connection.channel().consume(f"{namespace}.dead.{backend}", auto_ack=True, inactivity_timeout=30))
        return dict(properties.headers)


def words_said(environment: dict[str, str]) -> int:
    """How many cancellations every replica has been told of."""
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        return int(store.xlen(f"mqserve:{environment['MQSERVE_NAMESPACE']}:cancelled"))


def queues_of(broker_url: str, namespace: str, *backends: str) -> list[str]:
    """Those that exist, of the first generations of these backends."""
    found = []
    for name in [
        queue
        for backend in backends
        for queue in (*(f"{namespace}.backend.{backend}.{n}" for n in (1, 2, 3)), f"{namespace}.dead.{backend}")
    ]:
        with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
            try:
                connection.channel().queue_declare(name, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                continue
            found.append(name)
    return found
