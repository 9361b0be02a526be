"""The users and rights of compose.yaml on real servers: an instance lives with them, and each role is refused what is not its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pika
import pika.exceptions
import psutil
import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from websockets.sync.client import connect

from mqserve.broker.envelope import Header, Member, Stage, mint_id
from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.job_groups import GroupFacts, member_id
from mqserve.broker.jobs import Attempt, EndNote, EventKind, JobEvent, JobFacts, JobState, Leased, Pipeline, Run
from mqserve.broker.rabbitmq.queue import open_rabbitmq
from mqserve.broker.redis.store import RedisStore, open_redis
from mqserve.broker.results import Result
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.code import Code
from mqserve.commands.setup import acl_rules, broker_rights
from mqserve.controller.lease import has_ended
from tests.broker.keeping_jobs import FACTS, added, begun, ended
from tests.broker.streaming import append_of, appended, frames_of, told
from tests.broker.test_later import job_due_in
from tests.broker.test_store_contract import reading
from tests.broker.traffic import until
from tests.conftest import running
from tests.faults.composed import ROLES, Composed, configured, dot_env
from tests.instances import wait_until
from tests.sealed import sealed
from tests.servers import PrivateRabbitMQ, PrivateRedis

DEPLOY = """
import os
import time
import mqserve as serve

client = serve.connect()


def double(request):
    return request.data * 2


def relay(request):
    return len(serve.get_handle("members").remote({"a", "b"}).result(timeout=20))


def members(request):
    return request.data | {"c"}


def slow(request):
    time.sleep(8)


def environment(request):
    return {name: value for name, value in os.environ.items() if name.startswith("MQSERVE_")}


def fail(request):
    raise ValueError("on purpose")


def witness(request):
    facts = [type(request).__name__, getattr(request, "client", None), request.method, dict(request.headers), dict(request.path_params)]
    with open("witnessed.txt", "a") as file:
        print(facts, file=file)
    return "x" * 2_000_000 if request.data == "large" else "seen"


def hold(request):
    while not os.path.exists("release"):
        time.sleep(0.05)
    return f"held {len(request.data)}"


def at_second_try(request):
    if request.attempt == 1:
        raise OSError("not yet")
    return sorted(request.data)


for target in (double, relay, members, slow, environment, fail, witness, hold, at_second_try):
    configs = {slow: {"request_timeout_s": 3}, hold: {"request_timeout_s": 600, "sync_threads": 4}, relay: {"queue_shards": 3}}
    configs[at_second_try] = {"retry": {"attempts": 2, "on": ["OSError"], "backoff_s": 1.5}}
    config = configs.get(target, {})
    client.create_backend(target.__name__, target, config=config)
    client.create_endpoint(target.__name__, backend=target.__name__, route=f"/{target.__name__}", methods=["GET", "POST"])
client.create_backend("double-again", double)  # whose code is there already
client.delete_backend("double-again")
print("deployed", client.http_url())
"""


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """The services of compose.yaml, with endpoints deployed by the client's user."""
    env, folder = dot_env(), tmp_path_factory.mktemp("composed")
    (folder / "definitions.json").write_text(configured("rabbitmq-users", env))
    server = contextmanager(running)
    with server(PrivateRabbitMQ) as broker, server(lambda: PrivateRedis(acl=configured("redis-users", env))) as store:
        broker.ctl("import_definitions", str(folder / "definitions.json"))
        broker.ctl("delete_user", "guest")
        instance = Composed(folder, broker, store, env)
        try:
            instance.start("controller")
            wait_until(lambda: instance.shell("controller").run("status").returncode == 0)
            for service in ("proxy-1", "proxy-2", "worker"):
                instance.start(service)
            members = ["worker", *(f":{instance.ports[service]}" for service in ("proxy-1", "proxy-2"))]
            wait_until(lambda: all(member in instance.shell("controller").run("status").stdout for member in members))
            deployed = instance.shell("client").python(DEPLOY, deadline_s=240)
            assert deployed.returncode == 0, deployed.stderr + instance.outputs()
            yield instance
        finally:
            instance.close()


@pytest.fixture
def url(composed: Composed) -> str:
    return f"http://127.0.0.1:{composed.ports['proxy-1']}"


# What `mqserve setup` says is what compose.yaml has.


def test_compose_gives_rabbitmqs_users_the_rights_that_setup_shows() -> None:
    definitions = json.loads(configured("rabbitmq-users", dot_env()))
    found = {entry.pop("user"): entry for entry in definitions["permissions"]}
    assert found == {f"mqserve-{role}": {"vhost": "/", **rights._asdict()} for role, rights in broker_rights("mqserve").items()}
    assert {user["name"] for user in definitions["users"]} == set(found)
    assert not [user["name"] for user in definitions["users"] if user["tags"]]


def test_compose_gives_redis_users_the_rules_that_setup_shows() -> None:
    env = dot_env()
    first, *users = configured("redis-users", env).splitlines()
    assert first == "user default off"
    assert users == [
        " ".join(["user", f"mqserve-{role}", "on", f">{env[f'MQSERVE_{role.upper()}_PASSWORD']}", *acl_rules("mqserve", role)])
        for role in ROLES
    ]


# The instance lives with them.


def test_http_is_served_by_every_proxy(composed: Composed) -> None:
    for service in ("proxy-1", "proxy-2"):
        assert httpx.post(f"http://127.0.0.1:{composed.ports[service]}/double", json=21, timeout=30).text == "42"


def test_bodies_and_results_beyond_a_megabyte_are_served(url: str) -> None:
    assert httpx.post(f"{url}/double", content="x" * 1_500_000, headers={"content-type": "text/plain"}, timeout=30).text == "x" * 3_000_000


