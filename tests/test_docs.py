"""README.md and docs/, held to the code: every example runs, and every name in them exists, as every name that exists is in them.

A fenced block is `text` (shown, not run), has a name (```python test=handle) that a test below runs it by, or stands under a comment
`<!-- not run: reason -->` and in NOT_RUN.
"""

from __future__ import annotations

import argparse
import builtins
import faulthandler
import re
import shlex
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

import mqserve as serve
from mqserve.broker import queue_names
from mqserve.broker.dead_letters import Attempt
from mqserve.broker.envelope import Header, RequestHead, endpoint_key
from mqserve.broker.later import LONGEST_WAIT_S
from mqserve.broker.results import ErrorInfo, Result
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import RESULT_TTL_S, StoreKeys
from mqserve.broker.webhooks import WAITS_S
from mqserve.client.handle import HandleOptions
from mqserve.commands.cli import cli
from mqserve.commands.status import BackendFacts, ControllerFacts, EndpointFacts, Facts, MemberFacts, ServerFacts
from mqserve.controller.state.config import BackendConfig
from mqserve.instance.starting import LOCATIONS
from tests.instances import SECRET_KEY, CommandLine, new_namespace, started, wait_until
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
README, PROTOCOL = ROOT / "README.md", ROOT / "docs" / "protocol.md"
FROM_RAY, FROM_CELERY = ROOT / "docs" / "from-ray-serve.md", ROOT / "docs" / "from-celery.md"
MONITORING = ROOT / "docs" / "guide" / "monitoring.md"
GUIDE = sorted(page for page in (ROOT / "docs" / "guide").glob("*.md") if page.name != "README.md")
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {document: document.read_text() for document in DOCUMENTS}
EVERYTHING = "\n".join(TEXT.values())
CODE = "\n".join(
    path.read_text() for part in ("mqserve", "broker", "proxy", "replicas", "controller") for path in (ROOT / part).rglob("*.py")
)

SCRIPTS = ("handle", "face", "plain-results", "handle-streams", "job-events")  # Python that needs nothing
WALKTHROUGHS = {"hello": "", "digits": "examples/digits.py"}  # shell that serves, or asks what serves this file
OVER_AMQP = (
    "orders.py", "pika", "redis", "future", "publish", "pika-job", "redis-job", "pika-endpoint",
    "amqplib-job", "amqplib-events", "amqplib-endpoint",
)  # fmt: skip
ON_SERVERS = ("dead-letters", "delivery", "dependency-management", "resources")  # of the guide: these need RabbitMQ and Redis
IN_ONE_PROCESS = [page.stem for page in GUIDE if page.stem not in ON_SERVERS]
BESIDE = ("shop_metrics.py",)  # imported by a page's program
RUN = {
    "hello.py",
    "distributed",
    "setup",
    "amqplib",
    "webhooks-node",
    *SCRIPTS,
    *WALKTHROUGHS,
    *OVER_AMQP,
    *IN_ONE_PROCESS,
    *ON_SERVERS,
    *BESIDE,
}
NOT_RUN = {"make demo\nmake test\n"}

DOUBLE = '\n\n@serve.endpoint(None, name="double")\ndef double(request):\n    return request.data * 2\n'  # for README's `publish`


class Block(NamedTuple):
    document: Path
    language: str
    name: str
    reason: str  # for not being run
    text: str


def fenced_blocks() -> Iterator[Block]:
    for document, text in TEXT.items():
        for reason, language, name, content in re.findall(
            r"^(?:<!-- not run: (.+?) -->\n)?```(\w*)(?: test=(\S+))?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        ):
            yield Block(document, language, name, reason, content)


BLOCKS = list(fenced_blocks())
NAMED = {block.name: block.text for block in BLOCKS if block.name}
SHELL_LINES = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]


def printed_by(script: str) -> list[str]:
    """What the comments behind its prints say, in no particular order."""
    return sorted(re.findall(r"^ *(?:console\.log|print)\(.*\);?  ?(?:#|//) (.+)$", script, re.MULTILINE))


def code_of(line: str) -> str:
    return line.partition("    #")[0].strip()


def shown_after(line: str) -> str:
    """The answer in the comment behind a command, as a regular expression; … stands for anything."""
    return re.escape(line.partition("#")[2].strip()).replace("…", ".*")


