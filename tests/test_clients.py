"""Clients of instances that others run: which one is meant, how one leaves, and what becomes of it when its instance is started again."""

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pytest
import redis

import mqserve as serve
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import ROOT, SECRET_KEY, CommandLine, Deploy, Program, new_name, new_namespace, wait_until

Connect = Callable[..., serve.Client]


class On(TypedDict):
    """What tells `serve.connect`, and `serve.start`, where an instance is."""

    broker_url: str
    store_url: str
    namespace: str


class Detached:
    """Instances that run in processes of their own, until somebody ends them."""

    def __init__(self, folder: Path, broker_url: str, store_url: str) -> None:
        self._folder = folder
        self._broker_url, self._store_url = broker_url, store_url
        self._namespaces: set[str] = set()

    def on(self, namespace: str) -> On:
        """Whoever starts it, it is ended with the module's tests, also where one of them fails."""
        self._namespaces.add(namespace)
        return On(broker_url=self._broker_url, store_url=self._store_url, namespace=namespace)

    def start(self, namespace: str) -> On:
        started = self._run(namespace, "start", "--location", "NoServer")
        assert started.wait() == 0, started.output
        return self.on(namespace)

    def shut_down(self, namespace: str) -> None:
        ended = self._run(namespace, "shutdown")
        assert ended.wait() == 0, ended.output

    def _run(self, namespace: str, command: str, *arguments: str) -> Program:
        shell = CommandLine(
            self._folder,
            MQSERVE_BROKER_URL=self._broker_url,
            MQSERVE_STORE_URL=self._store_url,
            MQSERVE_SECRET_KEY=SECRET_KEY,
            XDG_STATE_HOME=str(self._folder),
            PYTHONPATH=str(ROOT),
        )
        return shell.start(command, "--namespace", namespace, *arguments)

    def close(self) -> None:
        for namespace in self._namespaces:
            self._run(namespace, "shutdown").wait()  # one that has ended already is none to end


@pytest.fixture(scope="module")
def detached(broker_url: str, store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detached]:
    instances = Detached(tmp_path_factory.mktemp("detached"), broker_url, store_url)
    yield instances
    instances.close()


@pytest.fixture(scope="module")
def here(detached: Detached) -> On:
    """An instance that the tests of this module share."""
    return detached.start(new_namespace("here"))


@pytest.fixture(scope="module")
def there(detached: Detached) -> On:
    """Another one beside it."""
    return detached.start(new_namespace("there"))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)


@pytest.fixture
def connect(key: None) -> Iterator[Connect]:
    """`serve.connect`, and what it returned is closed with the test."""
    with ExitStack() as clients:

        def connect(**where: Any) -> serve.Client:
            client = serve.connect(**where)
            clients.callback(client.close)
            return client

        yield connect


@pytest.fixture
def named(here: On, monkeypatch: pytest.MonkeyPatch) -> On:
    """The one that the environment names."""
    for name, value in here.items():
        monkeypatch.setenv(f"MQSERVE_{name.upper()}", str(value))
    return here


@pytest.fixture
def deploy(here: On, connect: Connect) -> Iterator[Deploy]:
    """To the instance `here`; the test may close the client."""
    deploy = Deploy(connect(**here))
    yield deploy
    deploy.client = connect(**here)
    deploy.undo()


def echo(request: Any) -> Any:
    return request.data


def gated(gate: Gate) -> Callable[[Any], Any]:
    def wait(request: Any) -> Any:
        gate.pass_through()
        return request.data

    return wait


def says(call: Callable[[], object], words: str) -> None:
    with pytest.raises(serve.InstanceError, match=words):
        call()


# Which instance is meant.


def test_a_second_client_of_a_place_is_the_same_one_and_of_another_place_is_not(here: On, there: On, connect: Connect) -> None:
    first, other = connect(**here), connect(**there)
    assert first is connect(**here) and other is connect(**there)
    assert first is not other