def test_a_job_and_a_request_with_a_key_are_served_and_found_by_http(url: str) -> None:
    job = httpx.post(f"{url}/double", json=21, headers={"Prefer": "respond-async"}, timeout=30)
    place = f"{url}{job.headers['location']}"
    assert httpx.get(f"{place}/result?wait=30", timeout=40).text == "42"
    assert httpx.get(place).json()["status"] == "succeeded"
    assert '"status":"succeeded"' in httpx.get(f"{place}/events").text
    again = httpx.post(f"{place}/retry")
    assert again.status_code == 202, again.text
    assert httpx.delete(f"{url}{again.headers['location']}").status_code == 200
    for replayed in (None, "true"):
        answer = httpx.post(f"{url}/double", json=4, headers={"Idempotency-Key": "one"}, timeout=30)
        assert (answer.text, answer.headers.get("idempotent-replayed")) == ("8", replayed)


@pytest.mark.parametrize("role", ["client", "replica"])
def test_whoever_calls_may_ask_whether_the_instance_was_shut_down(composed: Composed, role: str) -> None:
    async def ask() -> bool:
        async with open_redis(composed.url("redis", role), "mqserve") as store:
            return await has_ended(store, StoreKeys("mqserve"), "another")

    assert asyncio.run(ask()) is True


def test_a_late_request_is_told_where_its_time_went(url: str) -> None:
    answer = httpx.get(f"{url}/slow", timeout=30)
    assert answer.status_code == 504
    assert "running" in answer.text


def test_a_replica_calls_another_backend_with_a_pickled_object(url: str) -> None:
    assert httpx.get(f"{url}/relay", timeout=30).text == "3"


def test_a_large_result_of_a_job_is_read_from_its_file_by_every_proxy(composed: Composed, url: str) -> None:
    job = httpx.post(f"{url}/double", json="x" * 5_000_000, headers={"Prefer": "respond-async"}, timeout=30).json()["id"]
    for service in ("proxy-1", "proxy-2"):
        at = f"http://127.0.0.1:{composed.ports[service]}/-/futures/{job}"
        assert httpx.get(f"{at}?wait=30", timeout=60).json()["status"] == "succeeded"
        assert httpx.get(f"{at}/result", timeout=30).text == "x" * 10_000_000
    assert len(list((composed.folder / "results" / "mqserve").iterdir())) == 1


def test_a_client_calls_by_handle_and_reads_results_by_id(composed: Composed) -> None:
    script = """
import mqserve as serve
ref = serve.get_handle("members").remote({1})
print(sorted(map(str, ref.result(timeout=20))), len(serve.future(ref.id).result(timeout=20)))
try:
    serve.get_handle("fail").remote(1).result(timeout=20)
except ValueError as error:
    print(error)
"""
    done = composed.shell("client").python(script)
    assert done.stdout == "['1', 'c'] 2\non purpose\n", done.stderr


def test_a_direct_publisher_gets_its_reply_and_its_dead_letter(composed: Composed) -> None:
    composed.broker.ctl("add_user", "publisher", "secret")
    composed.broker.ctl("set_permissions", "publisher", r"^answers$", r"^mqserve\.requests$", r"^answers$")
    parameters = pika.URLParameters(f"amqp://publisher:secret@127.0.0.1:{composed.broker.port}/")
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.queue_declare("answers", exclusive=True)
        for body in (b"21", b"{"):
            properties = pika.BasicProperties(
                content_type="application/json", reply_to="answers", correlation_id=body.decode(), user_id="publisher"
            )
            channel.basic_publish("mqserve.requests", "double", body, properties)
        answers = {}
        for method, properties, body in channel.consume("answers", auto_ack=True, inactivity_timeout=20):
            assert method is not None, composed.outputs()
            answers[properties.correlation_id] = (properties.headers["mq-status"], body)
            if len(answers) == 2:
                break
    assert answers["21"] == (200, b"42")
    assert answers["{"][0] == 422
    wait_until(lambda: "mqserve.dead.double\t1" in composed.broker.ctl("list_queues", "name", "messages"))


def test_a_direct_publisher_reaches_only_the_endpoints_that_its_topic_permission_names(composed: Composed) -> None:
    composed.broker.ctl("add_user", "endpoint-publisher", "secret")
    composed.broker.ctl("set_permissions", "endpoint-publisher", r"^replies$", r"^(mqserve\.endpoints|replies)$", r"^replies$")
    composed.broker.ctl("set_topic_permissions", "endpoint-publisher", "mqserve.endpoints", "^(double|missing)$", "^$")
    parameters = pika.URLParameters(f"amqp://endpoint-publisher:secret@127.0.0.1:{composed.broker.port}/")
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.queue_declare("replies", exclusive=True)
        for endpoint in ("double", "missing"):
            properties = pika.BasicProperties(content_type="application/json", reply_to="replies", correlation_id=endpoint, message_id="m")
            channel.basic_publish("mqserve.endpoints", endpoint, b"21", properties)
        answers = {}
        for method, properties, body in channel.consume("replies", auto_ack=True, inactivity_timeout=20):
            assert method is not None, composed.outputs()
            answers[properties.correlation_id] = (properties.headers["mq-status"], body)
            if len(answers) == 2:
                break
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
            channel.confirm_delivery()
            channel.basic_publish("mqserve.endpoints", "fail", b"1")
    assert answers["double"] == (200, b"42")
    assert answers["missing"][0] == 404
    wait_until(lambda: "mqserve.dead.@endpoints\t1" in composed.broker.ctl("list_queues", "name", "messages"))


