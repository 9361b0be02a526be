"""Webhooks, in both forms: a job that names a callback URL has its end told there, signed."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pika
import pytest
from click.testing import CliRunner, Result
from standardwebhooks import Webhook as Library

import mqserve as serve
from mqserve.broker.values.webhook_signing import WebhookSigner, derived_secret, written
from mqserve.commands.cli import cli
from tests.gates import Gate
from tests.instances import SECRET_KEY, CommandLine, Deploy, Program, distributed_only, new_name, started, wait_until
from tests.ports import free_port
from tests.receivers import Received, Receiver, receiving
from tests.test_docs import NAMED

CALLBACKS = {"MQSERVE_CALLBACK_HOSTS": "localhost:*", "MQSERVE_CALLBACK_NETWORKS": "127.0.0.0/8,::1", "MQSERVE_CALLBACK_HTTP": "1"}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(scope="module")
def client(form: str, shared_namespace: str, request: pytest.FixtureRequest) -> Iterator[serve.Client]:
    """An instance whose controllers may call this machine."""
    urls = {name: request.getfixturevalue(name) for name in ("broker_url", "store_url")} if form == "distributed" else {}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in CALLBACKS.items():
                patch.setenv(name, value)
            client = stack.enter_context(started(**urls, namespace=shared_namespace))
        yield client


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def told(received: Received, namespace: str) -> Any:
    """What a webhook says, once its signature is checked as receivers do."""
    secret = written(derived_secret(SECRET_KEY.encode(), namespace))
    return Library(secret).verify(received.body, received.headers)


def first_of(receiver: Receiver, namespace: str) -> Any:
    wait_until(lambda: receiver.received)
    return told(receiver.received[0], namespace)


def test_the_end_of_a_job_is_told_with_a_signature_and_leads_to_its_result(
    deploy: Deploy, receiver: Receiver, shared_namespace: str
) -> None:
    url, name = deploy.named(lambda request: {"doubled": request.data * 2})
    answer = httpx.post(url, json=21, headers={**ASYNC, "X-Callback-URL": f"http://localhost:{receiver.port}/jobs?of=me"})
    assert answer.status_code == 202, answer.text
    assert answer.json()["callback_host"] == "localhost", "the rest of the URL may hold a secret"
    hook = first_of(receiver, shared_namespace)
    assert (hook["type"], hook["data"]["status"], hook["data"]["id"]) == ("job.succeeded", "succeeded", answer.json()["id"])
    assert hook["data"]["endpoint"] == name and hook["timestamp"].endswith("Z")
    assert httpx.get(f"{deploy.url}{hook['data']['result_url']}").json() == {"doubled": 42}
    assert receiver.received[0].path == "/jobs?of=me" and receiver.received[0].headers["content-type"] == "application/json"


def test_a_job_of_a_handle_that_failed_is_told_as_that_and_so_is_its_retry(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str
) -> None:
    def fail(request: serve.ServeRequest) -> None:
        raise ValueError("no")

    handle = client.get_handle(deploy(fail)).options(callback_url=f"http://localhost:{receiver.port}/")
    job = handle.submit()
    hook = first_of(receiver, shared_namespace)
    assert (hook["type"], hook["data"]["id"]) == ("job.failed", job.id)
    again = job.retry()
    wait_until(lambda: len(receiver.received) == 2)
    assert told(receiver.received[1], shared_namespace)["data"]["id"] == again.id
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 2


def test_a_job_that_is_cancelled_before_its_time_is_told_as_that(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str
) -> None:
    handle = client.get_handle(deploy(lambda request: None))
    job = handle.options(delay_s=600, callback_url=f"http://localhost:{receiver.port}/").submit()
    assert job.cancel()
    assert first_of(receiver, shared_namespace)["type"] == "job.cancelled"


def test_a_job_that_is_cancelled_while_it_runs_is_told_as_that(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    handle = client.get_handle(deploy(lambda request: gate.pass_through()))
    job = handle.options(callback_url=f"http://localhost:{receiver.port}/").submit()
    wait_until(lambda: gate.came)
    assert job.cancel()
    hook = first_of(receiver, shared_namespace)
    assert (hook["type"], hook["data"]["id"]) == ("job.cancelled", job.id)
    gate.open()


def test_a_job_that_could_not_begin_in_time_and_one_whose_backend_is_deleted_are_told_as_that(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    name = deploy(lambda request: gate.pass_through(), max_concurrent_queries=1)
    handle = client.get_handle(name).options(callback_url=f"http://localhost:{receiver.port}/")
    handle.options(callback_url="").submit()
    wait_until(lambda: gate.came)
    late, left = handle.options(expires_s=0.1).submit(), handle.submit()
    wait_until(lambda: late.status().state == "expired")
    hook = first_of(receiver, shared_namespace)
    assert (hook["type"], hook["data"]["id"]) == ("job.expired", late.id)
    client.delete_endpoint(name)
    client.delete_backend(name, force=True)
    deploy.forget(name)
    wait_until(lambda: len(receiver.received) == 2)
    hook = told(receiver.received[1], shared_namespace)
    assert (hook["type"], hook["data"]["id"]) == ("job.failed", left.id)


def test_a_request_that_is_sent_again_with_its_key_is_told_of_once(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str
) -> None:
    url, name = deploy.named(lambda request: request.data)
    callback = f"http://localhost:{receiver.port}/"
    headers = {"Idempotency-Key": new_name("key"), "X-Callback-URL": callback}
    for replayed in (None, "true"):
        answer = httpx.post(url, json="by HTTP", headers=headers)
        assert (answer.text, answer.headers.get("idempotent-replayed")) == ("by HTTP", replayed)
    handle = client.get_handle(name).options(callback_url=callback)
    keyed = handle.options(idempotency_key=new_name("key"))
    jobs = [keyed.submit("by a handle") for _ in range(2)]
    assert jobs[0].id == jobs[1].id and jobs[1].result(30) == "by a handle"
    last = handle.submit("last")
    wait_until(lambda: last.id in {told(received, shared_namespace)["data"]["id"] for received in receiver.received})
    ids = [told(received, shared_namespace)["data"]["id"] for received in receiver.received]
    assert sorted(ids) == sorted([answer.headers["x-request-id"], jobs[0].id, last.id])


def test_a_retry_over_http_is_told_of_under_its_own_id(deploy: Deploy, receiver: Receiver, shared_namespace: str) -> None:
    url = deploy.at(lambda request: "done")
    first = httpx.post(url, headers={**ASYNC, "X-Callback-URL": f"http://localhost:{receiver.port}/"}).json()["id"]
    assert first_of(receiver, shared_namespace)["data"]["id"] == first
    again = httpx.post(f"{deploy.url}/-/futures/{first}/retry")
    assert again.status_code == 202, again.text
    wait_until(lambda: len(receiver.received) == 2)
    assert told(receiver.received[1], shared_namespace)["data"]["id"] == again.json()["id"] != first


@distributed_only
def test_a_direct_publisher_names_its_callback_in_the_header(
    client: serve.Client, deploy: Deploy, receiver: Receiver, shared_namespace: str, broker_url: str
) -> None:
    name = deploy(lambda request: request.data)
    job = {"callback": f"http://localhost:{receiver.port}/"}
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        for key, head in (("mine", job), ("not-mine", {**job, "tag": "a right that needs a seal"})):
            properties = pika.BasicProperties(
                content_type="application/json", message_id=key, delivery_mode=2, headers={"mq": msgspec.msgpack.encode({"job": head})}
            )
            channel.basic_publish(f"{shared_namespace}.jobs", name, b"21", properties)
    assert client.job("mine", backend=name).result(30) == 21
    hook = first_of(receiver, shared_namespace)
    assert (hook["type"], hook["data"]["id"], hook["data"]["endpoint"]) == ("job.succeeded", f"{name}/mine", "")
    with pytest.raises(serve.MQServeError):
        client.job("not-mine", backend=name).result(1)


@distributed_only
def test_a_webhook_that_was_given_up_is_shown_and_sent_again_under_its_id(
    client: serve.Client, deploy: Deploy, shared_namespace: str, environment: dict[str, str]
) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner(env={**environment, **CALLBACKS}).invoke(cli, ["webhooks", *arguments])

    assert "No webhooks" in run("list").output
    with receiving(lambda number: (410 if number == 1 else 204, {})) as receiver:
        job = client.get_handle(deploy(lambda request: None)).options(callback_url=f"http://localhost:{receiver.port}/").submit()
        wait_until(lambda: run("list", "--json").output)
        shown = json.loads(run("list", "--json").output)
        assert (shown["job"], shown["type"], shown["receiver"], shown["tries"]) == (job.id, "job.succeeded", "localhost", 1)
        assert "410" in shown["error"] and shown["id"] == receiver.received[0].headers["webhook-id"]
        assert shown["id"][:20] in run("list").output.replace("\n", "")
        assert run("retry").exit_code == run("retry", "another").exit_code == 1
        assert "1 sent again" in run("retry", shown["id"]).output
        wait_until(lambda: len(receiver.received) == 2)
        assert told(receiver.received[1], shared_namespace)["data"]["id"] == job.id
        assert receiver.received[1].headers["webhook-id"] == shown["id"] and "No webhooks" in run("drop", "--all").output


def test_a_receiver_that_is_down_is_told_once_it_is_up(client: serve.Client, deploy: Deploy, shared_namespace: str) -> None:
    port = free_port()
    job = client.get_handle(deploy(lambda request: "done")).options(callback_url=f"http://localhost:{port}/").submit()
    assert job.result(30) == "done"
    with receiving(port=port) as receiver:
        assert first_of(receiver, shared_namespace)["data"]["id"] == job.id


@pytest.mark.parametrize("callback", ["http://elsewhere.example/", "http://localhost.elsewhere.example/", "localhost/x"])
def test_a_job_with_a_callback_that_is_not_allowed_is_refused_and_not_sent(
    client: serve.Client, deploy: Deploy, receiver: Receiver, callback: str
) -> None:
    url, name = deploy.named(lambda request: "done")
    answer = httpx.post(url, headers={**ASYNC, "X-Callback-URL": callback})
    assert answer.status_code == 400 and "callback" in answer.text.lower(), answer.text
    with pytest.raises(serve.BadValue):
        client.get_handle(name).options(callback_url=callback).submit()


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here to run it")
def test_the_receiver_of_the_guide_for_node_takes_what_is_genuine_and_each_once(
    client: serve.Client, deploy: Deploy, shared_namespace: str, tmp_path: Path
) -> None:
    port, secret = free_port(), derived_secret(SECRET_KEY.encode(), shared_namespace)
    (tmp_path / "receiver.js").write_text(NAMED["webhooks-node"])
    with Program(["node", "receiver.js"], tmp_path, {**os.environ, "PORT": str(port), "WEBHOOK_SECRET": written(secret)}) as node:
        name, url = deploy(lambda request: None), f"http://localhost:{port}/"
        client.get_handle(name).options(callback_url=url).submit()
        node.wait_for(f"job.succeeded {name}")
        old, earlier, forger = (WebhookSigner([key], "ns") for key in (secret, b"the next secret of 32 bytes or so", b"x" * 32))
        body, now_s = b'{"type":"again","data":{"endpoint":"e"}}', int(time.time())
        both = earlier.headers("msg_1", body, now_s)
        both["webhook-signature"] += " " + old.headers("msg_1", body, now_s)["webhook-signature"]
        posts: list[dict[str, str]] = [both, both, forger.headers("msg_2", body, now_s), old.headers("msg_3", body, now_s - 3600), {}]
        statuses = [httpx.post(f"http://127.0.0.1:{port}/", content=body, headers=headers).status_code for headers in posts]
        assert statuses == [204, 204, 401, 401, 401]
        assert node.output.splitlines() == [f"job.succeeded {name}", "again e"]


WITHOUT_THE_SETTING = """
import httpx
import mqserve as serve

client = serve.start(http_options={"port": 0})
client.create_backend("b", lambda request: None)
client.create_endpoint("b", backend="b", route="/b")
answer = httpx.get(f"{client.http_url()}/b", headers={"Prefer": "respond-async", "X-Callback-URL": "https://hooks.example/"})
print(answer.status_code, "MQSERVE_CALLBACK_HOSTS" in answer.text)
client.shutdown()
"""


def test_without_the_setting_nobody_is_called(shell: CommandLine) -> None:
    assert shell.python(WITHOUT_THE_SETTING).stdout == "400 True\n"


def test_the_command_prints_the_secret_of_the_environment_or_that_of_the_key(shell: CommandLine) -> None:
    key = "k" * 32
    derived = shell.with_variables(MQSERVE_SECRET_KEY=key).run("webhooks", "secret", "--namespace", "shop").stdout.strip()
    assert derived == written(derived_secret(key.encode(), "shop"))
    own = written(b"a secret of thirty-two bytes....")
    assert shell.with_variables(MQSERVE_SECRET_KEY=key, MQSERVE_WEBHOOK_SECRET=own).run("webhooks", "secret").stdout.strip() == own
