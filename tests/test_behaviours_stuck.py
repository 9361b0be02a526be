"""Nobody is left waiting for a handler that does not end: whoever waits is told in time, or answered by another replica. In both forms."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pika
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import NOISE_S, SECRET_KEY, CommandLine, Deploy, Program, distributed_only, new_name, wait_until

GRACEFUL_S = 1.0
TOLD_WITHIN_S = GRACEFUL_S + 2 + NOISE_S


def stuck_plainly(gate: Gate) -> Any:
    def wait(request: Any) -> Any:
        gate.pass_through()
        return request.data

    return wait


def stuck_async(gate: Gate) -> Any:
    async def wait(request: Any) -> Any:
        while True:  # it does not let itself be cancelled either
            try:
                await gate.pass_through_async()
                return request.data
            except BaseException:
                pass

    return wait


HANDLERS = [(stuck_plainly, {}), (stuck_plainly, {"sync_threads": 2}), (stuck_async, {"max_concurrent_queries": 2})]


@pytest.mark.parametrize(("make", "config"), HANDLERS, ids=["plain", "threads", "async"])
def test_the_callers_of_a_backend_that_is_deleted_are_told_503_in_time(
    client: serve.Client, tmp_path: Path, make: Any, config: dict[str, Any]
) -> None:
    gate, name = Gate(tmp_path), new_name("b")
    client.create_backend(name, make(gate), config={"graceful_shutdown_timeout_s": GRACEFUL_S, **config})
    client.create_endpoint(name, backend=name, route=f"/{name}", methods=["POST"])
    url = f"{client.http_url()}/{name}"
    with ThreadPoolExecutor() as threads:
        over_http = threads.submit(httpx.post, url, timeout=30)
        wait_until(lambda: gate.came == 1)
        refs = [client.get_handle(name).remote(number) for number in range(4)]
        client.delete_endpoint(name)
        began = time.monotonic()
        deleting = threads.submit(client.delete_backend, name)
        for ref in refs:
            with pytest.raises(serve.BackendGone, match=f"backend '{name}' was deleted"):
                ref.result(TOLD_WITHIN_S)
        assert over_http.result(TOLD_WITHIN_S).status_code == 503
        assert GRACEFUL_S * 0.9 < time.monotonic() - began < TOLD_WITHIN_S
        deleting.result(TOLD_WITHIN_S)
        assert time.monotonic() - began < TOLD_WITHIN_S
        assert serve.future(refs[0].id).done()  # recorded, for whoever else asks
        gate.open()
    assert name not in client.list_backends()


def test_what_a_stuck_call_comes_to_after_all_is_nobodys(client: serve.Client, tmp_path: Path) -> None:
    """The first result that is recorded stands, and its message is acked once."""
    gate, name = Gate(tmp_path), new_name("b")
    client.create_backend(name, stuck_plainly(gate), config={"graceful_shutdown_timeout_s": 0.2})
    client.create_endpoint(name, backend=name)
    ref = client.get_handle(name).remote(1)
    wait_until(lambda: gate.came == 1)
    client.delete_endpoint(name)
    client.delete_backend(name)
    gate.open()
    client.create_backend(name, lambda request: "new")
    client.create_endpoint(name, backend=name)
    assert client.get_handle(name).remote().result(30) == "new"
    with pytest.raises(serve.BackendGone):
        ref.result(1)
    client.delete_endpoint(name)
    client.delete_backend(name)


def test_the_caller_of_a_stuck_call_waits_on_over_an_update_and_is_answered_by_the_new_code(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    name = deploy(stuck_plainly(gate), graceful_shutdown_timeout_s=GRACEFUL_S)
    ref = deploy.client.get_handle(name).remote(1)
    wait_until(lambda: gate.came == 1)
    deploy.client.update_backend(name, lambda request: "new code")
    assert ref.result(30) == "new code"
    gate.open()


def test_the_caller_of_a_stuck_call_waits_on_over_a_scale_down_and_is_answered_by_another_replica(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    folder = str(tmp_path / "stuck")

    def once(request: Any) -> Any:  # the first two are stuck, whatever replica has them
        import os

        for number in range(2):
            try:
                os.makedirs(f"{folder}{number}")
            except FileExistsError:
                continue
            gate.pass_through()
        return request.data

    name = deploy(once, num_replicas=2, graceful_shutdown_timeout_s=GRACEFUL_S, sync_threads=2)
    refs = [deploy.client.get_handle(name).remote(number) for number in range(2)]
    wait_until(lambda: gate.came == 2)
    deploy.client.update_backend_config(name, {"num_replicas": 1})
    gate_is_needed = [ref for ref in refs if not done_within(ref, 10 + NOISE_S)]
    gate.open()
    assert serve.get(refs, timeout=30) == [0, 1] and len(gate_is_needed) <= 1


def done_within(ref: serve.Future, limit_s: float) -> bool:
    try:
        ref.result(limit_s)
    except TimeoutError:
        return False
    return True


ENDS = """
import sys, time
import mqserve as serve

def wait(request):
    open(sys.argv[1] + "/began", "w").close()
    time.sleep(3600)

client = serve.start(http_options={"location": None})
client.create_backend("b", wait, config={"graceful_shutdown_timeout_s": 1})
client.create_endpoint("e", backend="b")
refs = [client.get_handle("e").remote(number) for number in range(3)]
print("sent", refs[0].id, refs[2].id, flush=True)
import os
while not os.path.exists(sys.argv[1] + "/began"):
    time.sleep(0.01)
if "wait" in sys.argv:
    sys.stdin.read()
began = time.monotonic()
client.shutdown()
print(round(time.monotonic() - began, 1), flush=True)
for ref in refs:
    try:
        ref.result(0)
    except serve.BackendGone as error:
        print(error, flush=True)