def test_a_backend_comes_changes_and_goes_by_the_clients_user(composed: Composed) -> None:
    script = """
import mqserve as serve
client = serve.connect()
client.create_backend("passing", lambda request: "one")
client.create_endpoint("passing", backend="passing")
client.update_backend("passing", lambda request: "two")
client.update_backend_config("passing", {"max_queued_requests": 5})
print(client.get_handle("passing").remote().result(timeout=20))
client.delete_endpoint("passing")
client.delete_backend("passing")
"""
    done = composed.shell("client").python(script)
    assert done.stdout == "two\n", done.stderr


def test_the_controllers_user_fires_what_the_clients_user_has_scheduled(composed: Composed) -> None:
    script = (
        "import time, mqserve as serve; serve.schedule('often', 'members', cron='* * * * * *', data={'a'})\n"
        "while not (job := serve.list_schedules()['often'].last_job): time.sleep(0.1)\n"
        "print(sorted(serve.job(job).result(timeout=20)), sorted(serve.run_schedule('often').result(timeout=20)))"
    )
    client = composed.shell("client")
    done = client.python(script)
    assert done.stdout == "['a', 'c'] ['a', 'c']\n", done.stderr
    for command, said in (("pause", "1 paused.\n"), ("resume", "1 resumed.\n"), ("delete", "1 deleted.\n")):
        assert client.run("schedules", command, "often").stdout == said


def test_the_controllers_user_sends_the_stages_of_a_pipeline_that_the_clients_user_has_made(composed: Composed) -> None:
    script = (
        "import mqserve as serve; serve.create_pipeline('twice', ['double', 'double'])\n"
        "job = serve.get_handle('twice').submit(21); print(job.result(timeout=20), *(stage.state for stage in job.status().stages))\n"
        "print(job.retry().result(timeout=20)); serve.delete_pipeline('twice')"
    )
    done = composed.shell("client").python(script)
    assert done.stdout == "84 succeeded succeeded\n84\n", done.stderr


@pytest.mark.parametrize("role", ["proxy", "client"])
def test_a_replica_writes_a_stream_and_its_reader_reads_it_gives_credit_and_drops_it(composed: Composed, role: str) -> None:
    keys, name = StoreKeys("mqserve"), mint_id()
    inbox, feed = keys.inbox(f"{role}-{name}"), keys.feed(name)
    notes: list[bytes] = []
    credits: list[bytes] = []

    async def write(replica: RedisStore) -> None:
        for number, trim_to in ((1, 0), (2, 1)):
            claim = b"run %d" % number
            assert await replica.replace(keys.owner(name), None if number == 1 else b"run 1", claim)
            append = append_of(keys, number, b"frame", id=name, claim=claim, attempt=number, inboxes=(inbox,), trim_to=trim_to)
            assert await appended(replica, append) == number
        assert await replica.last_of_stream(keys.stream(name)) == 2

    async def read(reader: RedisStore) -> None:
        await until(lambda: told(notes) == [(name, 1, b"frame"), (name, 2, b"frame")])
        assert await frames_of(reader, keys, name) == [(2, 2, b"frame")]
        assert await reader.last_of_stream(keys.stream(name)) == 2
        assert await reader.get(keys.owner(name)) == b"run 2"
        reader.post(feed, b"credit")
        await until(lambda: credits == [b"credit"])
        for key in (keys.stream(name), keys.owner(name)):
            reader.drop_soon(key)

        async def is_gone() -> bool:
            return not await frames_of(reader, keys, name) and await reader.get(keys.owner(name)) is None

        await until(is_gone)

    async def flow() -> None:
        urls = [composed.url("redis", user) for user in ("replica", role)]
        async with open_redis(urls[0], "mqserve") as replica, open_redis(urls[1], "mqserve") as reader:
            listeners = [
                asyncio.create_task(reader.read_inbox(inbox, notes.extend, lambda: None)),
                asyncio.create_task(replica.read_inbox(feed, credits.extend, lambda: None)),
            ]
            await write(replica)
            await read(reader)
            for listener in listeners:
                listener.cancel()

    asyncio.run(flow())


def test_a_websocket_goes_both_ways(composed: Composed, url: str) -> None:
    script = """
from pathlib import Path
import mqserve as serve
Path("echo_app.py").write_text('\\n'.join((
    "async def app(scope, receive, send):",
    "    if scope['type'] == 'websocket':",
    "        await receive()",
    "        await send({'type': 'websocket.accept'})",
    "        while (said := await receive())['type'] == 'websocket.receive':",
    "            await send({'type': 'websocket.send', 'text': said['text']})",
)))
serve.connect().mount("/echo", "echo_app:app")
"""
    mounted = composed.shell("client").python(script)
    assert mounted.returncode == 0, mounted.stderr
    with connect(f"{url.replace('http', 'ws', 1)}/echo") as socket:
        for number in range(200):  # beyond the first credit
            socket.send(str(number))
            assert socket.recv(timeout=20) == str(number)


def test_an_operator_sees_the_instance_by_the_controllers_user(composed: Composed) -> None:
    shown = composed.shell("controller").run("status").stdout
    assert all(name in shown for name in ("worker", "proxy-", "double#", "/relay"))


def test_nobody_was_refused_anything(composed: Composed) -> None:
    assert "setup --print" not in composed.outputs()
    assert "NOPERM" not in composed.outputs()


def test_user_code_finds_no_credentials_but_its_own(composed: Composed, url: str) -> None:
    found = httpx.get(f"{url}/environment", timeout=30).json()
    assert composed.env["MQSERVE_REPLICA_PASSWORD"] in found["MQSERVE_STORE_URL"]
    others = [composed.env[f"MQSERVE_{role.upper()}_PASSWORD"] for role in ROLES if role != "replica"]
    assert not [name for name, value in found.items() if any(password in value for password in others)]
    assert set(found) == {
        *("MQSERVE_BROKER_URL", "MQSERVE_STORE_URL", "MQSERVE_SECRET_KEY", "MQSERVE_NAMESPACE"),
        *("MQSERVE_TRUSTED_USERS", "MQSERVE_HEADER_USERS"),
        *("MQSERVE_RESULT_STORE", "MQSERVE_VERBOSE"),
    }


