"""The command line as its users meet it: processes, their output, and what they leave behind."""

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pika
import pika.exceptions
import psutil
import pytest
import redis

import mqserve as serve
from mqserve.broker.store_keys import StoreKeys
from tests.faults.wire import Wire
from tests.instances import ROOT, SECRET_KEY, CommandLine, Program, answers, is_alive, wait_until
from tests.ports import free_port

HELLO = """
import os
import mqserve as serve

@serve.endpoint("/hello/{name}")
def hello(request):
    return f"Hello, {request.path_params['name']}! from {os.getpid()}"
"""


@pytest.fixture(params=["embedded", "distributed"])
def either_shell(request: pytest.FixtureRequest) -> CommandLine:
    """A command line of each form."""
    found: CommandLine = request.getfixturevalue("shell" if request.param == "embedded" else "distributed_shell")
    return found


def run_hello(shell: CommandLine) -> tuple[Program, str]:
    """A running hello.py and its URL."""
    program = shell.start("run", shell.file("hello.py", HELLO), "--port", "0")
    line = program.wait_for("Ctrl-C stops")
    found = re.search(r"http://\S+", line)
    assert found, line
    return program, found[0]


def test_the_version_is_told(shell: CommandLine) -> None:
    assert shell.run("--version").stdout == f"mqserve, version {serve.__version__}\n"


# Running a file.


def test_run_prints_its_url_and_a_curl_that_works(either_shell: CommandLine) -> None:
    program, url = run_hello(either_shell)
    curl = program.wait_for("curl ").strip()
    assert curl == f"curl {url}/hello/you"
    assert httpx.get(curl.removeprefix("curl "), timeout=30).text.startswith("Hello, you!")


def test_the_embedded_form_answers_its_first_request_soon(shell: CommandLine) -> None:
    took_s: list[float] = []
    while len(took_s) < 3 and min(took_s, default=5) >= 5:  # 2 s, on a machine that does nothing else
        port = free_port()
        started = time.monotonic()
        with shell.start("run", str(ROOT / "examples" / "hello.py"), "--port", str(port)):
            wait_until(lambda port=port: answers(f"http://127.0.0.1:{port}/hello/you"))  # type: ignore[misc]
            took_s.append(time.monotonic() - started)
    print(f"the first answer came {min(took_s):.2f} s after the command")
    assert min(took_s) < 5, took_s


def test_ctrl_c_ends_it_with_status_0(either_shell: CommandLine) -> None:
    program, url = run_hello(either_shell)
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert not answers(f"{url}/-/healthz")
    assert "Traceback" not in program.output, program.output


def test_a_function_of_the_run_file_works_in_another_process(distributed_shell: CommandLine) -> None:
    program, url = run_hello(distributed_shell)
    pid = int(httpx.get(f"{url}/hello/you", timeout=30).text.rpartition(" ")[2])
    assert pid != program.pid and pid in [child.pid for child in program.descendants()]


def test_code_of_an_importable_module_ships_by_name(either_shell: CommandLine) -> None:
    either_shell.file("shop.py", "class Till:\n    def __call__(self, request):\n        return f'from {__name__}'\n")
    either_shell.file(
        "app.py",
        "import mqserve as serve\n"
        "client = serve.start()\n"
        "client.create_backend('till', 'shop:Till')\n"
        "client.create_endpoint('till', backend='till', route='/till')\n",
    )
    program = either_shell.start("run", "app.py", "--port", "0")
    url = program.wait_for("Ctrl-C stops").split()[2]
    assert httpx.get(f"{url}/till", timeout=30).text == "from shop"


def test_run_lists_routes_pipelines_and_schedules(shell: CommandLine) -> None:
    file = shell.file(
        "all.py",
        "import mqserve as serve\n"
        "client = serve.start()\n"
        "client.create_backend('b', lambda request: request.data)\n"
        "client.create_endpoint('first', backend='b', route='/first')\n"
        "client.create_endpoint('second', backend='b')\n"
        "client.create_pipeline('both', ['first', 'second'], route='/both')\n"
        "client.schedule('nightly', 'second', cron='0 3 * * *')\n",
    )
    program = shell.start("run", file, "--port", "0")
    program.wait_for("Try:")
    assert "/first  (first)" in program.output and "/both  (both: first → second)" in program.output
    assert "schedule  nightly: 0 3 * * * (UTC) to second, next at " in program.output