"""


def test_the_end_of_an_instance_tells_the_callers_of_stuck_calls_in_time(
    form: str, request: pytest.FixtureRequest, shell: CommandLine, tmp_path: Path
) -> None:
    if form == "distributed":
        shell = request.getfixturevalue("distributed_shell")
    told = shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY).python(ENDS.replace("sys.argv[1]", repr(str(tmp_path))))
    lines = told.stdout.splitlines()
    assert len(lines) == 5, told.stderr
    assert float(lines[1]) < TOLD_WITHIN_S
    assert all("the instance of backend 'b' was shut down" in line for line in lines[2:])


# With RabbitMQ: other processes, plain AMQP clients, and the queues that `mqserve run` leaves.


Stuck = tuple[CommandLine, Program, list[serve.Future]]


@pytest.fixture
def stuck(distributed_shell: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """`mqserve run` in another process, and requests of this one: the first is stuck in a handler, the others wait."""
    shell = distributed_shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY)
    server = shell.start("run", shell.file("stuck.py", STUCK), "--location", "NoServer")
    server.wait_for("Ctrl-C stops")
    monkeypatch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
    where = {name: shell.env[f"MQSERVE_{name.upper()}"] for name in ("broker_url", "store_url", "namespace")}
    with serve.connect(**where) as client:  # type: ignore[arg-type]  # by name: this process runs another instance
        first = client.get_handle("stuck").remote(0)
        wait_until(lambda: (shell.folder / "began").exists())
        yield shell, server, [first, *(client.get_handle("stuck").remote(number) for number in range(1, 3))]


def test_a_caller_in_another_process_is_told_that_the_instance_was_shut_down(stuck: Stuck) -> None:
    shell, server, refs = stuck
    began = time.monotonic()
    shell.run("shutdown")
    for ref in refs:
        with pytest.raises(serve.BackendGone, match="was shut down"):
            ref.result(5)
    assert time.monotonic() - began < TOLD_WITHIN_S + NOISE_S
    assert server.wait() == 0


def test_a_caller_in_another_process_is_not_told_that_it_goes_on_when_run_has_ended(stuck: Stuck) -> None:
    _, server, refs = stuck
    server.signal(signal.SIGINT)
    with pytest.raises(serve.BackendGone, match="was shut down"):
        refs[0].result(TOLD_WITHIN_S)
    server.wait()
    wait_until(lambda: "its instance has been shut down" in no_result_yet(refs[2]))


def no_result_yet(ref: serve.Future) -> str:
    with pytest.raises(TimeoutError) as raised:
        ref.result(0.01)
    return str(raised.value)


STUCK = """
import time
import mqserve as serve

@serve.endpoint("/stuck", graceful_shutdown_timeout_s=1)
def stuck(request):
    open("began", "w").close()
    time.sleep(3600)
"""


@distributed_only
def test_a_plain_amqp_caller_is_told_by_its_reply(client: serve.Client, broker_url: str, environment: Any, tmp_path: Path) -> None:
    gate, name = Gate(tmp_path), new_name("b")
    client.create_backend(name, stuck_plainly(gate), config={"graceful_shutdown_timeout_s": GRACEFUL_S})
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    try:
        channel = connection.channel()
        replies = channel.queue_declare("", exclusive=True).method.queue
        for number in range(3):
            properties = pika.BasicProperties(reply_to=replies, correlation_id=str(number))
            channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.requests", name, b"x", properties)
        wait_until(lambda: gate.came == 1)
        client.delete_backend(name)
        told: dict[str, bytes] = {}
        while len(told) < 3:
            _, properties, body = channel.basic_get(replies, auto_ack=True)
            if properties is not None:
                told[properties.correlation_id] = body
        assert all(b"was deleted" in body for body in told.values())
    finally:
        connection.close()
        gate.open()


RUN = """
import time
import mqserve as serve

@serve.endpoint("/slow", graceful_shutdown_timeout_s=0.5)
def slow(request):
    time.sleep(%s)
    with open("ran", "a") as ran:
        print(request.data, file=ran)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("queue_is_a_later_one", [False, True])
def test_what_run_leaves_queued_stays_for_the_next_instance(
    distributed_shell: CommandLine, broker_url: str, how: int, queue_is_a_later_one: bool
) -> None:
    shell = distributed_shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY)
    first = shell.start("run", shell.file("slow.py", RUN % "1"), "--location", "NoServer")
    first.wait_for("Ctrl-C stops")
    if queue_is_a_later_one:  # since an argument of the queue was changed
        change = "import mqserve; mqserve.connect().update_backend_config('slow', {'max_queued_requests': 50})"
        assert shell.start_program([sys.executable, "-c", change]).wait() == 0
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    channel = connection.channel()
    channel.confirm_delivery()
    for number in range(8):
        properties = pika.BasicProperties(delivery_mode=2, content_type="application/json", message_id=f"order-{number}")
        channel.basic_publish(f"{shell.env['MQSERVE_NAMESPACE']}.requests", "slow", str(number).encode(), properties, mandatory=True)
    connection.close()
    first.signal(how)
    assert first.wait() in (0, 130, 143)
    shell.file("slow.py", RUN % "0.01")
    second = shell.start("run", "slow.py", "--location", "NoServer")
    second.wait_for("Ctrl-C stops")

    def ran() -> set[str]:
        path = shell.folder / "ran"
        return set(re.findall(r"\d+", path.read_text())) if path.exists() else set()

    rest = {str(number) for number in range(3, 8)}  # what had not begun; a call that was cut off was told 503
    wait_until(lambda: rest <= ran(), told=lambda: f"{ran()}\n{first.output}\n{second.output}")