# What each role is refused: RabbitMQ.

QUEUE = "mqserve.backend.double.1"
JOBS = "mqserve.jobs.double.1"


def publish(exchange: str, key: str = "double") -> Callable[[Any], object]:
    def act(channel: Any) -> None:
        channel.confirm_delivery()
        channel.basic_publish(exchange, key, b"1")

    return act


BROKER_ACTS: dict[str, Callable[[Any], object]] = {
    "consume a backend's queue": lambda channel: channel.basic_consume(QUEUE, print),
    "consume a backend's jobs": lambda channel: channel.basic_consume(JOBS, print),
    "consume jobs that wait": lambda channel: channel.basic_consume("mqserve.due", print),
    "publish straight to the jobs": publish("", JOBS),
    "declare a queue of jobs": lambda channel: channel.queue_declare("mqserve.jobs.mine.1", durable=True),
    "declare a queue to wait in": lambda channel: channel.queue_declare("mqserve.later.3", durable=True),
    "consume webhooks": lambda channel: channel.basic_consume("mqserve.webhooks", print),
    "consume webhooks that were given up": lambda channel: channel.basic_consume("mqserve.webhooks.dead", print),
    "publish webhooks": publish("mqserve.webhooks", "due"),
    "consume dead letters": lambda channel: channel.basic_consume("mqserve.dead.double", print),
    "publish straight to a queue": publish("", QUEUE),
    "publish to the dead letters": publish("mqserve.dead"),
    "publish to another exchange": publish("amq.direct"),
    "declare a queue": lambda channel: channel.queue_declare("mqserve.backend.mine.1", durable=True),
    "bind a queue": lambda channel: channel.queue_bind(QUEUE, "mqserve.requests", "another"),
    "delete a queue": lambda channel: channel.queue_delete(QUEUE),
    "purge a queue": lambda channel: channel.queue_purge(QUEUE),
    "delete an exchange": lambda channel: channel.exchange_delete("mqserve.requests"),
    "declare a foreign queue": lambda channel: channel.queue_declare("foreign"),
}
ALLOWED = {  # of these; publishing a request is what everybody may
    "replica": {
        *("consume a backend's queue", "consume a backend's jobs", "publish straight to a queue", "publish straight to the jobs"),
        *("publish to the dead letters", "purge a queue"),
    },
    "proxy": set[str](),
    "client": set[str](),
}
BROKER_REFUSALS = [(role, act) for role, allowed in ALLOWED.items() for act in BROKER_ACTS if act not in allowed]
BROKER_REFUSALS += [("controller", "publish to another exchange"), ("controller", "declare a foreign queue")]