def test_a_block_in_the_file_does_not_end_the_instance_of_run(shell: CommandLine) -> None:
    file = shell.file(
        "block.py",
        "import mqserve as serve\n"
        "with serve.start() as client:\n"
        "    client.create_backend('b', lambda request: 'served')\n"
        "    client.create_endpoint('e', backend='b', route='/e')\n",
    )
    program = shell.start("run", file, "--port", "0")
    found = re.search(r"http://\S+", program.wait_for("Ctrl-C stops"))
    assert found
    assert httpx.get(f"{found[0]}/e").text == "served"


def test_a_module_runs_by_its_name_too(shell: CommandLine) -> None:
    shell.file("app.py", HELLO)
    port = free_port()
    shell.start("run", "app:hello", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/hello/you"))


def test_flags_win_over_the_environment(shell: CommandLine) -> None:
    port = free_port()
    shell.with_variables(MQSERVE_HTTP_PORT="1").start("run", shell.file("hello.py", HELLO), "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/hello/you"))


def test_the_environment_sets_what_no_flag_does(shell: CommandLine) -> None:
    port = free_port()
    shell.with_variables(MQSERVE_HTTP_PORT=str(port)).start("run", shell.file("hello.py", HELLO))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/hello/you"))


# What is left behind.


def test_ctrl_c_leaves_no_queue_and_only_results_that_expire(
    distributed_shell: CommandLine, broker_url: str, store_url: str, namespace: str
) -> None:
    program, url = run_hello(distributed_shell)
    assert httpx.get(f"{url}/hello/you", timeout=30).status_code == 200
    assert queue_exists(broker_url, f"{namespace}.backend.hello.1")
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    with redis.Redis.from_url(store_url) as store:
        left = {key.decode(): store.ttl(key) for key in store.scan_iter(f"mqserve:{namespace}:*")}
    assert all(":future:" in key or ":inbox:" in key or key.endswith(":ended") for key in left), left
    assert all(ttl > 0 for ttl in left.values()), left
    assert not queue_exists(broker_url, f"{namespace}.backend.hello.1")
    assert not queue_exists(broker_url, f"{namespace}.dead.hello")


SLOW = """
import time
import mqserve as serve

@serve.endpoint("/slow")
def slow(request):
    print("it runs", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once_what_the_first_would_wait_for(either_shell: CommandLine) -> None:
    program = either_shell.start("run", either_shell.file("slow.py", SLOW), "--port", "0")
    found = re.search(r"http://\S+", program.wait_for("Ctrl-C stops"))
    assert found
    with ThreadPoolExecutor(1) as background, suppress(httpx.TransportError):
        asked = background.submit(httpx.get, f"{found[0]}/slow", timeout=30)
        program.wait_for("it runs")
        children = program.descendants()
        program.signal(signal.SIGINT)
        program.wait_for("Draining")
        program.signal(signal.SIGINT)
        assert program.wait(30) == 130
        asked.result()
    assert "Ending at once" in program.output and "Traceback" not in program.output, program.output
    wait_until(lambda: not any(is_alive(child) for child in children), deadline_s=25, told=lambda: children)


NEVER_READY = """
import time
import mqserve as serve

@serve.endpoint("/never", graceful_shutdown_timeout_s=0)
class Never:
    def __init__(self):
        print("it constructs", flush=True)
        time.sleep(60)