# The examples.


def test_every_example_is_run_or_says_why_not() -> None:
    assert len(re.findall("^```", EVERYTHING, re.MULTILINE)) == 2 * len(BLOCKS), "a fence that is not closed, or not understood"
    assert {block.text for block in BLOCKS if block.reason} == NOT_RUN
    assert {block.name for block in BLOCKS if block.language != "text" and not block.reason} == RUN


def test_the_hello_of_the_readme_is_the_one_that_ships() -> None:
    assert NAMED["hello.py"] == (ROOT / "examples" / "hello.py").read_text()


@pytest.mark.parametrize("name", [*SCRIPTS, *IN_ONE_PROCESS])
def test_a_python_example_prints_what_its_comments_say(name: str, tmp_path: Path) -> None:
    prints_what_it_says(name, CommandLine(tmp_path, PYTHONPATH=str(ROOT)))


@pytest.mark.long
@pytest.mark.parametrize("name", ON_SERVERS)
def test_a_guide_example_on_servers_prints_what_its_comments_say(name: str, distributed_shell: CommandLine, index_folder: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test: this one may build an environment, and has a deadline of its own
    from_folder = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index_folder), "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(index_folder)}
    environments = str(distributed_shell.folder / "environments")
    prints_what_it_says(
        name, distributed_shell.with_variables(**from_folder, MQSERVE_ENVIRONMENTS=environments, PYTHONPATH=str(ROOT)), deadline_s=180
    )


def prints_what_it_says(name: str, shell: CommandLine, deadline_s: float = 60) -> None:
    for file in BESIDE:
        shell.file(file, NAMED[file])
    script = NAMED[name].replace('"mqserve.', f'"{shell.env.get("MQSERVE_NAMESPACE", "mqserve")}.')  # a queue's name
    shell.file("example.py", script)
    done = shell.python("import runpy; runpy.run_path('example.py', run_name='__main__')", deadline_s=deadline_s)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == printed_by(NAMED[name]), done.stderr


