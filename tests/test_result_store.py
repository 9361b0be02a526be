"""Large results of jobs, in both forms: they are files of a folder that all processes of an instance share."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pika
import pytest

import mqserve as serve
from tests.instances import CommandLine, Deploy, distributed_only, started
from tests.test_direct_publishing import own_queue, receive
from tests.test_jobs_over_http import state_of, submitted

MIB = 2**20
LARGE = 12 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def client(form: str, shared_namespace: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[serve.Client]:
    """An instance with that folder."""
    urls = {name: request.getfixturevalue(name) for name in ("broker_url", "store_url")} if form == "distributed" else {}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MQSERVE_RESULT_STORE", folder.as_uri())
            client = stack.enter_context(started(**urls, namespace=shared_namespace))
        yield client


@pytest.fixture(scope="module")
def environment(environment: dict[str, str], folder: Path) -> dict[str, str]:
    return {**environment, "MQSERVE_RESULT_STORE": folder.as_uri()}


@pytest.fixture
def files(folder: Path, shared_namespace: str) -> Iterator[Any]:
    """Returns the files that there are, which are removed at the end of the test."""
    yield lambda: list((folder / shared_namespace).iterdir())
    for path in (folder / shared_namespace).iterdir():
        path.unlink()


def count_up(request: Any) -> bytes:
    """Large, and different at each place."""
    return np.arange(LARGE // 4, dtype=np.uint32).tobytes()


COUNTED = np.arange(LARGE // 4, dtype=np.uint32).tobytes()


def test_a_large_answer_of_a_job_is_read_from_its_file_on_any_proxy(deploy: Deploy, proxies: list[str], files: Any) -> None:
    id = submitted(deploy.at(count_up))
    assert state_of(proxies[0], id, wait_s=60)["status"] == "succeeded"
    [path] = files()
    assert path.stat().st_size == LARGE and id not in path.name
    for proxy in proxies:
        answer = httpx.get(f"{proxy}/-/futures/{id}/result")
        assert (answer.status_code, answer.headers["content-length"], answer.headers["x-request-id"]) == (200, str(LARGE), id)
        assert answer.content == COUNTED
        head = httpx.head(f"{proxy}/-/futures/{id}/result")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, str(LARGE), b"")
    assert serve.job(id).result(timeout=30) == COUNTED


def test_who_waits_for_a_job_or_names_a_key_gets_its_large_answer(deploy: Deploy, files: Any) -> None:
    url = deploy.at(count_up)
    waited = httpx.get(url, headers={"Prefer": "wait=30"})
    assert (waited.status_code, waited.headers["preference-applied"], waited.content == COUNTED) == (200, "wait=30", True)
    for _ in range(2):
        keyed = httpx.post(url, headers={"Idempotency-Key": '"large"'})
        assert (keyed.status_code, keyed.content == COUNTED) == (200, True)
    assert keyed.headers["idempotent-replayed"] == "true" and len(files()) == 2


def test_a_handle_gets_a_large_object_of_a_job(deploy: Deploy, files: Any) -> None:
    def ones(request: serve.ServeRequest) -> Any:
        return np.ones(LARGE // 8)

    job = serve.get_handle(deploy(ones)).submit()
    for reader in (job, serve.job(job.id)):
        assert reader.result(timeout=60).sum() == LARGE // 8
    assert len(files()) == 1


def test_chunks_are_joined_to_a_large_answer(deploy: Deploy, files: Any) -> None:
    def chunks(request: Any) -> Iterator[bytes]:
        for _ in range(12):
            yield b"x" * MIB

    id = submitted(deploy.at(chunks))
    state_of(deploy.url, id, wait_s=60)
    assert httpx.get(f"{deploy.url}/-/futures/{id}/result").content == b"x" * 12 * MIB and len(files()) == 1


def test_waits_and_small_jobs_have_no_files(deploy: Deploy, files: Any) -> None:
    url = deploy.at(lambda request: b"x" * int(request.query_params["size"]))
    assert len(httpx.get(url, params={"size": LARGE}).content) == LARGE
    id = submitted(url, params={"size": 8 * MIB})
    assert state_of(deploy.url, id, wait_s=60)["status"] == "succeeded"
    assert len(httpx.get(f"{deploy.url}/-/futures/{id}/result").content) == 8 * MIB
    assert files() == []


def test_a_file_that_is_changed_or_gone_is_told_in_a_sentence(deploy: Deploy, files: Any) -> None:
    id = submitted(deploy.at(count_up))
    state_of(deploy.url, id, wait_s=60)
    at, [path] = f"{deploy.url}/-/futures/{id}/result", files()
    with path.open("r+b") as file:
        file.write(b"changed")
    answer = httpx.get(at)
    assert (answer.status_code, "is not what its replica wrote" in answer.json()["detail"]) == (500, True)
    with pytest.raises(serve.MQServeError, match="is not what its replica wrote"):
        serve.job(id).result(timeout=30)
    path.unlink()
    answer = httpx.get(at)
    assert (answer.status_code, "is gone from the result store" in answer.json()["detail"]) == (410, True)
    with pytest.raises(serve.ResultGone, match="is gone from the result store"):
        serve.job(id).result(timeout=30)
    path.touch()  # for the fixture


def test_a_result_that_cannot_be_written_fails_its_job_with_the_reason(
    deploy: Deploy, folder: Path, shared_namespace: str, files: Any, tmp_path: Path
) -> None:
    url = deploy.at(count_up)
    (folder / shared_namespace).rename(tmp_path / "away")
    (folder / shared_namespace).write_text("no folder")
    try:
        id = submitted(url)
        state = state_of(deploy.url, id, wait_s=60)
        assert (state["status"], state["error"]["type"]) == ("failed", "mqserve.NotWritten")
        assert "Not a directory" in state["error"]["message"] and str(folder) not in state["error"]["message"]
    finally:
        (folder / shared_namespace).unlink()
        (tmp_path / "away").rename(folder / shared_namespace)
    again = httpx.post(f"{deploy.url}/-/futures/{id}/retry").json()["id"]
    assert state_of(deploy.url, again, wait_s=60)["status"] == "succeeded"


@distributed_only
def test_a_purge_removes_the_file_with_its_job(deploy: Deploy, joining: CommandLine, files: Any) -> None:
    id = submitted(deploy.at(count_up))
    state_of(deploy.url, id, wait_s=60)
    assert len(files()) == 1
    purged = joining.run("jobs", "purge", id)
    assert (purged.returncode, files()) == (0, []), purged.stderr
    assert httpx.get(f"{deploy.url}/-/futures/{id}/result").status_code == 404


@distributed_only
def test_a_client_without_the_folder_says_what_to_set(deploy: Deploy, environment: dict[str, str], tmp_path: Path, files: Any) -> None:
    id = submitted(deploy.at(count_up))
    state_of(deploy.url, id, wait_s=60)
    shell = CommandLine(tmp_path, **{name: value for name, value in environment.items() if name != "MQSERVE_RESULT_STORE"})
    done = shell.python(f"import mqserve as serve; serve.connect(); serve.job({id!r}).result(timeout=30)")
    assert done.returncode == 1 and "set MQSERVE_RESULT_STORE" in done.stderr


@distributed_only
def test_a_direct_publisher_is_told_where_its_large_result_is(deploy: Deploy, broker_url: str, shared_namespace: str, files: Any) -> None:
    backend = deploy(count_up)
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        replies = own_queue(channel)
        properties = pika.BasicProperties(content_type="application/json", message_id="large", reply_to=replies, delivery_mode=2)
        channel.basic_publish(f"{shared_namespace}.jobs", backend, b"1", properties)
        reply, body = receive(channel, replies)
    assert (reply.headers or {})["mq-status"] == 500 and b"mqserve.TooLarge" in body and b"read it under 'large'" in body
    assert serve.job("large", backend=backend).result(timeout=30) == COUNTED and len(files()) == 1