def test_threads_that_connect_at_once_share_a_client(here: On, there: On, connect: Connect) -> None:
    with ThreadPoolExecutor(16) as threads:
        clients = list(threads.map(lambda number: connect(**(here, there)[number % 2]), range(16)))
    assert {id(client) for client in clients} == {id(clients[0]), id(clients[1])}
    assert clients[0] is not clients[1]


def test_module_level_functions_act_on_the_client_that_was_joined_last(deploy: Deploy, here: On, there: On, connect: Connect) -> None:
    name = deploy(echo)
    assert name in serve.list_backends()
    with serve.connect(**there):
        assert name not in serve.list_backends()
    assert name in serve.list_backends(), "which is the one before again, once the last one is closed"
    connect(**there)
    assert name not in serve.list_backends()
    connect(**here)
    assert name in serve.list_backends()


def test_connect_without_arguments_is_the_instance_of_the_environment_whatever_was_joined_last(
    named: On, there: On, connect: Connect
) -> None:
    other = connect(**there)
    mine = connect()
    assert mine is not other and mine is connect(**named)


def test_connect_without_arguments_is_what_was_joined_last_where_the_environment_names_nothing(here: On, connect: Connect) -> None:
    says(connect, "no instance in this process .*call serve.start")
    assert connect(**here) is connect()


def test_an_embedded_instance_of_this_process_is_meant_by_connect_and_in_its_own_code(deploy: Deploy, here: On, connect: Connect) -> None:
    there = deploy(lambda request: "the other one")

    def ask(request: Any) -> list[Any]:
        return [
            list(serve.list_endpoints()),
            serve.get_handle("inner").remote().result(30),
            request.data.remote().result(30),
            serve.connect() is serve.connect(),
        ]

    with serve.start(http_options={"location": None}) as embedded:
        embedded.create_backend("outer", ask)
        embedded.create_endpoint("outer", backend="outer")
        embedded.create_backend("inner", lambda request: "inner")
        embedded.create_endpoint("inner", backend="inner")
        far = connect(**here).get_handle(there)
        assert serve.connect() is embedded
        connect(**here)
        asked = embedded.get_handle("outer").remote(far).result(30)
        assert asked == [["outer", "inner"], "inner", "the other one", True]
        assert there in serve.list_endpoints(), "what its code did has not changed whom this program means"


def test_a_handle_keeps_its_instance_wherever_it_travels(deploy: Deploy, there: On, connect: Connect) -> None:
    def call_all(request: Any) -> list[Any]:
        return [handle.remote().result(30) for handle in request.data]

    def who(request: Any) -> str:
        return "there"

    caller, mine = deploy(call_all), deploy(lambda request: "here")
    others = Deploy(connect(**there))
    theirs = others(who)
    handles = [deploy.client.get_handle(mine), others.client.get_handle(theirs)]
    assert [pickle.loads(pickle.dumps(handle)).remote().result(30) for handle in handles] == ["here", "there"]
    assert deploy.client.get_handle(caller).remote(handles).result(30) == ["here", "there"]
    assert pickle.loads(pickle.dumps(others.client)) is others.client
    others.undo()


# Leaving.


def test_a_client_that_is_closed_leaves_its_instance_and_says_so_ever_after(deploy: Deploy, here: On, connect: Connect) -> None:
    name, client = deploy(echo), deploy.client
    handle = client.get_handle(name)
    for _ in range(2):
        client.close()
    closed = r"has been closed: call serve\.connect\(\)"
    for call in (client.list_backends, lambda: client.get_handle(name), lambda: handle.remote(1), lambda: client.future("a" * 32)):
        says(call, closed)
    says(client.__enter__, closed)
    says(client.shutdown, "its instance runs on: the shutdown.* of another client ends it")
    assert repr(client).endswith(", closed>")
    again = connect(**here)
    assert again is not client and again.get_handle(name).remote(1).result(30) == 1


