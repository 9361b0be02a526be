"""What every test may ask for: the URLs of real servers, the servers themselves, and a namespace of its own."""

import functools
import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx
import httpx._transports.default as transports
import pytest
from selenium.webdriver import Chrome
from xdist.scheduler import LoadScopeScheduling

import mqserve as serve
from tests import browsers
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import FORMS, ROOT, SECRET_KEY, CommandLine, Deploy, answers, new_namespace, started, wait_until, wait_until_back
from tests.ports import free_port
from tests.server_programs import HOW_TO_INSTALL, ServerMissing
from tests.servers import PrivateRabbitMQ, PrivateRedis, PrivateServer
from tests.tallies import Tally

Server = TypeVar("Server", bound=PrivateServer)

GIVEN_BROKER_URL = os.environ.get("MQSERVE_TEST_BROKER_URL", "")
GIVEN_STORE_URL = os.environ.get("MQSERVE_TEST_STORE_URL", "")
HTTP_TIMEOUT_S = 30.0
GIVEN_SERVERS = bool(GIVEN_BROKER_URL or GIVEN_STORE_URL)

# The servers themselves are asked for by tests that stop, kill or freeze them; the URLs by tests that use them.
BREAKING_FIXTURES = {"broker_server", "store_server"}
LONG = (
    "test_asgi_apps",
    "test_exceptions",
    "test_behaviours_",
    "test_must_hold",
    "test_http_edge",
    "test_dead_letters",
    "test_cli",
)  # but for their embedded form
TEST_BY_TEST = {"test_detached", "test_run_in_the_foreground", "test_nodes_and_locations"}  # an instance for each, and they take long
LONGEST = (
    "test_detached", "test_soak", "test_malformed", "test_least_privilege", "test_health", "test_replica_rows", "test_proxy_rows",
    "test_broker_rows", "test_odd_keys", "test_store_rows", "test_overload", "test_drain", "test_controllers", "test_must_hold_faults",
    "test_slopes", "test_behaviours_cancellation", "test_behaviours_user_code", "test_behaviours_traffic", "test_clients",
    "test_exceptions", "test_docs", "test_replicas", "test_status", "test_forks", "test_nodes_and_locations", "test_cli", "test_http",
    "test_handles", "test_routing", "test_behaviours_shutdown", "test_messages", "test_behaviours_reconfigure", "test_lease",
    "test_deleted", "test_futures_by_id", "test_http_edge", "test_cli_interrupts", "test_must_hold", "test_behaviours_batching",
    "test_behaviours_config", "test_setup", "test_ended", "test_direct_publishing",
)  # fmt: skip
SERVER_FIXTURES = {"broker_url", "store_url", *BREAKING_FIXTURES}


def pytest_configure(config: pytest.Config) -> None:
    if bool(GIVEN_BROKER_URL) != bool(GIVEN_STORE_URL):
        raise pytest.UsageError("set both MQSERVE_TEST_BROKER_URL and MQSERVE_TEST_STORE_URL, or neither for private servers")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, and then in all that the tests start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith("MQSERVE_") and not name.startswith("MQSERVE_TEST_")]:
        del os.environ[name]  # the settings of the person who runs the tests are not what the tests specify
    # httpx's default is 5 s, which a busy machine can take: a test that says nothing of time is not about time. One object, shared by all.
    default = httpx._config.DEFAULT_TIMEOUT_CONFIG
    default.connect = default.read = default.write = default.pool = HTTP_TIMEOUT_S
    # Each `httpx.get` makes a client that reads the certificates of all authorities, which takes 18 ms: they are read once.
    transports.create_ssl_context = functools.cache(transports.create_ssl_context)  # type: ignore[attr-defined]


def place_of(module: Path) -> int:
    """The long modules begin first, so that no worker is left with one at the end; the others follow as they are."""
    return LONGEST.index(module.stem) if module.stem in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first: those without servers, those with, those that break them. Several workers begin with the long modules."""
    for item in items:
        if BREAKING_FIXTURES & set(fixtures_of(item)):
            item.add_marker(pytest.mark.breaks_servers)
        if "faults" in item.path.parts and item.get_closest_marker("long") is None:
            item.add_marker(pytest.mark.faults)
        if item.path.name.startswith(LONG) and ("distributed" in item.name or SERVER_FIXTURES & set(fixtures_of(item))):
            item.add_marker(pytest.mark.long)
        item.extra_keyword_matches.update(f"row_{mark.args[0]:02}" for mark in item.iter_markers("row"))
    items.sort(key=lambda item: (breaks_servers(item), bool(SERVER_FIXTURES & set(fixtures_of(item)))))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: place_of(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With `-n` a worker gets whole modules, so that their fixtures, an instance for most, are made once; and in our order."""
    config.option.loadscopereorder = False
    return ModuleByModule(config, log)


