"""`mqserve status` shows what there is, whatever it is called."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from typing import Any

import pika
import pytest
import redis
from rich.console import Console

import mqserve as serve
from mqserve.broker.errors import BrokerUnavailable
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.redis.store import open_redis
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.commands.status import Facts, read_facts, show_status
from mqserve.controller import changes
from mqserve.controller.lease import LAPSED_AFTER_S, claim_instance
from mqserve.controller.state.documents import Backend, HttpOptions, Observed, deaths_of
from mqserve.controller.state.reading import read_desired
from tests.broker.traffic import until
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import DEADLINE_S, CommandLine, Deploy, distributed_only, new_name, wait_until

pytestmark = [distributed_only, pytest.mark.anyio]


async def shown(environment: dict[str, str]) -> str:
    """What `mqserve status` prints, in this process, since it takes a second to make one."""
    printed = StringIO()
    await show_status(Settings.read(environment), console=Console(file=printed, width=240))
    return printed.getvalue()


@pytest.fixture
def say(store_url: str, shared_namespace: str) -> Iterator[Any]:
    """Writes the beat of a member, as of now; it is gone with the test."""
    keys, fields = StoreKeys(shared_namespace), set[str]()
    with redis.Redis.from_url(store_url) as store:

        def say(kind: str, member_id: str, **facts: Any) -> None:
            seconds, microseconds = store.time()
            beat = {"kind": kind, "id": member_id, "at": seconds * 1000 + microseconds // 1000, **facts}
            fields.add(f"{kind}:{member_id}")
            store.hset(keys.beats, f"{kind}:{member_id}", json.dumps(beat))

        yield say
        store.hdel(keys.beats, *fields)


async def test_names_with_brackets_are_shown_as_they_are(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], say: Any
) -> None:
    name, route = new_name("e"), f"/{new_name('x')}[/y]"
    client.create_endpoint(name, backend=deploy(lambda request: "well"), route=route)
    try:
        say("node", "[red]node[/]", url="http://[fe80::1]:9000")
        printed = await shown(environment)
    finally:
        client.delete_endpoint(name)
    assert all(text in printed for text in (route, "[red]node[/]", "http://[fe80::1]:9000")), printed


async def test_what_a_member_says_has_no_escape_codes_and_begins_no_line(
    client: serve.Client, environment: dict[str, str], say: Any
) -> None:
    forged = "23:59:59 [1] ERROR mqserve.FORGED: yes"
    say("node", f"odd\n{forged}", url="http://there\x1b]0;title\x07\u202eup", error=f"well\r\n{forged}\x1b[31m")
    printed = await shown(environment)
    assert "mqserve.FORGED" in printed and r"\x1b]0;title\x07" in printed and r"\u202eup" in printed
    lines = printed.split("\n")
    assert all(line.isprintable() and not line.startswith("23:59:59") for line in lines), printed


async def test_a_member_of_a_kind_that_this_version_does_not_know_is_shown_last(
    deploy: Deploy, environment: dict[str, str], say: Any
) -> None:
    deploy(lambda request: "well")
    say("gardener", "of-another-version")
    members, _, _ = (await shown(environment)).partition("Backends")
    kinds = [line.split()[0] for line in members.splitlines() if line.rstrip().endswith("s ago")]
    assert kinds == ["node", "proxy", "replica", "gardener"], members


async def test_a_proxy_that_cannot_follow_is_shown_with_its_reason_until_it_can(
    client: serve.Client, environment: dict[str, str], shared_namespace: str, store_url: str
) -> None:
    words, keys = "the code of-nobody is not in the store", StoreKeys(shared_namespace)
    async with open_redis(store_url, shared_namespace) as store, asyncio.timeout(DEADLINE_S):
        instance = read_desired(await store.get(keys.desired)).instance
        for middlewares, is_shown in (("of-nobody", True), ("", False)):
            await changes.commit(store, keys, instance, changes.set_middlewares(middlewares))
            while (words in await shown(environment)) is not is_shown:
                pass


# As facts.


async def facts(environment: dict[str, str], **variables: str) -> Facts:
    async with read_facts(Settings.read({**environment, **variables})) as facts:
        return facts


async def test_the_facts_as_json_are_those_of_the_table(
    client: serve.Client, deploy: Deploy, joining: CommandLine, shared_namespace: str
) -> None:
    name = deploy(lambda request: "well", route=f"/{new_name('r')}", num_replicas=2)
    told = json.loads(joining.run("status", "--json").stdout)
    assert (told["namespace"], told["state"], told["detached"], told["controller"]["state"]) == (shared_namespace, "runs", False, "leads")
    assert (told["broker"]["state"], told["store"]["state"], told["unknown"], told["problems"]) == ("up", "up", {}, {})
    assert sorted(member["kind"] for member in told["members"]) == ["node", "proxy", "replica", "replica"]
    (backend,) = [backend for backend in told["backends"] if backend["name"] == name]
    assert {key: backend[key] for key in ("state", "ready", "wanted", "waiting", "dead_letters", "trouble")} == {
        "state": "ready", "ready": 2, "wanted": 2, "waiting": 0, "dead_letters": 0, "trouble": "",
    }  # fmt: skip
    (endpoint,) = [endpoint for endpoint in told["endpoints"] if endpoint["name"] == name]
    assert (endpoint["traffic"], endpoint["shadows"]) == ({name: 1.0}, {})


async def test_dead_letters_are_counted_by_backend(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], broker_url: str, shared_namespace: str
) -> None:
    name, other = deploy(lambda request: "well"), deploy(lambda request: "well")
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for _ in range(3):
            channel.basic_publish(f"{shared_namespace}.dead", name, b"{}")
    found = {backend.name: backend.dead_letters for backend in (await facts(environment)).backends}
    assert (found[name], found[other]) == (3, 0)
    row = next(line.split() for line in (await shown(environment)).splitlines() if line.startswith(f"{name} "))
    assert row[-5:] == ["3", "1", "1", "0", "ready"], row
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        connection.channel().queue_purge(f"{shared_namespace}.dead.{name}")


async def test_a_backend_whose_ready_replicas_die_again_and_again_is_failing(environment: dict[str, str], store_url: str) -> None:
    namespace = new_name("storm")
    async with open_redis(store_url, namespace) as store:
        keys = StoreKeys(namespace)
        held = await claim_instance(store, keys, "n", HttpOptions(), detached=True)
        await changes.commit(store, keys, held.id, changes.create_backend(Backend("b", "c0de", "f")))
        await store.set(keys.observed, Observed(problems={deaths_of("b"): "21 ready replicas died"}).to_bytes())
        found = await facts({**environment, "MQSERVE_NAMESPACE": namespace})
    with redis.Redis.from_url(store_url) as whole:
        whole.delete(*whole.keys(f"*{namespace}*"))
    (backend,) = found.backends
    assert (backend.state, backend.trouble) == ("failing", "21 ready replicas died")
    assert found.problems["deaths of b"] == "21 ready replicas died"


async def test_jobs_that_wait_have_a_column_where_there_are_any(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], gate: Gate
) -> None:
    assert " jobs " not in (await shown(environment)).split("Endpoints")[0].split("Backends")[1]
    name = deploy(lambda request: gate.pass_through(), job_slots=1)
    jobs = [client.get_handle(name).submit(number) for number in range(3)]

    async def wait() -> bool:
        return [backend.jobs for backend in (await facts(environment)).backends if backend.name == name] == [2]

    await until(wait)
    row = next(line.split() for line in (await shown(environment)).splitlines() if line.startswith(f"{name} "))
    assert row[-6:] == ["0", "1", "1", "2", "0", "ready"], row
    gate.open()
    assert [job.result(timeout=30) for job in jobs] == [None] * 3


class Unwilling(EmbeddedQueue):
    """As RabbitMQ 4.3 is to a user who may not configure the queues."""

    async def depth(self, backend: str, generation: int, shards: int = 1) -> int | None:
        raise BrokerUnavailable("RabbitMQ does not let user 'client' do this")

    async def count_jobs(self, backend: str, generation: int) -> int | None:
        raise BrokerUnavailable("RabbitMQ does not let user 'client' do this")

    async def count_dead(self, backend: str) -> int | None:
        raise BrokerUnavailable("RabbitMQ does not let user 'client' do this")


async def test_what_rabbitmq_does_not_say_is_not_known(
    deploy: Deploy, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def open_unwilling(*args: object, **options: object) -> AsyncIterator[Unwilling]:
        yield Unwilling()

    monkeypatch.setattr("mqserve.commands.status.open_rabbitmq", open_unwilling)
    name = deploy(lambda request: "well")
    found = await facts(environment)
    (backend,) = [backend for backend in found.backends if backend.name == name]
    assert (backend.waiting, backend.jobs, backend.dead_letters, backend.state) == (None, None, None, "ready")
    assert found.unknown == {"what waits, and dead letters": "RabbitMQ does not let user 'client' do this"}
    row = next(line.split() for line in (await shown(environment)).splitlines() if line.startswith(f"{name} "))
    assert row[-5:] == ["?", "1", "1", "?", "ready"], row


LONGER_S = 2.0  # than with both servers: a busy machine starts any command slowly


@pytest.mark.parametrize("fault", ["refuse", "blackhole"])
@pytest.mark.parametrize("which", ["broker", "store"])
async def test_a_server_that_is_away_keeps_nobody_waiting_for_what_is_known_without_it(
    deploy: Deploy, joining: CommandLine, broker_wire: Wire, store_wire: Wire, which: str, fault: str
) -> None:
    name = deploy(lambda request: "well")
    wire = broker_wire if which == "broker" else store_wire
    getattr(wire, fault)()
    shell = joining.with_variables(**{f"MQSERVE_{which.upper()}_URL": wire.url})
    took_s: dict[CommandLine, list[float]] = {joining: [], shell: []}
    for arguments in (["status"], ["status"], ["status", "--json"]):
        for command_line, times in took_s.items():
            began = time.monotonic()
            told = command_line.run(*arguments)
            times.append(time.monotonic() - began)
        assert told.returncode == 1 and "Traceback" not in told.stderr, told
    assert min(took_s[shell]) < min(took_s[joining]) + LONGER_S, took_s
    found = json.loads(told.stdout)
    assert found[which]["state"] == "away" and wire.url.rpartition("@")[2].rstrip("/") in found[which]["trouble"]
    if which == "broker":
        assert (found["state"], found["controller"]["state"]) == ("runs", "leads")
        (backend,) = [backend for backend in found["backends"] if backend["name"] == name]
        assert (backend["state"], backend["ready"], backend["waiting"]) == ("ready", 1, None)
    else:
        assert (found["state"], found["controller"]["state"], found["broker"]["state"]) == ("unknown", "unknown", "up")
        assert list(found["unknown"]) == ["what the store has of it"]


async def test_an_instance_without_a_controller_is_shown_with_what_runs_of_it(form: str, distributed_shell: CommandLine) -> None:
    shell = distributed_shell
    controller = shell.start("controller")
    wait_until(lambda: shell.run("status").returncode == 0, told=lambda: controller.output)
    shell.start("node", "--node-id", "stays", "--no-proxy")
    wait_until(lambda: " stays " in shell.run("status").stdout)
    controller.kill()
    wait_until(lambda: "Controller missing for" in shell.run("status").stdout)
    told = json.loads(shell.run("status", "--json").stdout)
    assert (told["state"], told["controller"]["state"]) == ("runs", "missing") and told["controller"]["silent_s"] > LAPSED_AFTER_S
    assert [(member["id"], member["state"]) for member in told["members"]] == [("stays", "ready")]
    assert shell.run("shutdown").returncode == 0


async def test_a_namespace_without_an_instance_has_a_word_of_its_own_for_scripts(form: str, distributed_shell: CommandLine) -> None:
    told = distributed_shell.run("status", "--json")
    assert (told.returncode, json.loads(told.stdout)["state"]) == (1, "none")