@pytest.fixture
def index_folder(tmp_path: Path) -> Path:
    """Stands in for PyPI: a humanize that knows as much as the guide asks of it."""
    info = "humanize-4.99.dist-info"
    with zipfile.ZipFile(tmp_path / "humanize-4.99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("humanize.py", "def intcomma(number):\n    return f'{number:,}'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: humanize\nVersion: 4.99\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"humanize.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return tmp_path


def test_every_page_of_the_guide_has_a_program_and_is_in_its_index() -> None:
    assert GUIDE, "there is no guide"
    python = [block for block in BLOCKS if block.document in GUIDE and block.language == "python" and block.name not in (*BESIDE, *SCRIPTS)]
    programs = {block.document: block.name for block in python}
    assert programs == {page: page.stem for page in GUIDE}
    linked = re.findall(r"^\| \[.+?\]\((.+?)\)", TEXT[ROOT / "docs" / "guide" / "README.md"], re.MULTILINE)
    assert sorted(linked) == [page.name for page in GUIDE]


@pytest.mark.parametrize("name", WALKTHROUGHS)
def test_a_walkthrough_answers_what_it_shows(name: str, shell: CommandLine) -> None:
    port = str(free_port())
    if file := WALKTHROUGHS[name]:
        shell.start("run", str(ROOT / file), "--port", port).wait_for("Serving on")
    for line in NAMED[name].splitlines():
        words = shlex.split(code_of(line).replace("8000", port).replace("examples/", f"{ROOT}/examples/"))
        if words[0] == "mqserve":
            shell.start(*words[1:]).wait_for("Serving on")
        else:
            assert re.fullmatch(shown_after(line), curl(words)), line


def curl(words: list[str]) -> str:
    """As much of curl as the pages use, since a fresh machine need not have it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-d", dest="data")
    parser.add_argument("-H", dest="header", default="accept: */*")
    assert words[0] == "curl", words
    wanted = parser.parse_args(words[1:])
    name, _, value = wanted.header.partition(": ")
    return httpx.request("POST" if wanted.data else "GET", wanted.url, content=wanted.data, headers={name: value}, timeout=30).text


def test_make_demo_serves_what_the_readme_asks() -> None:
    assert f"mqserve run {WALKTHROUGHS['digits']}" in (ROOT / "Makefile").read_text()


# The examples over AMQP: one instance for all of them, under a namespace of its own.


@pytest.fixture(scope="module")
def orders(broker_url: str, store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The protocol's `orders.py`, served."""
    shell = CommandLine.joining(tmp_path_factory.mktemp("orders"), broker_url, store_url, new_namespace("docs"))
    try:
        file = shell.file("orders.py", NAMED["orders.py"] + DOUBLE)
        shell.start("run", file, "--port", str(free_port())).wait_for("Serving on")
        yield shell
    finally:
        shell.close()


def runs_as_shown(name: str, shell: CommandLine) -> None:
    """The example under the shell's namespace rather than the default one."""
    namespace = shell.env["MQSERVE_NAMESPACE"]
    script = NAMED[name].replace('"mqserve.', f'"{namespace}.').replace("mqserve:mqserve:", f"mqserve:{namespace}:")
    done = shell.python(script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == printed_by(script)


def test_the_pika_example_gets_its_answer(orders: CommandLine) -> None:
    runs_as_shown("pika", orders)


@pytest.mark.parametrize("name", ["redis", "future"])
def test_the_result_can_be_read_later_by_the_publishers_key(name: str, orders: CommandLine) -> None:
    runs_as_shown("pika", orders)  # once more does no harm: it has a message_id
    runs_as_shown(name, orders)


def test_the_readmes_published_message_is_served(orders: CommandLine) -> None:
    runs_as_shown("publish", orders)
    read = orders.python("import mqserve as s; s.connect(); print(s.future('job-17', backend='double').result(timeout=30))")
    assert read.stdout == "42\n", read.stderr


def test_the_pika_example_of_a_job_leads_to_its_result(orders: CommandLine) -> None:
    runs_as_shown("pika-job", orders)
    runs_as_shown("redis-job", orders)


def test_the_pika_example_of_a_message_to_an_endpoint_leads_to_its_result(orders: CommandLine) -> None:
    runs_as_shown("pika-endpoint", orders)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here to parse it")
@pytest.mark.parametrize("name", ["amqplib", "amqplib-job", "amqplib-events", "amqplib-endpoint"])
def test_the_node_example_parses(name: str, tmp_path: Path) -> None:
    (tmp_path / "example.js").write_text(NAMED[name])
    parsed = subprocess.run(["node", "--check", "example.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert parsed.returncode == 0, parsed.stderr


@pytest.mark.long
def test_the_node_examples_are_served(orders: CommandLine, amqplib: str) -> None:
    for name in ("amqplib", "amqplib-job", "amqplib-events", "amqplib-endpoint"):
        script = NAMED[name].replace('"mqserve.', f'"{orders.env["MQSERVE_NAMESPACE"]}.')
        done = subprocess.run(["node", "-e", script], env={**orders.env, "NODE_PATH": amqplib}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == printed_by(script), done.stderr
    read = orders.python("import mqserve as s; s.connect(); print(s.job('order-20', backend='orders').result(timeout=30))")
    assert read.stdout == "{'total': 42}\n", read.stderr
    read = orders.python("import mqserve as s; s.connect(); print(s.job('order-24', endpoint='orders').result(timeout=30))")
    assert read.stdout == "{'total': 42}\n", read.stderr


# The command line.


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line.startswith("mqserve ")])
def test_a_command_that_is_shown_parses(line: str) -> None:
    _, name, *arguments = shlex.split(code_of(line))
    cli.commands[name].make_context(name, arguments)  # raises click's own error, with its sentence


def test_other_commands_that_are_shown_are_known() -> None:
    variables = [line.partition("=")[0].removeprefix("export ") for line in SHELL_LINES if line.startswith("export ")]
    assert set(variables) <= known_variables()
    targets = [line.removeprefix("make ") for line in SHELL_LINES if line.startswith("make ")]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    assert {line.split()[0] for line in SHELL_LINES} == {"make", "curl", "mqserve", "export"}


def test_the_table_of_commands_is_complete() -> None:
    shown = [name for name, command in cli.commands.items() if not command.hidden]
    assert [row[0].split()[1].strip("`") for row in table(README, "command")] == sorted(shown, key=readme_order)


def readme_order(command: str) -> int:
    return TEXT[README].index(f"| `mqserve {command}")


def test_every_command_in_the_text_exists() -> None:
    mentioned = set(re.findall(r"`mqserve (?:-v )?([a-z]+)", EVERYTHING))
    assert mentioned <= set(cli.commands)


def test_every_flag_is_in_the_text_and_the_other_way_round() -> None:
    options = [
        option for command in commands_of(cli) for option in command.params if isinstance(option, click.Option) and not option.hidden
    ]
    mentioned = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join([*inline_code(), *map(code_of, SHELL_LINES)])))
    elsewhere = {
        "--build",
        "--wait",
        "--check",
        "--help",
        "-d",
        "-hex",
        "-m",
        "-k",
    }  # of docker, node, curl, openssl, python, pytest; click's own
    elsewhere |= {"-a", "--http-location", "--head", "--address", "--metrics-export-port"}  # of Ray
    elsewhere |= {"--concurrency", "--autoscale"}  # of Celery
    missing = [option.opts for option in options if not mentioned & set(option.opts)]
    assert not missing
    assert mentioned - elsewhere <= {name for option in options for name in option.opts}


def commands_of(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from commands_of(inner)


def inline_code() -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", EVERYTHING, flags=re.MULTILINE | re.DOTALL))


# Settings.


def known_variables() -> set[str]:
    """What the code reads, tests included; `read_secret` is told names without their prefix."""
    spelled = set(re.findall(r"MQSERVE_[A-Z_]*[A-Z]", CODE + (ROOT / "tests" / "conftest.py").read_text()))
    return {name for name in spelled if not name.endswith(("_TEST", "_FILE"))} | {"MQSERVE_SECRET_KEY_PREVIOUS"}


def test_every_variable_is_in_the_text_and_the_other_way_round() -> None:
    mentioned = set(re.findall(r"MQSERVE_[A-Z_]*[A-Z]", EVERYTHING))
    files = {name for name in mentioned if name.endswith("_FILE")}
    assert mentioned - files == known_variables()


@pytest.mark.parametrize(
    "name",
    ["MQSERVE_BROKER_URL", "MQSERVE_STORE_URL", "MQSERVE_SECRET_KEY", "MQSERVE_SECRET_KEY_PREVIOUS", "MQSERVE_ADMIN_TOKEN"],
)
def test_urls_and_keys_can_be_named_by_file(name: str, tmp_path: Path) -> None:
    values = {"MQSERVE_BROKER_URL": "amqp://b", "MQSERVE_STORE_URL": "redis://s", "MQSERVE_SECRET_KEY": SECRET_KEY}
    values |= {"MQSERVE_SECRET_KEY_PREVIOUS": f"the one before {SECRET_KEY}", "MQSERVE_ADMIN_TOKEN": "a-token-of-the-tests"}
    (tmp_path / "secret").write_text(values.pop(name) + "\n")
    by_file = Settings.read({**values, f"{name}_FILE": str(tmp_path / "secret")})
    assert by_file.to_env()[name] == (tmp_path / "secret").read_text().strip()


def test_the_facts_of_a_status_are_complete() -> None:
    documented = {name for row in table(MONITORING, "field") for name in re.findall(r"`(\w+)`", row[0])}
    assert documented == set(Facts.__struct_fields__)
    text = TEXT[MONITORING][TEXT[MONITORING].index("## Status for scripts") :]
    for kind in (ControllerFacts, ServerFacts, MemberFacts, BackendFacts, EndpointFacts):
        assert set(kind.__struct_fields__) <= set(re.findall(r"`(\w+)`", text)), kind


def test_the_table_of_backend_settings_is_complete_with_its_defaults() -> None:
    documented = {row[0].strip("`"): row[1].strip("`") for row in table(README, "`BackendConfig`")}
    assert documented == {name: str(field.default) for name, field in BackendConfig.model_fields.items()}


# Ray Serve's names, and metrics.

SEED_NAMES = """start connect shutdown create_backend update_backend_config get_backend_config list_backends delete_backend create_endpoint
    list_endpoints delete_endpoint set_traffic shadow_traffic get_handle accept_batch batch get_replica_context get_current_backend_tag
    get_current_replica_tag BackendConfig HTTPOptions CondaEnv ImportedBackend Client ServeRequest RayServeHandle RayServeSyncHandle
    ReplicaContext ray_actor_options http_host http_port http_middlewares http_options detached missing_ok sync method_name shard_key
    http_method http_headers num_replicas max_batch_size batch_wait_timeout max_concurrent_queries user_config
    experimental_graceful_shutdown_wait_loop_s experimental_graceful_shutdown_timeout_s internal_metadata num_cpus num_gpus memory
    object_store_memory resources lifetime max_restarts placement_group X-SERVE-CALL-METHOD X-SERVE-SHARD-KEY /-/routes HeadOnly EveryNode
    NoServer SERVE_LOG_DEBUG RAY_PDB RayServeException RayTaskError RayActorError serve_num_http_requests serve_num_router_requests
    serve_backend_queued_queries serve_handle_request_counter serve_backend_request_counter serve_backend_error_counter
    serve_backend_replica_starts serve_backend_queuing_latency_ms serve_backend_processing_latency_ms serve_replica_queued_queries
    serve_replica_processing_queries num_error_endpoint_requests num_error_backend_requests"""


def test_every_name_of_ray_serve_is_mapped() -> None:
    assert not [name for name in SEED_NAMES.split() if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", TEXT[FROM_RAY])]


def test_what_ray_serves_names_are_mapped_to_exists() -> None:
    """The middle column of each table: our own names only."""
    middle = [re.split(r" *\| *", line)[2] for line in TEXT[FROM_RAY].splitlines() if line.startswith("| ")]
    known = {f"serve.{name}" for name in serve.__all__} | {f"mqserve {command}" for command in cli.commands}
    known |= {*BackendConfig.model_fields, *LOCATIONS, *known_variables(), *documented_metrics(), *vars(builtins)}
    known |= {"X-SERVE-CALL-METHOD", "X-SERVE-SHARD-KEY", "/-/routes", "/api/{user_id:int}"}
    assert not set(re.findall(r"`([^`]+)`", " ".join(middle))) - known


def test_what_celerys_names_are_mapped_to_exists() -> None:
    """The middle column: our own names, without their arguments."""
    middle = [re.split(r" *\| *", line)[2] for line in TEXT[FROM_CELERY].splitlines() if line.startswith("| ")]
    known = {f"serve.{name}" for name in serve.__all__} | {f"handle.{name}" for name in dir(serve.Handle)}
    known |= {f"mqserve {command}" for command in cli.commands} | {f"mqserve jobs {name}" for name in commands_in("jobs")}
    known |= {*BackendConfig.model_fields, *HandleOptions.__dataclass_fields__, *dir(serve.Job), *dir(serve.Handle)}
    known |= {"request.id", "request.attempt", "await job", "@serve.endpoint"}
    assert not {re.sub(r"\(.*", "", name) for name in re.findall(r"`([^`]+)`", " ".join(middle))} - known


def commands_in(name: str) -> list[str]:
    group = cli.commands[name]
    assert isinstance(group, click.Group)
    return list(group.commands)


def test_every_public_name_is_in_the_docs_and_the_other_way_round() -> None:
    mentioned = set(re.findall(r"(?<![\w./-])serve\.(\w+)", EVERYTHING.replace("serve.deployment", ""))) - {"HTTPOptions"}
    assert mentioned <= {*serve.__all__, "__version__"}
    assert not [name for name in serve.__all__ if not re.search(rf"\b{name}\b", EVERYTHING)]


def documented_metrics() -> dict[str, set[str]]:
    return {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table(MONITORING, "metric")}


def test_the_table_of_metrics_is_what_the_pages_show() -> None:
    """In the embedded form one page has all of them."""

    def once(request: Any) -> Iterator[str]:
        yield "once"

    with started() as client:
        client.create_backend("measured", once)
        client.create_endpoint("measured", backend="measured", route="/measured")
        assert httpx.get(f"{client.http_url()}/measured").text == "once"
        shown = wait_until(lambda: len(found := metrics_at(f"{client.http_url()}/-/metrics")) >= len(documented_metrics()) and found)
    assert shown == documented_metrics()


def metrics_at(url: str) -> dict[str, set[str]]:
    """Ours, with their labels; a histogram by its own name."""
    shown: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(url).text):
        for sample in family.samples:
            if family.name.startswith("mqserve_") and not sample.name.endswith(("_bucket", "_sum", "_created")):
                shown[sample.name.removesuffix("_count")] = set(sample.labels)
    return shown


# The protocol.


@pytest.mark.parametrize(("heading", "kind"), [("## The result in Redis", Result), ("## The `mq` header", Header)])
def test_a_map_on_the_wire_is_described_field_by_field(heading: str, kind: type[Any]) -> None:
    section = TEXT[PROTOCOL].partition(f"{heading}\n")[2]
    documented = {row[0].strip("`"): row[2].strip("`") for row in rows(section.splitlines(), "field")}
    assert documented == {field.name: as_written(field.default) for field in msgspec.structs.fields(kind)}


def as_written(default: object) -> str:
    """A default in the protocol's words, which know no Python."""
    if default == b"":
        return "empty"
    return {"": '""', "()": "[]", "None": "nil", "False": "false"}.get(str(default), "{}" if default == RequestHead() else str(default))


@pytest.mark.parametrize("kind", [RequestHead, ErrorInfo, Attempt])
def test_every_field_of_a_nested_map_is_described(kind: type[Any]) -> None:
    assert not [field.name for field in msgspec.structs.fields(kind) if f"`{field.name}`" not in TEXT[PROTOCOL]]


def test_names_and_numbers_of_the_protocol_are_the_codes() -> None:
    ns, backend = "<ns>", "<backend>"
    names = [
        StoreKeys(ns).future(f"{backend}/<message_id>"),
        f"`{queue_names.requests_exchange(ns)}`",
        f"`{queue_names.backend_queue(ns, backend, 0)}`".replace("0", "<n>"),
        f"`{queue_names.jobs_exchange(ns)}`",
        f"`{queue_names.jobs_queue(ns, backend, 0)}`".replace("0", "<n>"),
        f"`{queue_names.later_exchange(ns)}`",
        f"`{queue_names.later_queue(ns, 0)}`".replace("0", "<s>"),
        f"`{queue_names.due_queue(ns)}`",
        f"`{queue_names.endpoints_exchange(ns)}`",
        f"`{queue_names.dead_queue(ns, queue_names.ENDPOINTS)}`",
        f"`{endpoint_key('<endpoint>', '<message_id>')}`",
        f"{LONGEST_WAIT_S:,} seconds",
        f"`{queue_names.webhooks_queue(ns)}`",
        f"`{queue_names.webhooks_wait_queue(ns, 0)}`".replace("0", "<s>"),
        f"`{queue_names.dead_webhooks_queue(ns)}`",
        f"{WAITS_S[-1]:,} seconds",
        f"`{queue_names.dead_exchange(ns)}`",
        f"`{queue_names.dead_queue(ns, backend)}`",
        f"{queue_names.DEAD_LETTER_LIMIT:,} messages",
        f"for {RESULT_TTL_S} s",
    ]
    assert not [name for name in names if name not in TEXT[PROTOCOL]]
    assert queue_names.DEAD_LETTER_TTL_MS == 7 * 24 * 3600 * 1000, "the protocol says seven days"


def test_every_header_of_ours_is_described() -> None:
    headers = set(
        re.findall(
            r"\bmq-[a-z-]+[a-z]", "".join((ROOT / "broker" / f"{name}.py").read_text() for name in ("dead_letters", "envelope", "later"))
        )
    )
    assert headers == set(re.findall(r"`(mq-[a-z-]+)`", TEXT[PROTOCOL]))


# The pages themselves.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[document]) if "://" not in target]
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_the_readme_stays_short() -> None:
    assert len(TEXT[README].splitlines()) < 270


def table(document: Path, first_heading: str) -> list[list[str]]:
    return rows(TEXT[document].splitlines(), first_heading)


def rows(lines: Iterable[str], first_heading: str) -> list[list[str]]:
    """The cells of the first table whose first column is headed so."""
    found: list[list[str]] = []
    inside = False
    for line in lines:
        if inside and not line.startswith("|"):
            break
        inside = inside or line.startswith(f"| {first_heading} |")
        if inside:
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert found, f"no table headed {first_heading!r}"
    return [[cell.strip() for cell in row] for row in found[2:]]


def test_no_setting_is_listed_twice() -> None:
    assert max(Counter(row[0] for row in table(README, "variable")).values()) == 1