"""


def test_the_first_ctrl_c_interrupts_a_deployment_and_the_instance_ends_in_order(
    either_shell: CommandLine, broker_url: str, namespace: str
) -> None:
    program = either_shell.start("run", either_shell.file("never.py", NEVER_READY), "--port", "0")
    program.wait_for("it constructs")
    children = program.descendants()
    program.signal(signal.SIGINT)
    assert program.wait() == 130
    assert "Traceback" not in program.output, program.output
    assert not any(is_alive(child) for child in children)
    assert not queue_exists(broker_url, f"{namespace}.backend.Never.1")


def test_the_first_sigterm_interrupts_a_start(distributed_shell: CommandLine, broker_wire: Wire) -> None:
    broker_wire.blackhole()
    shell = distributed_shell.with_variables(MQSERVE_BROKER_URL=broker_wire.url)
    program = shell.start("run", shell.file("hello.py", HELLO), "--port", "0")
    wait_until(lambda: broker_wire.connections)
    program.signal(signal.SIGTERM)
    assert program.wait() == 130
    assert "Traceback" not in program.output, program.output


def queue_exists(broker_url: str, name: str) -> bool:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    try:
        connection.channel().queue_declare(name, passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    finally:
        connection.close()
    return True


def test_kill_9_leaves_no_child_and_the_same_command_starts_again(distributed_shell: CommandLine) -> None:
    program, url = run_hello(distributed_shell)
    children = program.descendants()
    assert len(children) >= 4  # controller, node, proxy, replica
    program.signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(child) for child in children), deadline_s=25, told=lambda: children)  # their last resort is 9 s
    assert not answers(f"{url}/-/healthz")
    _, url = run_hello(distributed_shell)
    assert httpx.get(f"{url}/hello/you", timeout=30).status_code == 200


def test_a_lapsed_instance_is_taken_over(distributed_shell: CommandLine) -> None:
    """All processes killed at once, as by a power cut: nobody releases the lease."""
    program, _ = run_hello(distributed_shell)
    processes = program.descendants()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none of them sees another one end
        for process in [psutil.Process(program.pid), *processes]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    _, url = run_hello(distributed_shell)
    assert httpx.get(f"{url}/hello/you", timeout=30).status_code == 200


# Bad input: one sentence, status 1, no traceback.


def assert_refused(shell: CommandLine, *arguments: str, says: str) -> str:
    ended = shell.run(*arguments)
    assert ended.returncode == 1, ended
    assert re.search(says, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr or "does not import" in ended.stderr, ended.stderr
    return ended.stderr


def test_a_second_start_of_a_live_namespace_is_refused(distributed_shell: CommandLine) -> None:
    run_hello(distributed_shell)
    assert_refused(distributed_shell, "run", "hello.py", "--port", "0", says="an instance runs under this namespace already")


def test_a_second_start_on_the_same_port_hears_of_the_instance_and_not_of_the_port(distributed_shell: CommandLine) -> None:
    _, url = run_hello(distributed_shell)
    port = url.rpartition(":")[2]
    assert_refused(distributed_shell, "run", "hello.py", "--port", port, says="an instance runs under this namespace already")


def test_a_second_node_of_one_name_is_refused(distributed_shell: CommandLine) -> None:
    distributed_shell.start("controller")
    wait_until(lambda: distributed_shell.run("status").returncode == 0)
    distributed_shell.start("node", "--node-id", "twin", "--no-proxy")
    wait_until(lambda: " twin " in distributed_shell.run("status").stdout)
    assert_refused(distributed_shell, "node", "--node-id", "twin", says="a node 'twin' runs already .*choose another --node-id")


def test_a_virtual_host_that_is_not_there_gets_a_sentence(distributed_shell: CommandLine, broker_url: str) -> None:
    shell = distributed_shell.with_variables(MQSERVE_BROKER_URL=f"{broker_url}nowhere")
    shell.file("hello.py", HELLO)
    assert_refused(shell, "run", "hello.py", "--port", "0", says="RabbitMQ does not open virtual host 'nowhere' for user .*add_vhost")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("serve.create_endpoint('e', backend='nobody', route='/e')", "there is no backend 'nobody'.*create_backend first"),
        (
            "f = lambda request: 1\nserve.create_backend('b', f)\n"
            "serve.create_endpoint('e', backend='b', route='/e')\nserve.create_endpoint('f', backend='b', route='/e')",
            "route '/e' belongs to endpoint 'e': choose another",
        ),
        ("@serve.endpoint('hello')\ndef hello(request): ...", "route 'hello' of endpoint 'hello' must be .* starts with '/'"),
        ("@serve.endpoint('/{a:integer}')\ndef hello(request): ...", "route '/{a:integer}' does not parse.*int"),
        ("@serve.endpoint('/a', num_replica=2)\ndef hello(request): ...", "there is no setting 'num_replica'; there are num_replicas"),
        ("@serve.endpoint('/a')\ndef hello(request, name): ...", "'hello' cannot be called: a handler is called with the request alone"),
        ("import not_installed", "app.py does not import .*No module named 'not_installed'"),
        ("def hello(:", "app.py does not import: invalid syntax in line 2"),
        ("pass", "app.py declares no endpoint, so there is nothing to serve: decorate"),
    ],
)
def test_a_file_that_cannot_be_served_gets_a_sentence(shell: CommandLine, text: str, says: str) -> None:
    shell.file("app.py", f"import mqserve as serve\n{text}\n")
    assert_refused(shell, "run", "app.py", "--port", "0", says=says)


def test_a_file_that_is_not_there_gets_a_sentence(shell: CommandLine) -> None:
    assert_refused(shell, "run", "missing.py", says="there is no file missing.py: give the path")


def test_a_port_in_use_gets_a_sentence(either_shell: CommandLine) -> None:
    port = free_port()
    either_shell.start("run", either_shell.file("hello.py", HELLO), "--port", str(port)).wait_for("Ctrl-C stops")
    other = either_shell.with_variables(MQSERVE_NAMESPACE="another")
    assert_refused(other, "run", "hello.py", "--port", str(port), says=f"cannot listen on 127.0.0.1:{port} .*choose another --port")


@pytest.mark.parametrize("down", ["MQSERVE_BROKER_URL", "MQSERVE_STORE_URL"])
def test_a_server_that_is_down_is_named_in_time_without_its_password(distributed_shell: CommandLine, down: str) -> None:
    scheme = "amqp" if "BROKER" in down else "redis"
    port = free_port()
    shell = distributed_shell.with_variables(**{down: f"{scheme}://me:topsecret@127.0.0.1:{port}/0"})
    shell.file("hello.py", HELLO)
    started = time.monotonic()
    told = assert_refused(
        shell, "run", "hello.py", "--port", "0", says=f"no connection to .*{scheme}://me:\\*\\*\\*@127.0.0.1:{port}.*{down}"
    )
    assert time.monotonic() - started < 20, "10 s, and what Python takes to start"
    assert "topsecret" not in told


def test_a_node_that_says_it_has_what_no_machine_has_gets_a_sentence(shell: CommandLine) -> None:
    assert_refused(shell, "node", "--num-cpus", "nan", says="--num-cpus is nan: no machine has that")


@pytest.mark.parametrize("count", ["0", "65", "a"])
def test_a_number_of_http_workers_that_makes_no_sense_gets_one_sentence(shell: CommandLine, count: str) -> None:
    ended = shell.run("run", shell.file("hello.py", HELLO), "--http-workers", count)
    assert ended.returncode == 2
    assert "Invalid value for '--http-workers'" in ended.stderr.splitlines()[-1]


def test_several_http_workers_are_refused_to_the_embedded_form(shell: CommandLine) -> None:
    ended = shell.with_variables(MQSERVE_HTTP_WORKERS="2").run("run", shell.file("hello.py", HELLO))
    assert ended.returncode == 1
    assert "the embedded form is a single one" in ended.stderr.splitlines()[-1]


def test_a_detached_start_needs_a_broker(shell: CommandLine) -> None:
    assert_refused(shell, "start", says="set MQSERVE_BROKER_URL")
    ended = shell.python("import mqserve; mqserve.start(detached=True)")
    assert "a detached instance needs a broker and a store that outlive this process" in ended.stderr


@pytest.mark.parametrize("command", ["node", "proxy", "controller", "status", "shutdown", "dead list b"])
def test_commands_that_join_others_need_a_broker(shell: CommandLine, command: str) -> None:
    assert_refused(shell, *command.split(), says="joins other processes over RabbitMQ and Redis: set MQSERVE_BROKER_URL")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MQSERVE_BROKER_URL": "amqp://localhost"}, "MQSERVE_BROKER_URL is set and MQSERVE_STORE_URL is not"),
        ({"MQSERVE_STORE_URL": "redis://localhost"}, "MQSERVE_STORE_URL is set and MQSERVE_BROKER_URL is not"),
        ({"MQSERVE_SECRET_KEY": "short"}, "MQSERVE_SECRET_KEY has 5 bytes, and 32 is the least"),
        ({"MQSERVE_BROKER_URL": "http://a", "MQSERVE_STORE_URL": "redis://a"}, "MQSERVE_BROKER_URL has http, and needs amqp://"),
        ({"MQSERVE_NAMESPACE": "Not Allowed"}, "'Not Allowed' is no namespace"),
    ],
)
def test_bad_settings_get_a_sentence(shell: CommandLine, variables: dict[str, str], says: str) -> None:
    shell.file("hello.py", HELLO)
    assert_refused(shell.with_variables(**variables), "run", "hello.py", "--port", "0", says=says)


ENDS_BESIDE_A_STUCK_THREAD = """
import threading, time
from mqserve.broker.errors import BackendFailed
from mqserve.commands.cli import main
from mqserve.replicas import main as replicas