@pytest.mark.parametrize("role", ["controller", "proxy", "replica", "client"])
@pytest.mark.parametrize("exchange", ["mqserve.requests", "mqserve.jobs"])
def test_every_role_may_send_requests_and_jobs(composed: Composed, role: str, exchange: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(composed.url("amqp", role))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        properties = pika.BasicProperties(content_type="application/json", message_id=mint_id(), delivery_mode=2)
        channel.basic_publish(exchange, "double", b"1", properties, mandatory=True)


def test_a_job_that_waits_comes_to_its_backend_by_the_clients_user(composed: Composed) -> None:
    settings = Settings.read(composed.shell("client").env)

    async def submit() -> None:
        async with (
            open_redis(settings.store_url, "mqserve") as store,
            open_rabbitmq(settings.broker_url, "mqserve", "test", seals=settings.header_seals) as queue,
        ):
            job = replace(job_due_in(store, 1.0), body=msgspec.msgpack.encode([21, {}]), content_type="application/msgpack")
            fate = asyncio.get_running_loop().create_future()
            queue.publish_later("double", job, 1.0, fate.set_result)
            assert await fate is None
            async with asyncio.timeout(30):
                while (raw := await store.get(StoreKeys("mqserve").future(job.id))) is None:
                    await asyncio.sleep(0.05)
            assert Result.from_bytes(raw).status == 200

    asyncio.run(submit())


@pytest.mark.parametrize(("role", "act"), BROKER_REFUSALS)
def test_rabbitmq_refuses_a_role(composed: Composed, role: str, act: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(composed.url("amqp", role))) as connection:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as refusal:
            BROKER_ACTS[act](connection.channel())
        assert refusal.value.reply_code == 403, refusal.value


@pytest.mark.parametrize("url", ["node's", "guest's"])
def test_rabbitmq_does_not_know_a_node_nor_guest(composed: Composed, url: str) -> None:
    address = composed.url("amqp", "node") if url == "node's" else composed.broker.url
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        pika.BlockingConnection(pika.URLParameters(address))


def test_rabbitmq_takes_no_message_in_anothers_name(composed: Composed) -> None:
    with pika.BlockingConnection(pika.URLParameters(composed.url("amqp", "proxy"))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="user_id"):
            channel.basic_publish("mqserve.requests", "double", b"1", pika.BasicProperties(user_id="mqserve-client"))


# What each role is refused: Redis.

ROOT_KEY = "mqserve:mqserve"
OF_NOBODY = ["KEYS *", "SCAN 0", "CONFIG GET *", "FLUSHALL", "FLUSHDB", "DEBUG SLEEP 0", "ACL LIST", "CLIENT LIST", "MONITOR", "SHUTDOWN"]
OF_NOBODY += ["GET mqserve:other:desired", "SET elsewhere 1", "PUBLISH elsewhere x", "MODULE LIST", "SLAVEOF NO ONE", "SAVE", "RENAME a b"]
OF_NO_READER = [f"XADD {ROOT_KEY}:stream:{{x}} 1-1 f x", f"XTRIM {ROOT_KEY}:stream:{{x}} MINID 1", f"SET {ROOT_KEY}:owner:{{x}} x"]
OF_NO_READER += [f"RPUSH {ROOT_KEY}:stream:{{x}} x", f"BLMPOP 1 1 {ROOT_KEY}:feed:x LEFT", f"SET {ROOT_KEY}:feed:x x"]
OF_NO_CALLER = [
    f"ZRANGE {ROOT_KEY}:jobs 0 -1",
    f"ZRANDMEMBER {ROOT_KEY}:jobs",
    f"XRANGE {ROOT_KEY}:ends - +",
    f"GET {ROOT_KEY}:lease:{{x}}",
]
OF_NO_CALLER += [f"SET {ROOT_KEY}:lease:{{x}} x", f"DEL {ROOT_KEY}:job:{{x}}"]
OF_CONTROLLER = [f"SET {ROOT_KEY}:{name} x" for name in ("observed", "leader", "instance")]
STORE_REFUSALS: dict[str, list[str]] = {
    "controller": [],
    "node": [
        *(f"GET {ROOT_KEY}:{name}" for name in ("future:{x}", "body:{x}", "instance", "inbox:client-x", "owner:{x}")),
        *OF_NO_READER,
        *(
            f"{command} 0"
            for command in (f"PEXPIRE {ROOT_KEY}:stream:{{x}}", f"RPUSH {ROOT_KEY}:feed:x", f"RPUSH {ROOT_KEY}:inbox:client-x")
        ),
        f"HGETALL {ROOT_KEY}:job:{{x}}",
        f"HGETALL {ROOT_KEY}:group:{{x}}",
        *OF_NO_CALLER,
        *(f"SET {ROOT_KEY}:{name} x" for name in ("desired", "future:{x}")),
        *OF_CONTROLLER,
    ],
    "proxy": [
        *(f"SET {ROOT_KEY}:{name} x" for name in ("desired", "code:x", "attempts:{x}")),
        *(f"GET {ROOT_KEY}:{name}" for name in ("instance", "claim:{x}", "leader", "code:x")),
        f"BLMPOP 1 1 {ROOT_KEY}:inbox:client-x LEFT",
        f"HGETALL {ROOT_KEY}:beats",
        f"DEL {ROOT_KEY}:future:{{x}}",
        *OF_NO_READER,
        *OF_NO_CALLER,
        *OF_CONTROLLER,
    ],
    "replica": [
        *(f"SET {ROOT_KEY}:{name} x" for name in ("desired", "code:x")),
        *(f"BLMPOP 1 1 {ROOT_KEY}:inbox:{whose}-x LEFT" for whose in ("client", "proxy")),
        f"HGETALL {ROOT_KEY}:beats",
        f"DEL {ROOT_KEY}:desired",
        f"ZRANGE {ROOT_KEY}:jobs 0 -1",
        f"XRANGE {ROOT_KEY}:ends - +",
        *OF_CONTROLLER,
    ],
    "client": [
        *(f"SET {ROOT_KEY}:{name} x" for name in ("start:{x}", "claim:{x}")),
        *(f"GET {ROOT_KEY}:{name}" for name in ("code:x", "leader")),
        f"BLMPOP 1 1 {ROOT_KEY}:inbox:proxy-x LEFT",
        f"HSET {ROOT_KEY}:beats a b",
        *OF_NO_READER,
        *OF_NO_CALLER,
        f"DEL {ROOT_KEY}:desired",
        *OF_CONTROLLER,
    ],
}


@pytest.mark.parametrize("role", ROLES)
def test_redis_refuses_a_role_what_is_not_its_own(composed: Composed, role: str) -> None:
    with redis.Redis.from_url(composed.url("redis", role)) as store:
        for command in OF_NOBODY + STORE_REFUSALS[role]:
            with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)no permissions|DEBUG command not allowed"):
                print(role, command, store.execute_command(*command.split(" ")))


@pytest.mark.parametrize("role", ["proxy", "replica", "client"])
def test_a_script_is_no_way_round(composed: Composed, role: str) -> None:
    with redis.Redis.from_url(composed.url("redis", role)) as store:
        for call in (f"'SET', '{ROOT_KEY}:leader', 'x'", "'KEYS', '*'", "'FLUSHALL'"):
            with pytest.raises(redis.exceptions.ResponseError, match=r"can't (access|run)|(?i:no permissions)"):
                store.eval(f"return redis.call({call})", 0)


