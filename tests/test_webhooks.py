"""Webhooks, in both forms: a job that names a callback URL has its end told there, signed."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook as Library

import mqserve as serve
from mqserve.broker.values.webhook_signing import derived_secret, written
from tests.instances import SECRET_KEY, CommandLine, Deploy, started, wait_until
from tests.ports import free_port
from tests.receivers import Received, Receiver, receiving

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


def test_without_the_setting_nobody_is_called(receiver: Receiver) -> None:
    with started() as client:
        answer = httpx.post(
            Deploy(client).at(lambda request: None), headers={**ASYNC, "X-Callback-URL": f"http://localhost:{receiver.port}/"}
        )
        assert answer.status_code == 400 and "MQSERVE_CALLBACK_HOSTS" in answer.text


def test_the_command_prints_the_secret_of_the_environment_or_that_of_the_key(shell: CommandLine) -> None:
    key = "k" * 32
    derived = shell.with_variables(MQSERVE_SECRET_KEY=key).run("webhooks", "secret", "--namespace", "shop").stdout.strip()
    assert derived == written(derived_secret(key.encode(), "shop"))
    own = written(b"a secret of thirty-two bytes....")
    assert shell.with_variables(MQSERVE_SECRET_KEY=key, MQSERVE_WEBHOOK_SECRET=own).run("webhooks", "secret").stdout.strip() == own
