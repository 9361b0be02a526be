"""Keys by which a client sends a request again: it runs once, and everybody gets the first answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mqserve.broker.results import Result
from tests.broker.traffic import until
from tests.proxy.job_site import ASYNC, FAILED, JobSite

pytestmark = pytest.mark.anyio


@pytest.fixture
async def site() -> AsyncIterator[JobSite]:
    async with JobSite() as site:
        yield site


def key(name: bytes = b"one") -> tuple[bytes, bytes]:
    return (b"idempotency-key", name)


async def test_a_request_with_a_key_waits_for_its_answer_and_the_same_again_gets_that_one(site: JobSite) -> None:
    asked = asyncio.create_task(site.ask("/e/x", method="POST", body=[b"data"], headers=[key()]))
    await site.jobs.hold(1)
    envelope = site.jobs.held[0].envelope()
    again = asyncio.create_task(site.ask("/e/x", method="POST", body=[b"da", b"ta"], headers=[key()]))
    await until(lambda: len(site.app.polls) == 2)
    site.end(envelope.id, Result(status=201, body=b"done"))
    first, second = await asked, await again
    third = await site.ask("/e/x", method="POST", body=[b"data"], headers=[key()])
    assert [(answer.status, answer.body) for answer in (first, second, third)] == [(201, b"done")] * 3
    assert [answer.headers.get("idempotent-replayed") for answer in (first, second, third)] == [None, "true", "true"]
    assert {answer.headers["x-request-id"] for answer in (first, second, third)} == {envelope.id}
    assert (envelope.persistent, envelope.priority, len(site.jobs)) == (True, 4, 1)


async def test_a_client_with_a_key_may_allow_more_time_than_its_backend_does(site: JobSite) -> None:
    asked = asyncio.create_task(site.ask("/e/x", headers=[key(), (b"x-request-timeout-seconds", b"1e12")]))
    await site.jobs.hold(1)
    envelope = site.jobs.held[0].envelope()
    site.end(envelope.id, Result(body=b"done"))
    assert ((await asked).status, envelope.header.deadline) == (200, 0)


async def test_the_same_key_with_another_request_is_a_422(site: JobSite) -> None:
    await site.submitted(key(), method="POST", body=[b"data"])
    others: list[dict[str, Any]] = [
        {"method": "POST", "body": [b"other"]},
        {"method": "GET", "body": [b"data"]},
        {"method": "POST", "body": [b"data"], "query_string": b"q=1"},
        {"method": "POST", "body": [b"data"], "raw_path": b"/e/%78"},
        {"method": "POST", "body": [b"data"], "headers": [ASYNC, key(), (b"content-type", b"text/plain")]},
    ]
    for other in others:
        answer = await site.ask("/e/x", **{"headers": [ASYNC, key()], **other})
        assert (answer.status, "another request" in answer.detail) == (422, True)
    assert len(site.jobs) == 1


async def test_a_key_is_that_of_one_client(site: JobSite) -> None:
    ids = set[str]()
    for name in (b"ada", b"bob", b"ada"):
        answer = await site.ask("/e/x", headers=[ASYNC, key(), (b"authorization", name)])
        ids.add(json.loads(answer.body)["id"])
    await site.jobs.hold(2)
    assert len(ids) == 2


async def test_a_job_with_a_key_that_is_sent_again_is_the_same_job_in_its_state(site: JobSite) -> None:
    envelope, _ = await site.submitted(key())
    assert envelope.header.job is not None and envelope.header.job.result_ttl_s == 24 * 3600
    await site.begun(envelope.id)
    answer = await site.ask("/e/x", headers=[ASYNC, key()])
    view = json.loads(answer.body)
    assert (answer.status, view["id"], view["status"], answer.headers["location"]) == (
        202, envelope.id, "running", f"/-/futures/{envelope.id}",
    )  # fmt: skip
    assert len(site.jobs) == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_an_answer_that_says_try_again_frees_the_key(site: JobSite, status: int) -> None:
    asked = asyncio.create_task(site.ask("/e/x", headers=[key()]))
    await site.jobs.hold(1)
    site.end(site.jobs.held[0].envelope().id, Result(status=status))
    assert (await asked).status == status
    asked = asyncio.create_task(site.ask("/e/x", headers=[key()]))
    await site.jobs.hold(2)
    site.end(site.jobs.held[1].envelope().id, Result(body=b"now"))
    assert (await asked).body == b"now"


async def test_an_error_of_the_handler_is_the_answer_from_then_on(site: JobSite) -> None:
    envelope, _ = await site.submitted(key())
    site.end(envelope.id, FAILED)
    answer = await site.ask("/e/x", headers=[key()])
    assert (answer.status, answer.headers["idempotent-replayed"], len(site.jobs)) == (500, "true", 1)


async def test_a_request_that_was_refused_has_no_key(site: JobSite) -> None:
    site.app.futures.refusal = "full"
    assert (await site.ask("/e/x", headers=[ASYNC, key()])).status == 503
    site.app.futures.refusal = ""
    assert (await site.submitted(key()))[1].status == 202


async def test_a_key_whose_proxy_died_before_it_sent_is_sent_by_the_next_under_the_same_id(site: JobSite) -> None:
    publish, begun = site.queue.publish_job, asyncio.Event()
    site.queue.publish_job = lambda *_: begun.set()  # type: ignore[method-assign]
    dying = asyncio.create_task(site.ask("/e/x", headers=[key()]))
    await begun.wait()
    dying.cancel()
    site.queue.publish_job = publish  # type: ignore[method-assign]
    envelope, answer = await site.submitted(key())
    assert (answer.status, answer.headers["idempotent-replayed"], envelope.header.again) == (202, "true", True)
    assert json.loads(answer.body)["id"] == envelope.id


async def test_a_client_that_loses_its_connection_finds_the_answer_by_its_key(site: JobSite) -> None:
    gone = asyncio.Event()
    asked = asyncio.create_task(site.ask("/e/x", headers=[key()], gone=gone))
    await site.jobs.hold(1)
    gone.set()
    assert (await asked).status == 504
    site.end(site.jobs.held[0].envelope().id, Result(body=b"kept"))
    assert (await site.ask("/e/x", headers=[key()])).body == b"kept"


async def test_a_key_that_is_none_is_a_400(site: JobSite) -> None:
    for headers in ([key(b"")], [key(b"x" * 256)], [key(), key()]):
        assert (await site.ask("/e/x", headers=headers)).status == 400