async def play_jobs(composed: Composed) -> None:
    def opened(role: str) -> AbstractAsyncContextManager[RedisStore]:
        return open_redis(composed.url("redis", role), "mqserve")

    keys = StoreKeys("mqserve")
    first, second, third, whole = (mint_id() for _ in range(4))
    proxys, clients = keys.inbox("proxy-test"), keys.inbox("client-test")
    async with opened("client") as client, opened("proxy") as proxy, opened("replica") as replica, opened("controller") as controller:
        async with reading(proxy, proxys) as told_the_proxy, reading(client, clients) as told_the_client:
            await added(client, first, message=b"message")
            await proxy.jobs.wait(first, proxys)
            await client.jobs.follow(first, clients)
            assert await proxy.jobs.place(first, FACTS) == 0
            assert await begun(replica, id=first) == Leased(1)
            assert await replica.jobs.renew(first, b"run")
            replica.jobs.note(first, b"run", JobEvent(EventKind.PROGRESS, fraction=0.5))
            assert await replica.jobs.try_again(first, b"run", Attempt(1, error="no"), FACTS)
            assert await begun(replica, b"another", first) == Leased(2)
            await replica.jobs.give_back(first, b"another", FACTS)
            assert await begun(replica, b"third", first) == Leased(2)
            assert await ended(replica, first, token=b"third")
            await until(lambda: b"note of result" in told_the_proxy and len(told_the_client) == 7)
            assert await proxy.jobs.message(first) == b"message" and len(await client.jobs.events(first)) == 8
            await added(proxy, second)
            await client.jobs.wait(second, clients)
            assert await ended(proxy, second, b"cancelled", state=JobState.CANCELLED)
            await until(lambda: b"note of cancelled" in told_the_client)
            stage = Run(third, b"run", "r", FACTS, 1, pipeline=Pipeline(whole, JobFacts("", "p", stages=("e",)), "stage e (1 of 1)"))
            assert await replica.jobs.begin(stage) == Leased(1)
            assert await ended(replica, third, token=b"run", stage=Stage(b"plan", 0))
            assert await ended(controller, whole)

            async def is_dropped() -> bool:
                return third not in {EndNote.from_bytes(end.note).id for end in await controller.jobs.ends(1000)}

            await until(is_dropped)  # by the instance's controller, since its plan makes no sense
            group, last = mint_id(), mint_id()
            await client.jobs.hold(last, JobFacts("", "e", 1000))
            await client.jobs.keep_group(group, GroupFacts(3, "e", then=last), b"call")
            for number, store in enumerate((replica, proxy, client)):
                member = member_id(group, number)
                await added(client, member)
                assert await ended(store, member, member=Member(group, number))
            for store in (client, proxy, replica, controller):
                found = await store.jobs.group(group)
                assert found is not None and found.ended[JobState.SUCCEEDED] == 3 and len(await store.jobs.group_ends(group)) == 3
        for store in (client, proxy, replica):
            with pytest.raises(StoreUnavailable, match="does not let user"):
                await store.jobs.list()
        assert {first, second} <= {record.id for record in await controller.jobs.list()}
        assert await controller.jobs.forget(first) and await controller.jobs.forget(second)


def test_each_role_plays_its_part_in_jobs(composed: Composed) -> None:
    asyncio.run(play_jobs(composed))


def test_redis_lets_nobody_in_without_a_name(composed: Composed) -> None:
    with redis.Redis.from_url(composed.store.url) as store, pytest.raises(redis.exceptions.AuthenticationError):
        store.ping()


# Who lacks rights is told so, by name.


def test_a_store_users_lacking_right_is_said_with_the_user_the_command_and_the_mend(composed: Composed) -> None:
    failed = composed.shell("proxy").run("status")
    assert failed.returncode == 1
    assert all(word in failed.stderr for word in ("'mqserve-proxy'", f"GET {ROOT_KEY}:instance", "mqserve setup --print")), failed.stderr


def test_a_broker_users_lacking_right_is_said_with_the_user_the_queue_and_the_mend(composed: Composed) -> None:
    shell = composed.shell("replica").with_variables(MQSERVE_BROKER_URL=composed.url("amqp", "proxy"))
    with shell.start("replica", "double") as program:
        line = program.wait_for("setup --print")
    assert all(word in line for word in ("'mqserve-proxy'", f"access to queue '{QUEUE}'.")), line


def test_a_publish_that_is_refused_is_said_at_the_caller(composed: Composed) -> None:
    composed.broker.ctl("add_user", "nobody", "secret")
    composed.broker.ctl("set_permissions", "nobody", "^$", "^$", "^$")
    shell = composed.shell("client").with_variables(MQSERVE_BROKER_URL=f"amqp://nobody:secret@127.0.0.1:{composed.broker.port}/")
    failed = shell.python("import mqserve as serve; serve.get_handle('double').remote(1).result(timeout=20)")
    last = failed.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("'nobody'", "access to exchange 'mqserve.requests'.", "mqserve setup --print")), failed.stderr


@pytest.mark.parametrize(("kind", "variable"), [("amqp", "MQSERVE_BROKER_URL"), ("redis", "MQSERVE_STORE_URL")])
def test_a_wrong_password_is_said_and_not_shown(composed: Composed, kind: str, variable: str) -> None:
    wrong = composed.url(kind, "controller").replace(composed.env["MQSERVE_CONTROLLER_PASSWORD"], "hunter2")
    failed = composed.shell("controller").with_variables(**{variable: wrong}).run("status")
    assert failed.returncode == 1
    assert "refuses the login of user 'mqserve-controller'" in failed.stderr
    assert "hunter2" not in failed.stderr


# Pickles: sealed, and by a user that is named and trusted.


def send_pickle(composed: Composed, role: str, user_id: str | None) -> dict[str, Any]:
    """The result of a message in a handle's name, its header sealed, that says it holds a pickle."""
    name, kind, body = mint_id(), "application/x-python-pickle", b"cos\nsystem\n(S'false'\ntR."
    headers = sealed(
        "mqserve", "members", name, Header(origin="handle"), body=body, content_type=kind, keys=[composed.env["MQSERVE_SECRET_KEY"]]
    )
    with pika.BlockingConnection(pika.URLParameters(composed.url("amqp", role))) as connection:
        properties = pika.BasicProperties(content_type=kind, message_id=name, user_id=user_id, headers=headers)
        connection.channel().basic_publish("mqserve.requests", "members", body, properties)
    with redis.Redis.from_url(composed.url("redis", "client")) as store:
        raw = wait_until(lambda: store.get(f"{ROOT_KEY}:future:{{{name}}}"), told=composed.outputs)
        return msgspec.msgpack.decode(raw, type=dict[str, Any])


@pytest.mark.parametrize(
    ("role", "user_id", "why"),
    [("client", None, "user_id"), ("proxy", "mqserve-proxy", "MQSERVE_TRUSTED_USERS"), ("client", "mqserve-client", "not a sealed value")],
    ids=["without a name", "by one who is not trusted", "trusted, but not sealed"],
)
def test_a_pickle_is_refused(composed: Composed, role: str, user_id: str | None, why: str) -> None:
    result = send_pickle(composed, role, user_id)
    assert result["status"] == 422
    assert why in result["error"]["message"]


