"""Chords: one job gets the results of a whole group, once all its jobs have succeeded."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, wait_until


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


def tell(request: serve.ServeRequest) -> Any:
    return [request.data, dict(request.query_params), request.method, request.headers.get("x-mine"), request.attempt]


def make(request: serve.ServeRequest) -> Any:
    what = request.data
    if what == "fails":
        raise OSError("that fails")
    if what == "point":
        return Point(7)
    return {"bytes": b"\0\xff", "text": "é", "none": None, "large": "x" * 2_000_000, "huge": b"x" * 7_000_000}.get(
        what if isinstance(what, str) else "", what
    )


@pytest.fixture
def making(deploy: Deploy) -> serve.Handle:
    return serve.get_handle(deploy(make))


@pytest.fixture
def telling(deploy: Deploy) -> serve.Handle:
    return serve.get_handle(deploy(tell))


def test_one_job_gets_all_results_in_the_order_of_the_items(making: serve.Handle, telling: serve.Handle) -> None:
    group = serve.submit_many(making, range(50), then=telling)
    assert group.then is not None
    assert group.then.result(timeout=30) == [list(range(50)), {}, "GET", None, 1]
    again = serve.group(group.id).then
    assert again is not None and again.id == group.then.id and again.status().state is serve.JobState.SUCCEEDED
    assert group.results(timeout=30) == list(range(50))


def test_results_of_all_kinds_are_passed_on(deploy: Deploy, making: serve.Handle) -> None:
    def look(request: serve.ServeRequest) -> Any:
        point, raw, text, none, large, number = request.data
        return [point.x, raw, text, none, len(large), number]

    group = serve.submit_many(making, ["point", "bytes", "text", "none", "large", 1.5], then=serve.get_handle(deploy(look)))
    assert group.then is not None
    assert group.then.result(timeout=30) == [7, b"\0\xff", "é", None, 2_000_000, 1.5]


def test_the_job_that_waits_is_queued_and_has_the_options_of_its_handle(deploy: Deploy, gate: Gate, telling: serve.Handle) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()
        return request.data

    options: dict[str, Any] = {"tag": "sums", "priority": "high", "result_ttl_s": 3600, "expires_s": 600, "delay_s": 0.01}
    then = telling.options(http_method="POST", http_headers={"x-mine": "1"}, **options)
    group = serve.submit_many(serve.get_handle(deploy(wait)), [1, 2], then=then)
    assert group.then is not None
    wait_until(lambda: gate.came == 2)
    status = group.then.status()
    assert (status.state, status.backend, status.tag, status.priority) == (serve.JobState.QUEUED, "", "sums", "high")
    assert status.expires_at is not None and status.not_before is not None and status.position is None
    gate.open()
    assert group.then.result(timeout=30) == [[1, 2], {}, "POST", "1", 1]
    ended = group.then.status()
    assert ended.backend and (ended.tag, ended.priority, ended.created_at) == ("sums", "high", status.created_at)


def test_a_chord_whose_jobs_do_not_all_succeed_fails_and_names_the_first(making: serve.Handle, telling: serve.Handle) -> None:
    group = serve.submit_many(making, [1, "fails", 3, "fails", "fails", "fails"], then=telling)
    assert group.then is not None
    with pytest.raises(serve.MembersFailed) as caught:
        group.then.result(timeout=30)
    named = ", ".join(f"{group.jobs[number].id} (failed: OSError)" for number in (1, 3, 4))
    assert str(caught.value) == f"not all of the 6 jobs of its group have succeeded: 4 failed; {named} and others"
    assert group.then.status().state is serve.JobState.FAILED
    with pytest.raises(serve.ResultGone, match=r"was never sent, .* Send the group"):
        group.then.retry()


def test_a_group_that_is_cancelled_fails_its_chord(deploy: Deploy, gate: Gate, telling: serve.Handle) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()

    group = serve.submit_many(serve.get_handle(deploy(wait)), [1, 2], then=telling)
    assert group.then is not None and group.cancel() == 2
    with pytest.raises(serve.MembersFailed, match="2 cancelled"):
        group.then.result(timeout=30)


@pytest.mark.parametrize("by", ["python", "http"])
def test_a_job_that_is_not_begun_in_time_is_counted_and_fails_the_chord(
    client: serve.Client, deploy: Deploy, gate: Gate, telling: serve.Handle, by: str
) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()
        return request.data

    handle = serve.get_handle(deploy(wait, max_concurrent_queries=1))
    handle.submit("holds the place")
    wait_until(lambda: gate.came == 1)
    group = serve.submit_many(handle.options(expires_s=0.5), [1, 2], then=telling)
    url = f"{client.http_url()}/-/futures/{group.id}"
    wait_until(lambda: (httpx.get(url).json()["expired"] if by == "http" else group.status().expired) == 2, told=group.status)
    assert group.then is not None
    with pytest.raises(serve.MembersFailed, match="2 expired"):
        group.then.result(timeout=30)
    gate.open()


def test_a_chord_that_is_cancelled_is_not_sent(deploy: Deploy, gate: Gate, telling: serve.Handle) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()
        return request.data

    group = serve.submit_many(serve.get_handle(deploy(wait)), [1, 2], then=telling)
    assert group.then is not None and group.then.cancel() and not group.then.cancel()
    with pytest.raises(serve.Cancelled):
        group.then.result(timeout=30)
    gate.open()
    assert group.results(timeout=30) == [1, 2]
    status = group.then.status()
    assert (status.state, status.backend, status.attempts) == (serve.JobState.CANCELLED, "", 0)


def test_a_group_without_items_is_followed_at_once(making: serve.Handle, telling: serve.Handle) -> None:
    group = serve.submit_many(making, [], then=telling)
    assert group.then is not None and group.then.result(timeout=30) == [[], {}, "GET", None, 1]


def test_a_chord_is_sent_from_a_coroutine_and_retried(deploy: Deploy, making: serve.Handle) -> None:
    def add(request: serve.ServeRequest) -> int:
        point, number = request.data
        return int(point.x + number)

    adding = deploy(add)

    async def main() -> serve.Job:
        then = serve.get_handle(adding, sync=False)
        group = await serve.submit_many(serve.get_handle(making._endpoint, sync=False), ["point", 2], then=then)
        assert group.then is not None and await group.then == 9
        return group.then

    job = asyncio.run(main())
    again = job.retry()
    assert again.result(timeout=30) == 9 and again.status().retry_of == job.id


def test_a_member_that_succeeds_at_its_second_attempt_counts_as_one(deploy: Deploy, telling: serve.Handle) -> None:
    def fail_first(request: serve.ServeRequest) -> Any:
        if request.attempt == 1:
            raise OSError("once")
        return request.data

    handle = serve.get_handle(deploy(fail_first, retry=serve.Retry(attempts=3, on=(OSError,), backoff_s=0.01)))
    group = serve.submit_many(handle, [1, 2], then=telling)
    assert group.then is not None and group.then.result(timeout=60)[0] == [1, 2]
    assert group.status() == serve.GroupStatus(2, 0, 2, 0, 0, 0)


def test_a_result_that_is_gone_fails_the_chord(deploy: Deploy, gate: Gate, making: serve.Handle, telling: serve.Handle) -> None:
    async def wait_for_second(request: serve.ServeRequest) -> Any:
        if request.data:
            await gate.pass_through_async()
        return request.data

    group = serve.submit_many(serve.get_handle(deploy(wait_for_second)).options(result_ttl_s=1), [0, 1], then=telling)
    wait_until(lambda: group.jobs[0].status().state is serve.JobState.SUCCEEDED and not group.jobs[0].status().has_result)
    gate.open()
    assert group.then is not None
    with pytest.raises(serve.MembersFailed, match=f"the result of job {group.jobs[0].id} of its group is not kept any more"):
        group.then.result(timeout=30)


def test_an_endpoint_that_is_gone_fails_the_chord(deploy: Deploy, gate: Gate) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()

    backend = deploy(tell)
    name = f"{backend}-too"
    serve.create_endpoint(name, backend=backend)
    group = serve.submit_many(serve.get_handle(deploy(wait)), [1], then=serve.get_handle(name))
    serve.delete_endpoint(name)
    gate.open()
    assert group.then is not None
    with pytest.raises(serve.BackendGone, match=f"endpoint '{name}' was deleted"):
        group.then.result(timeout=30)


def test_a_group_that_is_not_sent_to_its_end_fails_its_chord(making: serve.Handle, telling: serve.Handle) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise ValueError("it does not pickle")

    with pytest.raises(serve.NotEncodable) as caught:
        serve.submit_many(making, [*range(300), Odd()], then=telling.options(tag="half"))
    found = re.search("200 of the 301 jobs of group ([0-9a-f]+)", "".join(caught.value.__notes__))
    assert found
    group = serve.group(found[1])
    assert group.then is not None and group.then.status().tag == "half"
    with pytest.raises(serve.MembersFailed, match="200 of the 301 jobs of its group were sent, and then: NotEncodable"):
        group.then.result(timeout=30)
    wait_until(lambda: group.status().succeeded == 200)
    assert group.status().pending == 101
    assert group.cancel() == 0, "all that were sent have ended"


def test_what_cannot_be_a_chord_is_refused(making: serve.Handle, telling: serve.Handle) -> None:
    with pytest.raises(serve.BadType, match="then="):
        serve.submit_many(making, [1], then="an endpoint")  # type: ignore[call-overload]
    with pytest.raises(serve.BadValue, match="idempotency_key"):
        serve.submit_many(making, [1], then=telling.options(idempotency_key="k"))
    with pytest.raises(serve.BadValue, match="MQSERVE_CALLBACK_HOSTS"):
        serve.submit_many(making, [1], then=telling.options(callback_url="https://nobody.example/"))
    with pytest.raises(serve.UnknownEndpoint):
        serve.submit_many(making, [1], then=serve.get_handle("nothing-here"))


def test_results_that_no_job_can_carry_fail_the_chord(making: serve.Handle, telling: serve.Handle) -> None:
    group = serve.submit_many(making, ["huge"] * 10, then=telling)
    assert group.then is not None
    with pytest.raises(serve.MembersFailed, match="the results of the 10 jobs of its group have more than 67108864 bytes together"):
        group.then.result(timeout=60)


def test_pipelines_are_members_of_groups_and_follow_them(client: serve.Client, making: serve.Handle, telling: serve.Handle) -> None:
    name = f"{making._endpoint}-p"
    client.create_pipeline(name, [making._endpoint, telling._endpoint])
    try:
        handle = serve.get_handle(name)
        group = serve.submit_many(handle, [1, 2], then=handle.options(tag="whole"))
        assert group.then is not None and group.then.status().state is serve.JobState.QUEUED
        each: list[Any] = [[number, {}, "GET", None, 1] for number in (1, 2)]
        assert group.then.result(timeout=60) == [each, {}, "GET", None, 1]
        assert group.status() == serve.GroupStatus(2, 0, 2, 0, 0, 0)
        status = group.then.status()
        assert (status.state, status.tag, [stage.state for stage in status.stages]) == ("succeeded", "whole", ["succeeded"] * 2)
        failed = serve.submit_many(handle, [1, "fails"], then=handle)
        assert failed.then is not None
        with pytest.raises(serve.MembersFailed, match="1 failed"):
            failed.then.result(timeout=60)
    finally:
        client.delete_pipeline(name)


def test_a_group_has_its_counts_under_its_id_by_http(client: serve.Client, making: serve.Handle, telling: serve.Handle) -> None:
    group = serve.submit_many(making, [1, "fails"], then=telling)
    wait_until(group.done)
    url = f"{client.http_url()}/-/futures/{group.id}"
    found = httpx.get(url)
    assert found.status_code == 200 and found.headers["cache-control"] == "no-store"
    counts = {name: value for name, value in found.json().items() if isinstance(value, int)}
    assert counts == {"total": 2, "pending": 0, "succeeded": 1, "failed": 1, "cancelled": 0, "expired": 0}
    assert found.json()["endpoint"] == making._endpoint
    assert group.then is not None
    wait_until(lambda: group.then is not None and group.then.done())
    then = httpx.get(client.http_url() + found.json()["then_url"]).json()
    assert (then["id"], then["status"], then["error"]["type"], then["error"]["status"]) == (
        group.then.id, "failed", "mqserve.MembersFailed", 424,
    )  # fmt: skip
    for method, part in ("GET", "result"), ("GET", "events"), ("POST", "retry"):
        answer = httpx.request(method, f"{url}/{part}")
        assert answer.status_code == 404 and "the id of a group" in answer.json()["detail"]
    assert httpx.delete(url).json() == {"id": group.id, "cancelled": False, "jobs": 0}
    assert httpx.get(url).json() == found.json(), "nothing was written there"


def test_a_group_is_cancelled_by_its_id_over_http(client: serve.Client, deploy: Deploy, gate: Gate, telling: serve.Handle) -> None:
    async def wait(request: serve.ServeRequest) -> Any:
        await gate.pass_through_async()

    group = serve.submit_many(serve.get_handle(deploy(wait)), range(4), then=telling)
    url = f"{client.http_url()}/-/futures/{group.id}"
    assert httpx.delete(url).json() == {"id": group.id, "cancelled": True, "jobs": 4}
    assert httpx.delete(url).json() == {"id": group.id, "cancelled": False, "jobs": 0}
    assert httpx.get(url).json()["cancelled"] == 4 and group.status().cancelled == 4
    assert group.then is not None
    with pytest.raises(serve.MembersFailed, match="4 cancelled"):
        group.then.result(timeout=60)