async def end(settings, options):
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ERROR

replicas.main = end
main()
"""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("BackendFailed('no luck')", r"\AError: no luck\n\Z"),
        ("ExceptionGroup('tasks', [ExceptionGroup('tasks', [BackendFailed('no luck')])])", r"\AError: no luck\n\Z"),
        ("ExceptionGroup('tasks', [BackendFailed('no luck'), RuntimeError('a bug')])", r"Traceback.*no luck.*a bug"),
        ("RuntimeError('a bug')", r"Traceback.*RuntimeError: a bug\n\Z"),
    ],
    ids=["ours", "ours-in-groups", "more-than-ours", "a-bug"],
)
def test_a_replica_that_fails_ends_whatever_its_threads_do_and_says_why(shell: CommandLine, error: str, says: str) -> None:
    joins = shell.with_variables(MQSERVE_BROKER_URL="amqp://nowhere", MQSERVE_STORE_URL="redis://nowhere")
    ended = joins.python(ENDS_BESIDE_A_STUCK_THREAD.replace("ERROR", error), "replica", "b", deadline_s=30)
    assert ended.returncode == 1 and re.search(says, ended.stderr, re.DOTALL), ended.stderr


def test_code_by_value_needs_a_key(distributed_shell: CommandLine) -> None:
    distributed_shell.env.pop("MQSERVE_SECRET_KEY")
    distributed_shell.file("hello.py", HELLO)
    assert_refused(distributed_shell, "run", "hello.py", "--port", "0", says="set MQSERVE_SECRET_KEY .*or name importable code by a string")


@pytest.mark.parametrize("key", ["", "one that is not that of the instance"])
def test_whoever_has_another_key_than_the_instance_is_told_at_once(distributed_shell: CommandLine, key: str) -> None:
    run_hello(distributed_shell)
    stranger = distributed_shell.with_variables(MQSERVE_SECRET_KEY=key)
    says = f"this process has {'another' if key else 'no'} key: set MQSERVE_SECRET_KEY to that of the instance"
    for later in [], ["--later"]:
        assert_refused(stranger, "call", "hello", *later, says=says)


def test_a_secret_may_lie_in_a_file(distributed_shell: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET_KEY + "\n")
    del distributed_shell.env["MQSERVE_SECRET_KEY"]
    _, url = run_hello(distributed_shell.with_variables(MQSERVE_SECRET_KEY_FILE=str(tmp_path / "key")))
    assert httpx.get(f"{url}/hello/you", timeout=30).status_code == 200


# A detached instance.


def test_a_detached_instance_is_started_shown_used_and_shut_down(distributed_shell: CommandLine, namespace: str, broker_url: str) -> None:
    shell, port = distributed_shell, free_port()
    begun = shell.start("start", "--port", str(port))
    assert begun.wait() == 0 and f"http://127.0.0.1:{port}" in begun.output, begun.output
    try:
        deployed = shell.python(
            "import mqserve as serve\n"
            "serve.connect()\n"
            "serve.create_backend('greeter', lambda request: 'hello', config={'num_replicas': 2})\n"
            "serve.create_endpoint('greet', backend='greeter', route='/greet')\n"
        )
        assert deployed.returncode == 0, deployed.stderr
        assert httpx.get(f"http://127.0.0.1:{port}/greet", timeout=30).text == "hello"

        status = shell.run("status")
        assert status.returncode == 0
        assert f"Instance {namespace}, detached" in status.stdout and " leads" in status.stdout
        assert "***" in status.stdout or ":guest@" not in status.stdout
        rows = [line.split() for line in status.stdout.splitlines()]
        members = [process for process in psutil.process_iter() if namespace in environment_of(process)]
        assert len(members) == 6  # supervisor, controller, node, proxy, two replicas
        assert sorted(row[0] for row in rows if row and row[0] in ("node", "proxy", "replica")) == ["node", "proxy", "replica", "replica"]
        assert any(row[:1] == ["greeter"] and row[-4:] == ["2", "2", "0", "ready"] for row in rows), status.stdout
        assert any(row[:3] == ["greet", "/greet", "GET"] for row in rows), status.stdout
    finally:
        ended = shell.run("shutdown")
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "Done.")
    assert not answers(f"http://127.0.0.1:{port}/-/healthz")
    assert_refused(shell, "status", says="no instance runs under this namespace: start one")
    wait_until(lambda: not any(is_alive(process) for process in members), told=lambda: members)


def environment_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("MQSERVE_NAMESPACE", "")
    except psutil.Error:
        return ""


def test_a_detached_instance_whose_machine_died_is_started_again_with_what_was_deployed(
    distributed_shell: CommandLine, namespace: str
) -> None:
    shell, ports = distributed_shell, (free_port(), free_port())
    assert shell.start("start", "--port", str(ports[0])).wait() == 0
    try:
        deployed = shell.python(
            "import mqserve as serve\n"
            "serve.connect()\n"
            "serve.create_backend('b', lambda request: 'hello')\n"
            "serve.create_endpoint('e', backend='b', route='/e')\n"
        )
        assert deployed.returncode == 0, deployed.stderr
        members = [process for process in psutil.process_iter() if namespace in environment_of(process)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none of them starts another one again
            for process in members:
                process.send_signal(number)
        begun = shell.start("start", "--port", str(ports[1]))
        assert begun.wait(60) == 0, begun.output
        wait_until(lambda: answers(f"http://127.0.0.1:{ports[1]}/e"))
    finally:
        assert shell.run("shutdown", deadline_s=90).returncode == 0


def test_a_detached_start_on_any_free_port_says_which(distributed_shell: CommandLine) -> None:
    begun = distributed_shell.start("start", "--port", "0")
    assert begun.wait() == 0
    try:
        found = re.search(r"http://[\w.]+:\d+", begun.output)
        assert found and answers(f"{found[0]}/-/healthz"), begun.output
    finally:
        assert distributed_shell.run("shutdown").returncode == 0


def test_a_shutdown_that_fails_says_so(distributed_shell: CommandLine, store_url: str, namespace: str) -> None:
    assert distributed_shell.start("start", "--no-node").wait() == 0
    key = StoreKeys(namespace).desired
    with redis.Redis.from_url(store_url) as store:
        good: Any = store.get(key)
        store.set(key, "no document")
        assert_refused(distributed_shell, "shutdown", says="the desired state in the store does not parse")
        store.set(key, good)
    assert distributed_shell.run("shutdown").stdout.splitlines()[-1] == "Done."


def test_a_starter_without_a_node_leaves_the_running_to_others(distributed_shell: CommandLine) -> None:
    assert distributed_shell.start("start", "--no-node").wait() == 0
    try:
        listed = distributed_shell.run("status").stdout
        assert not re.search("^(node|proxy|replica) ", listed, re.MULTILINE), listed
    finally:
        assert distributed_shell.run("shutdown").returncode == 0