PICKLED_JOB = """
import mqserve as serve

serve.connect()
job = serve.get_handle("at_second_try").submit({"a", "b"})
assert job.result(60) == ["a", "b"]
again = job.retry()
assert again.result(60) == ["a", "b"] and again.status().retry_of == job.id
print(job.id)
"""


def test_a_pickled_job_is_tried_and_sent_again_by_those_who_are_trusted_and_by_nobody_else(composed: Composed, url: str) -> None:
    """Its next try passes through the leading controller; over HTTP the proxy's user sends it again."""
    ran = composed.shell("client").python(PICKLED_JOB, deadline_s=180)
    assert ran.returncode == 0, ran.stderr
    again = httpx.post(f"{url}/-/futures/{ran.stdout.strip()}/retry", timeout=30)
    assert again.status_code == 202
    view = httpx.get(f"{url}{again.headers['location']}?wait=30", timeout=60).json()
    assert (view["status"], view["error"]["status"]) == ("failed", 422)


# Requests: believed by their seal.

MADE_UP = 300
NOBODYS_INBOX = f"{ROOT_KEY}:inbox:client-nobody"
VICTIM = """
import mqserve as serve

client = serve.connect()
large = serve.get_handle("witness").remote("large")
assert len(large.result(timeout=30)) == 2_000_000
waiting = serve.get_handle("hold").remote("x" * 1_500_000)
print(f"asked {large.id} {waiting.id} {client._own.requests.pending.inbox}", flush=True)
print(f"told {waiting.result(timeout=600)} {len(serve.future(large.id).result(timeout=30))}", flush=True)
"""


@dataclass(frozen=True)
class MadeUp:
    """What a stranger publishes in mqserve's name."""

    backend: str
    message_id: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes


def made_up(large_id: str, waiting_id: str, inbox: str) -> st.SearchStrategy[MadeUp]:
    """Every header claims something that is not its sender's to claim, of all that the stranger could know."""
    body_keys = [f"{ROOT_KEY}:body:{{{name}}}" for name in (waiting_id, f"{large_id}.result", "x")]
    pair = st.tuples(st.binary(max_size=9), st.binary(max_size=9))
    meta_claims: dict[str, st.SearchStrategy[Any]] = {
        "client": st.just(("127.0.0.1", 1)),
        "headers": st.lists(pair, min_size=1, max_size=3),
        "path": st.just("/witness"),
        "params": st.just([("n", "int", "7")]),
        "method": st.just("POST"),
        "endpoint": st.just("hold"),
        "scheme": st.just("https"),
    }
    claims: dict[str, st.SearchStrategy[Any]] = {
        "origin": st.sampled_from(["http", "handle", "other"]),
        "inbox": st.sampled_from([inbox, NOBODYS_INBOX, f"{ROOT_KEY}:inbox:proxy-x", "x"]),
        "ref": st.sampled_from([*body_keys, f"{ROOT_KEY}:desired"]),
        "shadow": st.just(True),
        "once": st.just(True),
        "again": st.just(True),
        "meta": st.dictionaries(st.sampled_from(sorted(meta_claims)), st.none(), min_size=1, max_size=4).flatmap(
            lambda chosen: st.fixed_dictionaries({name: meta_claims[name] for name in chosen})
        ),
    }
    fields = st.sets(st.sampled_from(sorted(claims)), min_size=1, max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: claims[name] for name in chosen}, optional={"deadline": st.integers(1, 2**62)})
    )
    packed = fields.map(msgspec.msgpack.encode)
    as_other_types = (
        fields.map(repr) | st.integers(0, 9) | st.just(True) | st.just({"mq": b"\x80"}) | st.lists(st.just(b"\x80"), max_size=2)
    )
    seals = (
        st.binary(min_size=20, max_size=20) | st.binary(max_size=40) | st.text("a\0é", max_size=3) | st.just(1) | st.just({"mq-seal": b""})
    )
    names = ["", "order-1", waiting_id, large_id, f"{large_id}.result", f"hold/{waiting_id}", f"witness/{large_id}", "f" * 32, "/", "{x}"]
    return st.builds(
        MadeUp,
        st.sampled_from(["witness", "hold", "double"]),
        st.sampled_from(names),
        st.fixed_dictionaries(
            {"mq": packed | packed | packed | as_other_types}, optional={"mq-seal": seals, "other": st.text("ab", max_size=3)}
        ),
        st.fixed_dictionaries(
            {"content_type": st.sampled_from(["application/json", "application/x-python-pickle", "text/plain"])},
            optional={
                "priority": st.sampled_from([0, 4, 9]),
                "user_id": st.just("stranger"),
                "reply_to": st.sampled_from(["nobody", "mqserve.backend.hold.1"]),
                "delivery_mode": st.sampled_from([1, 2]),
            },
        ),
        st.sampled_from([b"1", b'"large"', b"", b"\x92\x01\x80", b"N."]),
    )