def test_whoever_waits_for_a_client_that_is_closed_is_told_and_can_read_the_result_elsewhere(
    deploy: Deploy, here: On, connect: Connect, tmp_path: Path
) -> None:
    gate, client, constructing = Gate(tmp_path), deploy.client, tmp_path / "constructing"
    handle = client.get_handle(deploy(gated(gate)))
    running = handle.remote("running")
    wait_until(lambda: gate.came == 1)
    waiting: list[Callable[[], Any]] = [
        running.result,
        handle.remote("in the queue").result,
        handle.remote(running).result,  # which is not sent before it is there
        client.future(running.id).result,
        lambda: client.create_backend(new_name("b"), SlowToConstruct, str(constructing)),
    ]
    with ThreadPoolExecutor(len(waiting)) as threads:
        told = [threads.submit(wait) for wait in waiting]
        wait_until(constructing.exists)
        client.close()
        for answer in told:
            says(partial(answer.result, 20), r"was closed meanwhile.*another client's future\(id\)")
    gate.open()
    assert connect(**here).future(running.id).result(30) == "running"


@pytest.mark.anyio
async def test_whoever_awaits_a_result_of_a_client_that_is_closed_is_told(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    ref = await deploy.client.get_handle(deploy(gated(gate)), sync=False).remote()
    asyncio.get_running_loop().call_later(0.1, lambda: threading.Thread(target=deploy.client.close).start())
    with pytest.raises(serve.InstanceError, match="was closed meanwhile"):
        async with asyncio.timeout(20):
            await ref
    gate.open()


class SlowToConstruct:
    def __init__(self, constructing: str) -> None:
        Path(constructing).touch()
        time.sleep(5)

    def __call__(self, request: Any) -> None: ...


def test_what_was_sent_before_a_client_was_closed_is_on_its_way(deploy: Deploy, here: On, connect: Connect) -> None:
    name, large = deploy(echo), b"x" * 2_000_000  # which travels by way of the store
    for _ in range(5):
        with serve.connect(**here) as client:
            assert client is connect(**here)
        refs = [client.get_handle(name).remote(value) for value in [*range(20), large]]
        client.close()
        assert [connect(**here).future(ref.id).result(30) for ref in refs] == [*range(20), large]


def test_a_block_closes_the_client_unless_somebody_else_has_it(here: On) -> None:
    with serve.connect(**here) as alone:
        pass
    assert not alone.is_open
    held = serve.connect(**here)
    with serve.connect(**here) as shared:
        assert shared is held
    assert held.list_backends() is not None
    held.close()
    with serve.connect(**here) as first:
        with serve.connect(**here) as second:
            assert second is first
        assert first.list_backends() is not None
    assert first.list_backends() is not None, "whoever connected meanwhile may go on"
    first.close()


def test_a_detached_instance_outlives_the_block_and_the_client_that_started_it(detached: Detached) -> None:
    on = detached.on(new_namespace("outlives"))
    with serve.start(detached=True, http_options={"location": None}, **on) as starter:
        assert starter.list_backends() == {}
    assert not starter.is_open
    with serve.connect(**on) as client:
        assert client is not starter
        client.shutdown()
    with serve.start(detached=True, http_options={"location": None}, **on) as starter:
        assert serve.connect() is starter, "it is the instance that this process started last"
        starter.shutdown()


def test_whoever_runs_an_instance_ends_it_and_cannot_leave_it() -> None:
    with serve.start(http_options={"location": None}) as client:
        says(client.close, r"runs the instance, which would end with its client: call shutdown\(\)")
        assert serve.connect() is client
        with serve.connect() as shared:
            assert shared is client
        assert client.list_backends() == {}, "which the block of another has not ended either"
    says(client.list_backends, "has already been shut down")
    client.close()
    client = serve.start(http_options={"location": None})
    with serve.connect() as shared:
        assert shared is client
    assert client.list_backends() == {}
    serve.shutdown()


def test_a_second_shutdown_does_not_end_what_was_joined_before(here: On, connect: Connect) -> None:
    joined = connect(**here)
    serve.start(http_options={"location": None})
    serve.shutdown()
    serve.shutdown()
    assert joined.is_open and joined.list_backends() is not None


def test_an_instance_of_this_process_ends_by_shutdown_though_another_was_joined_and_left(here: On) -> None:
    mine = serve.start(http_options={"location": None})
    with serve.connect(**here):
        pass
    serve.shutdown()
    assert not mine.is_open


# An instance that ends, and one that is started again.


def test_a_client_goes_on_with_the_instance_that_is_started_again(detached: Detached, connect: Connect) -> None:
    namespace = new_namespace("again")
    client = connect(**detached.start(namespace))
    client.create_backend("echo", echo)
    client.create_endpoint("echo", backend="echo")
    handle = client.get_handle("echo")
    assert handle.remote(1).result(30) == 1
    detached.shut_down(namespace)
    ended = r"has been shut down, and none runs under its namespace: start one .* serve\.connect\(\) joins it"
    says(client.list_backends, ended)
    says(lambda: client.create_backend("more", echo), ended)
    wait_until(lambda: client.has_ended)
    says(lambda: handle.remote(2), ended)
    says(lambda: client.get_handle("echo"), ended)
    assert connect(**detached.start(namespace)) is client and not client.has_ended
    assert client.list_backends() == {}
    client.create_backend("echo", lambda request: ["new", request.data])
    client.create_endpoint("echo", backend="echo")
    assert handle.remote(3).result(30) == ["new", 3]
    assert pickle.loads(pickle.dumps(handle)).remote(4).result(30) == ["new", 4]
    client.shutdown()
    says(lambda: handle.remote(5), "has already been shut down")


def test_a_deploy_of_an_instance_that_is_shut_down_meanwhile_ends_at_once(detached: Detached, connect: Connect, tmp_path: Path) -> None:
    namespace = new_namespace("meanwhile")
    client = connect(**detached.start(namespace))
    with ThreadPoolExecutor(1) as background:
        deploying = background.submit(client.create_backend, "slow", SlowToConstruct, str(tmp_path / "constructing"))
        wait_until(lambda: (tmp_path / "constructing").exists())
        detached.shut_down(namespace)
        says(lambda: deploying.result(30), "is being shut down: start it again|has been shut down")
    client.shutdown()  # there is nothing left to end


def test_whoever_ran_an_instance_that_others_ended_is_told_and_may_connect_or_start(detached: Detached) -> None:
    namespace = new_namespace("taken")
    on = detached.on(namespace)
    mine = serve.start(http_options={"location": None}, **on)
    detached.shut_down(namespace)
    says(mine.list_backends, "none runs under its namespace: start one")
    detached.start(namespace)
    says(mine.list_backends, r"another one has its namespace: serve\.connect\(\) joins that")
    with serve.connect(**on) as joined:
        assert joined is not mine and joined.list_backends() == {}
    assert not mine.is_open
    detached.shut_down(namespace)
    mine = serve.start(http_options={"location": None}, **on)
    detached.shut_down(namespace)
    says(mine.list_backends, "none runs under its namespace: start one")
    with serve.start(http_options={"location": None}, **on) as started:
        assert started is not mine and started.list_backends() == {}


def test_a_store_that_came_back_empty_is_not_taken_for_another_instance(deploy: Deploy, here: On, connect: Connect, store_url: str) -> None:
    name, members = deploy(echo), Members(store_url, here["namespace"])
    handle = deploy.client.get_handle(name)
    wait_until(lambda: name in members.compared().endpoints)
    members.close()
    with redis.Redis.from_url(store_url) as store:
        store.delete(*store.scan_iter(f"mqserve:{here['namespace']}:*"))
        assert name in deploy.client.list_backends(), "it waits for the controller to write them back"
        assert handle.remote(1).result(30) == 1
        assert not deploy.client.has_ended
        deploy.client.update_backend_config(name, {"max_concurrent_queries": 3})
    assert connect(**here) is deploy.client
