"""Jobs over HTTP, without a socket: how a request becomes one, and what its client is answered at each point of its life."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from mqserve.broker.calls.cancellations import CANCELLED, notice_of_request
from mqserve.broker.envelope import mint_id
from mqserve.broker.jobs import Attempt, EventKind, JobEvent, JobFacts, JobState
from mqserve.broker.results import Result
from mqserve.proxy.forwarded import forwarders
from mqserve.proxy.preferences import Preference, read_preference
from tests.broker.traffic import Hands, until
from tests.proxy.job_site import ASYNC, FAILED, FAR, WITH_TOKEN, JobSite

pytestmark = pytest.mark.anyio


@pytest.fixture
async def site() -> AsyncIterator[JobSite]:
    async with JobSite() as site:
        yield site


def links_of(view: dict[str, Any]) -> tuple[str, str]:
    return view["result_url"], view["events_url"]


# How a request becomes a job.


@pytest.mark.parametrize(
    ("lines", "preference"),
    [
        ([b"respond-async"], Preference(True, None)),
        ([b"Respond-Async, wait=10"], Preference(True, 10)),
        ([b"wait=10"], Preference(False, 10)),
        ([b'wait="7"'], Preference(False, 7)),
        ([b"return=minimal", b"respond-async; foo=bar, wait=0"], Preference(True, 0)),
        ([b"wait=100000"], Preference(False, 60)),
        ([b"wait=3, wait=9"], Preference(False, 3)),
        ([b"wait=soon, respond-async"], Preference(True, None)),
        ([b'note="a, respond-async"'], None),
        ([b"wait=-1"], None),
        ([b"return=minimal"], None),
        ([b""], None),
    ],
)
def test_a_preference_is_read_as_rfc_7240_says(lines: list[bytes], preference: Preference | None) -> None:
    assert read_preference([(b"prefer", line) for line in lines]) == preference


async def test_a_job_is_accepted_with_its_location_once_its_persistent_message_is_confirmed(site: JobSite) -> None:
    envelope, answer = await site.submitted(method="POST", body=[b"data"])
    view = json.loads(answer.body)
    assert (answer.status, view["status"], view["endpoint"], view["id"]) == (202, "queued", "e", envelope.id)
    assert view["created_at"].endswith("Z") and "backend" not in view
    assert answer.headers["location"] == f"/-/futures/{envelope.id}"
    assert (answer.headers["preference-applied"], answer.headers["retry-after"]) == ("respond-async", "1")
    assert links_of(view) == (f"/-/futures/{envelope.id}/result", f"/-/futures/{envelope.id}/events")
    assert (envelope.persistent, envelope.body, envelope.header.deadline, envelope.priority) == (True, b"data", 0, 2)
    assert envelope.header.job is not None
    assert len(site.hands) == 0


async def test_the_headers_of_a_job_say_how_it_is_kept(site: JobSite) -> None:
    headers = (b"x-result-ttl", b"3600"), (b"x-priority", b"low"), (b"x-request-timeout-seconds", b"60")
    before_ms = site.store.now_ms()
    envelope, answer = await site.submitted(*headers)
    assert envelope.header.job is not None
    assert (envelope.header.job.result_ttl_s, envelope.priority) == (3600, 0)
    assert before_ms + 60_000 <= envelope.header.deadline <= site.store.now_ms() + 60_000
    assert "expires_at" in json.loads(answer.body)


@pytest.mark.parametrize(
    "header",
    [
        (b"x-result-ttl", b"0"), (b"x-result-ttl", b"2592001"), (b"x-result-ttl", b"1.5"), (b"x-priority", b"urgent"),
        (b"x-not-before", b"soon"), (b"x-not-before", b"2030-01-31T03:00:00"), (b"x-not-before", b"9999-12-31T23:59:59Z"),
    ],
)  # fmt: skip
async def test_a_header_of_a_job_that_says_nothing_is_a_400_and_nothing_is_sent(site: JobSite, header: tuple[bytes, bytes]) -> None:
    answer = await site.ask("/e/x", headers=[ASYNC, header])
    assert (answer.status, len(site.jobs)) == (400, 0)


@pytest.mark.parametrize("write", [datetime.isoformat, format_datetime])
async def test_a_job_waits_for_its_time(site: JobSite, write: Callable[[datetime], str]) -> None:
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)
    answer = await site.ask("/e/x", headers=[ASYNC, (b"x-not-before", write(later).encode())])
    assert answer.status == 202 and len(site.jobs) == 0
    record = await site.store.jobs.read(json.loads(answer.body)["id"])
    assert record is not None and record.facts.not_before_ms == later.timestamp() * 1000


async def test_a_time_that_has_passed_is_no_reason_to_wait(site: JobSite) -> None:
    envelope, _ = await site.submitted((b"x-not-before", b"Wed, 20 Mar 2024 03:00:00 GMT"))
    assert envelope.header.job is not None and not envelope.header.job.not_before_ms


async def test_a_job_whose_time_comes_after_it_has_to_begin_is_refused(site: JobSite) -> None:
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat().encode()
    answer = await site.ask("/e/x", headers=[ASYNC, (b"x-not-before", later), (b"x-request-timeout-seconds", b"60")])
    assert (answer.status, len(site.jobs)) == (400, 0) and b"X-Request-Timeout-Seconds" in answer.body


async def test_a_request_that_waits_may_have_a_priority_too(site: JobSite) -> None:
    envelope, _ = await site.exchanged(Result(), headers=[(b"x-priority", b"high")])
    assert envelope.priority == 4
    envelope, _ = await site.exchanged(Result(), headers=[(b"x-priority", b"low")])
    assert envelope.priority == 0


async def test_a_head_request_is_never_a_job(site: JobSite) -> None:
    _, answer = await site.exchanged(Result(body=b"well"), method="HEAD", headers=[ASYNC])
    assert (answer.status, len(site.jobs)) == (200, 0)


async def test_a_job_is_accepted_while_no_replica_is_there(site: JobSite) -> None:
    site.down_since(1)
    _, answer = await site.submitted()
    assert answer.status == 202


async def test_a_job_has_no_shadow_copies(site: JobSite) -> None:
    copies = Hands()
    await site.queue.consume("copy", 1, 10, copies)
    await site.submitted()
    await site.exchanged(Result())
    await copies.hold(1)  # that of the request that waited


async def test_new_jobs_are_refused_with_the_reason_while_the_store_is_nearly_full(site: JobSite) -> None:
    site.app.futures.refusal = "it is nearly full"
    answer = await site.ask("/e/x", headers=[ASYNC])
    assert (answer.status, "nearly full" in answer.detail, len(site.jobs)) == (503, True, 0)
    assert "retry-after" in answer.headers


async def test_who_waits_gets_the_answer_itself_or_202_under_the_same_id(site: JobSite) -> None:
    asked = asyncio.create_task(site.ask("/e/x", headers=[(b"prefer", b"wait=20")]))
    await site.jobs.hold(1)
    future_id = site.jobs.held[0].envelope().id
    site.end(future_id, Result(status=201, content_type="text/plain", body=b"done"))
    answer = await asked
    assert (answer.status, answer.body, answer.headers["preference-applied"]) == (201, b"done", "wait=20")
    assert answer.headers["x-request-id"] == future_id
    late = await site.ask("/e/x", headers=[(b"prefer", b"respond-async, wait=1")])
    await site.jobs.hold(2)
    assert (late.status, late.headers["preference-applied"]) == (202, "respond-async, wait=1")
    assert json.loads(late.body)["id"] == site.jobs.held[1].envelope().id


async def test_a_client_that_goes_while_it_waits_for_a_job_cancels_nothing(site: JobSite) -> None:
    gone = asyncio.Event()
    asked = asyncio.create_task(site.ask("/e/x", headers=[(b"prefer", b"wait=60")], gone=gone))
    await site.jobs.hold(1)
    gone.set()
    assert (await asked).status == 202
    assert (await site.state(site.jobs.held[0].envelope().id))["status"] == "queued"


async def test_clients_that_wait_are_answered_at_once_when_the_proxy_ends(site: JobSite) -> None:
    asked = asyncio.create_task(site.ask("/e/x", headers=[(b"prefer", b"wait=60")]))
    await site.jobs.hold(1)
    future_id = site.jobs.held[0].envelope().id
    polled = asyncio.create_task(site.state(future_id, b"wait=60"))
    await until(lambda: len(site.app.polls) == 2)
    site.app.polls.end()
    assert ((await asked).status, (await polled)["status"]) == (202, "queued")
    assert (await site.state(future_id, b"wait=60"))["status"] == "queued"


# What is known of it.


async def test_the_state_of_a_job_is_told_at_every_point_of_its_life(site: JobSite) -> None:
    first, _ = await site.submitted()
    second, _ = await site.submitted()
    assert [(await site.state(job.id))["position"] for job in (first, second)] == [0, 1]
    token = await site.begun(first.id)
    site.store.jobs.note(first.id, token, JobEvent(EventKind.PROGRESS, site.store.now_ms(), fraction=0.5, text="half"))
    view = await site.state(first.id)
    assert (view["status"], view["attempts"], view["progress"]["fraction"]) == ("running", 1, 0.5)
    assert "started_at" in view and "position" not in view and "ended_at" not in view
    site.end(first.id, Result(body=b"1"))
    view = await site.state(first.id, client=FAR)
    assert view["status"] == "succeeded" and "ended_at" in view and "error" not in view


async def test_a_job_that_failed_says_why_without_the_words_of_the_handlers_exception(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    token = await site.begun(envelope.id)
    now_ms = site.store.now_ms()
    failed = Attempt(1, "", now_ms, now_ms, "OSError: secret", now_ms + 1000)
    await site.store.jobs.try_again(envelope.id, token, failed, JobFacts("b", "e"))
    view = await site.state(envelope.id)
    assert (view["status"], view["history"][0]["error"]) == ("queued", "OSError")
    site.end(envelope.id, FAILED)
    view = await site.state(envelope.id)
    assert (view["status"], view["error"]["type"], view["error"]["status"]) == ("failed", "ValueError", 500)
    assert "secret" not in json.dumps(view)


async def test_a_job_that_was_not_begun_in_time_has_expired(site: JobSite) -> None:
    envelope, _ = await site.submitted((b"x-request-timeout-seconds", b"0.001"))
    now_ms = site.store.now_ms
    site.store.now_ms = lambda: now_ms() + 10_000  # type: ignore[method-assign]
    assert (await site.state(envelope.id))["status"] == "expired"
    assert (await site.ask(f"/-/futures/{envelope.id}/result")).status == 504


async def test_a_job_of_a_publisher_that_lets_it_wait_for_ages_is_told(site: JobSite) -> None:
    """In microseconds by mistake, or as the largest number there is."""
    future_id, added = mint_id(), asyncio.Event()
    facts = JobFacts("b", "e", site.store.now_ms(), expires_ms=2**62)
    site.store.jobs.add_then(future_id, facts, lambda outcome: added.set())
    await added.wait()
    assert (await site.state(future_id))["expires_at"].startswith("9999-12-31")


async def test_a_long_poll_ends_with_the_job_or_with_its_time(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    assert (await site.state(envelope.id, b"wait=0.1"))["status"] == "queued"
    polls = [asyncio.create_task(site.state(envelope.id, b"wait=30")) for _ in range(3)]
    await until(lambda: len(site.app.polls) == 3)
    site.end(envelope.id, Result())
    assert [view["status"] for view in await asyncio.gather(*polls)] == ["succeeded"] * 3
    assert (await site.ask(f"/-/futures/{envelope.id}", query_string=b"wait=soon")).status == 400


async def test_a_request_that_is_no_job_is_known_once_it_has_a_result(site: JobSite) -> None:
    asked = asyncio.create_task(site.ask("/e/x"))
    envelope = await site.taken()
    assert (await site.ask(f"/-/futures/{envelope.id}")).status == 404
    await site.answer(Result(body=b"here"))
    await asked
    view = await site.state(envelope.id)
    assert (view["status"], view["result_url"]) == ("succeeded", f"/-/futures/{envelope.id}/result")
    assert (await site.ask(f"/-/futures/{envelope.id}/result")).body == b"here"


async def test_an_unknown_id_is_a_404(site: JobSite) -> None:
    for part in ("", "/result", "/events"):
        assert (await site.ask(f"/-/futures/{mint_id()}{part}")).status == 404
    assert (await site.ask(f"/-/futures/{mint_id()}/retry", method="POST")).status == 404
    answer = await site.ask(f"/-/futures/{mint_id()}", method="POST")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, DELETE")


async def test_the_job_of_a_publishers_own_key_needs_the_token(site: JobSite) -> None:
    site.end("b/their key", Result(body=b"theirs"))
    path, token = "/-/futures/b%2Ftheir%20key/result", [WITH_TOKEN]
    decoded, raw = "/-/futures/b/their key/result", path.encode()
    assert (await site.ask(decoded, raw_path=raw, client=FAR)).status == 403
    assert (await site.ask(decoded, raw_path=raw, client=FAR, headers=token)).body == b"theirs"
    view = await site.state("b/their%20key", client=("127.0.0.1", 1), headers=token)
    assert (view["status"], view["result_url"]) == ("succeeded", path)


async def test_a_publishers_own_key_adds_no_lines_to_an_answer(site: JobSite) -> None:
    site.end("b/x\r\nevil: 1", Result())
    for part in ("", "/result"):
        answer = await site.ask(f"/-/futures/b%2Fx%0D%0Aevil:%201{part}", headers=[WITH_TOKEN])
        assert answer.status == 200 and not any("\n" in value for value in answer.headers.values())
    events = await site.events("b%2Fx%0D%0Aevil%3A%201", b"", WITH_TOKEN)
    assert [event[0] for event in events] == ["b%2Fx%0D%0Aevil%3A%201:1"]
    assert await site.events("b%2Fx%0D%0Aevil%3A%201", events[0][0].encode(), WITH_TOKEN) == []


# Its answer.


async def test_the_result_is_202_before_it_is_there_and_410_once_it_is_gone(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    path = f"/-/futures/{envelope.id}/result"
    answer = await site.ask(path)
    assert (answer.status, answer.headers["retry-after"], json.loads(answer.body)["status"]) == (202, "1", "queued")
    waiting = asyncio.create_task(site.ask(path, query_string=b"wait=20"))
    await until(lambda: len(site.app.polls) == 1)
    site.end(envelope.id, Result(status=201, content_type="text/plain", headers=((b"x-mine", b"1"),), body=b"done"), ttl_ms=300)
    answer = await waiting
    assert (answer.status, answer.headers["content-type"], answer.headers["x-mine"], answer.body) == (201, "text/plain", "1", b"done")

    async def is_gone() -> bool:
        return (await site.ask(path)).status == 410

    await until(is_gone)
    assert (await site.state(envelope.id))["status"] == "succeeded"


async def test_an_error_is_answered_as_to_a_request_that_waits(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    site.end(envelope.id, FAILED)
    answer = await site.ask(f"/-/futures/{envelope.id}/result")
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.detail


async def test_a_head_request_gets_the_head_of_the_result(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    site.end(envelope.id, Result(body=b"well"))
    answer = await site.ask(f"/-/futures/{envelope.id}/result", method="HEAD")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "4", b"")


# Its events.


async def test_the_events_of_a_job_end_with_its_final_state(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    reading = asyncio.create_task(site.events(envelope.id))
    await until(lambda: len(site.app.polls) == 1)
    token = await site.begun(envelope.id)
    site.store.jobs.note(envelope.id, token, JobEvent(EventKind.PROGRESS, site.store.now_ms(), fraction=0.4, text="step"))
    site.store.jobs.note(envelope.id, token, JobEvent(EventKind.LOG, site.store.now_ms(), text="two\nlines"))
    site.end(envelope.id, Result())
    events = await reading
    told = [(kind, data.get("status") or data.get("text")) for _, kind, data in events]
    assert told == [("state", "queued"), ("state", "running"), ("progress", "step"), ("log", "two\nlines"), ("state", "succeeded")]
    assert [event[0] for event in events] == [f"{envelope.id}:{number}" for number in range(1, 6)]
    assert await site.events(envelope.id) == events
    assert await site.events(envelope.id, events[2][0].encode()) == events[3:]


async def test_a_client_that_has_the_final_state_is_told_not_to_come_back(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    site.end(envelope.id, Result())
    [*_, last] = await site.events(envelope.id)
    answer = await site.ask(f"/-/futures/{envelope.id}/events", headers=[(b"last-event-id", last[0].encode())])
    assert answer.status == 204


# Its end, and another beginning.


async def test_who_knows_the_id_of_a_job_may_cancel_it(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    answer = await site.ask(f"/-/futures/{envelope.id}", method="DELETE", client=FAR)
    assert json.loads(answer.body) == {"id": envelope.id, "cancelled": True}
    assert (await site.state(envelope.id))["status"] == JobState.CANCELLED
    assert (await site.ask(f"/-/futures/{envelope.id}/result")).status == 499


async def test_a_job_that_has_ended_cannot_be_cancelled(site: JobSite) -> None:
    envelope, _ = await site.submitted()
    site.end(envelope.id, Result())
    answer = await site.ask(f"/-/futures/{envelope.id}", method="DELETE")
    assert json.loads(answer.body) == {"id": envelope.id, "cancelled": False}


async def test_a_pipeline_that_is_cancelled_once_more_ends_the_stage_that_the_first_time_left(site: JobSite) -> None:
    logged: list[bytes] = []
    listening = [asyncio.create_task(work) for work in (site.heard.listen(), site.store.read_log(site.keys.cancelled, logged.extend))]
    whole = mint_id()
    site.store.jobs.add_then(whole, JobFacts("", "p", stages=("one", "two")), lambda outcome: None)
    stage = (await site.state(whole))["stages"][0]["id"]
    await site.begun(stage)
    site.end(whole, CANCELLED)  # and then the store was away
    await site.store.append_log(site.keys.cancelled, notice_of_request(whole))
    await until(lambda: site.heard.has(whole))
    for _ in range(2):
        answer = await site.ask(f"/-/futures/{whole}", method="DELETE")
        assert json.loads(answer.body) == {"id": whole, "cancelled": True}
        await until(lambda: site.heard.has(stage))
    assert [one["status"] for one in (await site.state(whole))["stages"] if "status" in one] == ["cancelled"]
    assert logged == [notice_of_request(whole), notice_of_request(stage)]
    for task in listening:
        task.cancel()


async def test_a_job_that_has_ended_is_sent_again_under_another_id(site: JobSite) -> None:
    envelope, _ = await site.submitted(method="POST", body=[b"data"])
    path = f"/-/futures/{envelope.id}/retry"
    assert (await site.ask(path, method="POST")).status == 409
    site.end(envelope.id, FAILED)
    answer = await site.ask(path, method="POST", client=FAR)
    view = json.loads(answer.body)
    assert (answer.status, view["retry_of"], answer.headers["location"]) == (202, envelope.id, f"/-/futures/{view['id']}")
    await site.jobs.hold(2)
    again = site.jobs.held[1].envelope()
    assert (again.id, again.body) == (view["id"], b"data")
    assert (await site.state(again.id))["retry_of"] == envelope.id


# Where the paths stand.


async def test_the_paths_stand_at_the_setting_too_and_links_follow_it(site: JobSite) -> None:
    site.app.futures.move("/jobs")
    envelope, answer = await site.submitted()
    assert answer.headers["location"] == f"/jobs/{envelope.id}"
    for root in ("/jobs", "/-/futures"):
        view = json.loads((await site.ask(f"{root}/{envelope.id}")).body)
        assert view["result_url"] == f"/jobs/{envelope.id}/result"
    page = [(b"host", b"here"), (b"origin", b"https://elsewhere")]
    assert (await site.ask(f"/jobs/{envelope.id}", headers=page)).status == 200
    assert (await site.ask(f"/-/futures/{envelope.id}", headers=page)).status == 403
    assert (await site.ask("/jobs", raw_path=b"/jobs")).status == 404


@pytest.mark.parametrize(
    ("peer", "told", "prefix"),
    [
        ("10.0.0.1", b"/api/v1/", "/api/v1"),
        ("192.0.2.1", b"/api", ""),
        ("10.0.0.1", b"//evil.example", ""),
        ("10.0.0.1", b"https://evil.example", ""),
        ("10.0.0.1", b"/a\r\nb", ""),
        ("10.0.0.1", b"/", ""),
    ],
)
def test_a_prefix_counts_from_a_trusted_server_and_if_it_is_a_path(peer: str, told: bytes, prefix: str) -> None:
    assert forwarders("10.0.0.1").prefix([(b"x-forwarded-prefix", told)], (peer, 1)) == prefix


async def test_links_begin_with_the_prefix_that_a_trusted_server_says(site: JobSite) -> None:
    envelope, answer = await site.submitted(**{"mqserve.prefix": "/api"})
    assert answer.headers["location"] == f"/api/-/futures/{envelope.id}"