def publish_in_our_name(composed: Composed, messages: st.SearchStrategy[MadeUp]) -> int:
    """How many RabbitMQ took, of a user whose only right it is to publish requests."""
    composed.broker.ctl("add_user", "stranger", "secret")
    composed.broker.ctl("set_permissions", "stranger", "^$", r"^mqserve\.requests$", "^$")
    published = 0
    with pika.BlockingConnection(pika.URLParameters(f"amqp://stranger:secret@127.0.0.1:{composed.broker.port}/")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()

        @settings(max_examples=MADE_UP, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(messages)
        def publish(message: MadeUp) -> None:
            nonlocal published
            properties = pika.BasicProperties(message_id=message.message_id, headers=message.headers, **message.properties)
            channel.basic_publish("mqserve.requests", message.backend, message.body, properties, mandatory=True)
            published += 1

        publish()
    composed.broker.ctl("delete_user", "stranger")
    return published


def dead_letters(composed: Composed) -> int:
    """Of all backends."""
    queues = [line.split("\t") for line in composed.broker.ctl("list_queues", "name", "messages").splitlines()]
    return sum(int(count) for name, count in queues if name.startswith("mqserve.dead."))


def test_who_may_only_publish_reaches_no_handler_as_http_and_nobodys_inbox_body_or_result(composed: Composed) -> None:
    victim = composed.shell("client").start_program([sys.executable, "-c", VICTIM])
    with victim, redis.Redis.from_url(composed.url("redis", "client")) as store:
        _, large_id, waiting_id, inbox = victim.wait_for("asked").split()
        keys = [f"{ROOT_KEY}:{name}" for name in (f"future:{{{large_id}}}", f"body:{{{large_id}.result}}", f"body:{{{waiting_id}}}")]
        wait_until(lambda: b'"sealed_by":["' in (store.get(f"{ROOT_KEY}:observed") or b""))
        before = wait_until(lambda: found if all(found := store.mget(keys)) else None)
        witnessed, dead = (composed.folder / "witnessed.txt").read_text(), dead_letters(composed)

        published = publish_in_our_name(composed, made_up(large_id, waiting_id, inbox))
        assert published >= MADE_UP
        wait_until(lambda: dead_letters(composed) == dead + published, told=lambda: f"{dead_letters(composed)}\n{composed.outputs()}")

        assert (composed.folder / "witnessed.txt").read_text() == witnessed, "a handler was called"
        assert store.mget(keys) == before
        assert store.mget([f"{ROOT_KEY}:future:{{{name}}}" for name in (waiting_id, "f" * 32)]) == [None, None]
        assert store.blmpop(0.1, 1, NOBODYS_INBOX, direction="LEFT") is None
        (composed.folder / "release").touch()
        assert victim.wait_for("told").split() == ["told", "held", "1500000", "2000000"]
        (composed.folder / "release").unlink()


# Code: run where it is sealed.


def test_the_clients_redis_user_without_the_key_has_no_code_and_no_python_run(composed: Composed) -> None:
    mark, script = composed.folder / "ran", composed.folder / "python"
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o700)
    (composed.folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef f(request): ...\n")
    by_name = Code("theirs", target="theirs:f", args_type="application/msgpack", args=b"\x90")
    store = redis.Redis.from_url(composed.url("redis", "client"))
    store.set(f"{ROOT_KEY}:code:{by_name.sha256}", by_name.to_bytes())
    desired = json.loads(store.get(f"{ROOT_KEY}:desired") or b"")
    desired["version"] += 1
    known = {**desired["backends"]["double"], "version": desired["version"]}
    theirs = {
        "by-name": {**known, "name": "by-name", "code": by_name.sha256},
        "by-python": {**known, "name": "by-python", "options": {"python": str(script)}},
        "by-pip": {**known, "name": "by-pip", "options": {"pip": [str(composed.folder)]}},
    }
    store.set(f"{ROOT_KEY}:desired", json.dumps({**desired, "backends": {**desired["backends"], **theirs}}))
    store.publish(f"{ROOT_KEY}:changed", b"")

    def said() -> list[str]:
        shown = composed.shell("controller").run("status").stdout
        return [name for name in theirs if any(line.startswith(f"{name}: ") and "deploy it again" in line for line in shown.splitlines())]

    wait_until(lambda: len(said()) == 3, told=lambda: f"{said()}\n{composed.outputs()}")
    assert not mark.exists()
    tidy = "import mqserve as serve; client = serve.connect(); [client.delete_backend(name) for name in ('by-name', 'by-python', 'by-pip')]"
    assert composed.shell("client").python(tidy).returncode == 0
    store.close()


# Secrets show nowhere.


DEBUGGING = """
import logging
logging.basicConfig(level=logging.DEBUG)
import mqserve as serve
client = serve.connect()
print(client, vars(client), client._connections)
print(serve.get_handle("double").remote("the request's own content").result(timeout=20))
"""


def test_no_secret_shows_in_any_output_status_or_process_list(composed: Composed, url: str) -> None:
    httpx.get(f"{url}/fail", timeout=30)
    composed.broker.ctl("close_all_connections", "to hear what they say of it")
    composed.store.freeze()
    wait_until(lambda: "did not answer" in composed.outputs())
    composed.store.thaw()
    wait_until(lambda: httpx.post(f"{url}/double", json=21, timeout=30).text == "42")
    shown = [composed.outputs()]
    for role in ROLES:
        done = composed.shell(role).run("-v", "status")  # but for the controller's, it fails
        shown += [done.stdout, done.stderr]
    done = composed.shell("client").python(DEBUGGING)
    assert done.returncode == 0, done.stderr
    assert "DEBUG:aiormq" not in done.stderr
    shown += [done.stdout, done.stderr]
    processes = [process for program in composed.programs.values() for process in (psutil.Process(program.pid), *program.descendants())]
    assert len(processes) > len(composed.programs), "the replicas are among them"
    for process in processes:
        with suppress(psutil.Error):  # it has just ended
            shown.append(" ".join(process.cmdline()))
    assert all("***" in text for text in shown[:1]), "they speak of URLs"
    assert not {name for name, secret in composed.env.items() for text in shown if secret in text}


def test_last_of_all_an_operator_ends_the_instance_by_the_controllers_user(composed: Composed) -> None:
    ended = composed.shell("controller").run("shutdown")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert composed.programs["controller"].wait() == 0
    assert composed.shell("controller").run("status").returncode == 1