class ModuleByModule(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out a module, or one form of it where its tests run in both; single tests of those that share nothing."""

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        if Path(module).stem in TEST_BY_TEST:
            return nodeid
        return next((f"{module} {form}" for form in FORMS if form in test), module)

    def remove_node(self, node: Any) -> str | None:
        """Returns the test at which a worker crashed, and lets others have what it has not run. xdist hands out what it has run, too, as
        work without a test in it: whoever gets that last waits for ever. And it runs the test again that made the worker crash."""
        work = self.assigned_work.pop(node)
        crashed = next((test for unit in work.values() for test, is_done in unit.items() if not is_done), None)
        for scope, unit in work.items():
            if left := {test: False for test, is_done in unit.items() if not (is_done or test == crashed)}:
                self.workqueue[scope] = left
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed


def pytest_sessionfinish() -> None:
    gc.collect()  # CPython 3.11 cannot parse a module while asyncio's leftovers are finalized, and plugins import some at the end


def pytest_runtest_setup(item: pytest.Item) -> None:
    if GIVEN_SERVERS and breaks_servers(item):
        refuse("this test stops, kills or freezes servers, which need to be private: unset MQSERVE_TEST_*_URL")


def breaks_servers(item: pytest.Item) -> bool:
    return item.get_closest_marker("breaks_servers") is not None


def fixtures_of(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


def refuse(reason: str) -> NoReturn:
    """Skip at home, fail in CI: there a test that did not run must not look like one that passed."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def broker_url(request: pytest.FixtureRequest) -> str:
    """A RabbitMQ that answers."""
    return GIVEN_BROKER_URL or str(request.getfixturevalue("session_broker").url)


@pytest.fixture(scope="session")
def store_url(request: pytest.FixtureRequest) -> str:
    """A Redis that answers."""
    return GIVEN_STORE_URL or str(request.getfixturevalue("session_store").url)


@pytest.fixture
def broker_server(session_broker: PrivateRabbitMQ, request: pytest.FixtureRequest) -> Iterator[PrivateRabbitMQ]:
    """The RabbitMQ behind `broker_url`, to stop, kill or freeze: it is mended for the next test."""
    with for_whoever_comes_next(session_broker, request):
        yield session_broker


@pytest.fixture
def store_server(session_store: PrivateRedis, request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    """The Redis behind `store_url`, to stop, kill or freeze: it is mended for the next test."""
    with for_whoever_comes_next(session_store, request):
        yield session_store


@contextmanager
def for_whoever_comes_next(server: PrivateServer, request: pytest.FixtureRequest) -> Iterator[None]:
    """Mends the server, and waits until the module's instance has found that out."""
    client: serve.Client | None = request.getfixturevalue("client") if "client" in request.fixturenames else None
    yield
    server.mend()
    if client is not None:
        wait_until_back(client)


@pytest.fixture
def broker_wire(broker_url: str) -> Iterator[Wire]:
    """A way to the RabbitMQ, to slow down, hold still, cut."""
    with Wire(broker_url) as wire:
        yield wire


@pytest.fixture
def store_wire(store_url: str) -> Iterator[Wire]:
    """A way to the Redis, to slow down, hold still, cut."""
    with Wire(store_url) as wire:
        yield wire


@pytest.fixture(scope="session")
def session_broker() -> Iterator[PrivateRabbitMQ]:
    yield from running(PrivateRabbitMQ)


@pytest.fixture(scope="session")
def session_store() -> Iterator[PrivateRedis]:
    yield from running(PrivateRedis)


def running(make: Callable[[], Server]) -> Iterator[Server]:
    try:
        server = make().start()
    except ServerMissing as missing:
        refuse(f"{missing}.\n{HOW_TO_INSTALL}")
    with server:
        yield server


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Holds handlers until the test opens it."""
    return Gate(tmp_path)


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    """Where handlers note what they did."""
    return Tally(tmp_path)


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A namespace no other test has, with the test's name in it: it shows in queues, keys and logs."""
    return new_namespace(request.node.name.removeprefix("test_"))


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Both forms in turn; a module's `distributed_only` tests have one."""
    return str(request.param)


@pytest.fixture(scope="module")
def shared_namespace(form: str, request: pytest.FixtureRequest) -> str:
    """The namespace of the module's instance."""
    return new_namespace(request.module.__name__.rpartition("test_")[2])


@pytest.fixture(scope="module")
def client(form: str, shared_namespace: str, request: pytest.FixtureRequest) -> Iterator[serve.Client]:
    """An instance that the tests of a module share, on a free port; its `HTTP_OPTIONS` are the module's, if it has any."""
    options = getattr(request.module, "HTTP_OPTIONS", {})
    urls = {name: request.getfixturevalue(name) for name in ("broker_url", "store_url")} if form == "distributed" else {}
    with started(**urls, namespace=shared_namespace, **options) as client:
        yield client


@pytest.fixture
def url(client: serve.Client) -> str:
    """Where the instance's proxy listens."""
    return client.http_url()


@pytest.fixture
def deploy(client: serve.Client) -> Iterator[Deploy]:
    """Deploys to the module's instance, until the end of the test."""
    deploy = Deploy(client)
    yield deploy
    deploy.undo()


@pytest.fixture(scope="module")
def environment(client: serve.Client, shared_namespace: str, broker_url: str, store_url: str) -> dict[str, str]:
    """The environment in which another process joins the module's distributed instance."""
    return {
        **os.environ,
        "MQSERVE_BROKER_URL": broker_url,
        "MQSERVE_STORE_URL": store_url,
        "MQSERVE_SECRET_KEY": SECRET_KEY,
        "MQSERVE_NAMESPACE": shared_namespace,
        "PYTHONPATH": str(ROOT),  # handlers of the tests may use their gates and tallies
    }


@pytest.fixture(scope="module")
def proxies(form: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Where the proxies of the instance listen: two, where there can be two."""
    urls = [request.getfixturevalue("client").http_url()]
    if form == "embedded":
        yield urls
        return
    shell = CommandLine(tmp_path_factory.mktemp("other"), **request.getfixturevalue("environment"))
    port = free_port()
    program = shell.start("proxy", "--port", str(port))
    urls.append(f"http://127.0.0.1:{port}")
    wait_until(lambda: answers(f"{urls[1]}/-/readyz"), told=lambda: program.output)
    yield urls
    shell.close()


@pytest.fixture
def joining(tmp_path: Path, environment: dict[str, str]) -> Iterator[CommandLine]:
    """The command line of somebody who joins the module's distributed instance."""
    shell = CommandLine(tmp_path, **environment)
    yield shell
    shell.close()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[CommandLine]:
    """The command line of somebody who has set nothing, in an empty folder."""
    shell = CommandLine(tmp_path)
    yield shell
    shell.close()


@pytest.fixture
def distributed_shell(tmp_path: Path, broker_url: str, store_url: str, namespace: str) -> Iterator[CommandLine]:
    """The command line of somebody whose environment names a broker, a store, a key and a namespace."""
    shell = CommandLine.joining(tmp_path, broker_url, store_url, namespace)
    yield shell
    shell.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    programs = browsers.find_browser()
    if programs is None:
        refuse(f"Chromium and its driver are not installed.\n{browsers.HOW_TO_INSTALL}")
    with browsers.opened(*programs, tmp_path) as chrome:
        yield chrome


@pytest.fixture(scope="session")
def amqplib(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of Node's modules with amqplib, from npm."""
    folder = tmp_path_factory.mktemp("node")
    if shutil.which("npm") is None:
        refuse("there is no npm here: install nodejs and npm")
    installed = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "amqplib@0.10"], cwd=folder, capture_output=True, timeout=100)
    if installed.returncode:
        refuse(f"npm cannot install amqplib: {installed.stderr.decode()[-500:]}")
    return str(folder / "node_modules")


@pytest.fixture(params=FORMS)
def either_shell(request: pytest.FixtureRequest, tmp_path: Path) -> CommandLine:
    """The command line of each form in turn, with a cache of code of its own."""
    shell: CommandLine = request.getfixturevalue("shell" if request.param == "embedded" else "distributed_shell")
    return shell.with_variables(MQSERVE_CODE_CACHE=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as we do."""
    return "asyncio"
