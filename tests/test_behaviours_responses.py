"""What a handler returns is what arrives: Starlette's responses with all they do, and no more headers than they have. In both forms."""

import asyncio
import http.client
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally


class Teapot(Response):
    """A response of the user's own, which says what it says in its `__call__` alone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-method", scope["method"].encode())]})
        for part in (b"short ", b"and ", b"stout"):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


def plainly(make: Any) -> Any:
    return lambda request: make()


def later(make: Any) -> Any:
    async def handler(request: Any) -> Any:
        return make()

    return handler


def in_a_batch(make: Any) -> Any:
    @serve.accept_batch
    def handler(requests: list[Any]) -> list[Any]:
        return [make() for _ in requests]

    return handler


def in_an_async_batch(make: Any) -> Any:
    @serve.accept_batch
    async def handler(requests: list[Any]) -> list[Any]:
        return [make() for _ in requests]

    return handler


KINDS = [plainly, later, in_a_batch, in_an_async_batch]


# Responses as the ASGI apps they are.


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_arrives_with_its_type_and_name(deploy: Deploy, tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"\x89PNG-bytes")
    response = httpx.get(deploy.at(kind(lambda: FileResponse(str(path), filename="cat.png"))))
    assert (response.status_code, response.content, response.headers["content-type"]) == (200, b"\x89PNG-bytes", "image/png")
    assert response.headers["content-disposition"] == 'attachment; filename="cat.png"'


def test_a_part_of_a_file_is_had_by_range_and_its_length_by_head(deploy: Deploy, tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("0123456789")
    url = deploy.at(lambda request: FileResponse(str(path)))
    part = httpx.get(url, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.text, part.headers["content-range"]) == (206, "234", "bytes 2-4/10")
    head = httpx.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")


def test_a_file_that_is_not_there_is_a_500(deploy: Deploy) -> None:
    assert httpx.get(deploy.at(lambda request: FileResponse("/nowhere/at/all"))).status_code == 500


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_of_the_users_own_says_what_its_call_says(deploy: Deploy, kind: Any) -> None:
    response = httpx.get(deploy.at(kind(Teapot)))
    assert (response.status_code, response.text, response.headers["x-method"]) == (418, "short and stout", "GET")
    assert "content-type" not in response.headers


def test_a_handle_gets_the_response_whole(client: serve.Client, deploy: Deploy) -> None:
    response = client.get_handle(deploy(lambda request: Teapot())).remote().result(30)
    assert (response.status_code, response.body, response.headers["x-method"]) == (418, b"short and stout", "GET")


def test_a_response_that_ends_too_early_is_a_500(deploy: Deploy) -> None:
    class Silent(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    assert httpx.get(deploy.at(lambda request: Silent())).status_code == 500


def test_a_stream_that_fails_before_its_first_part_is_a_500_and_after_it_no_whole_answer(deploy: Deploy) -> None:
    def parts(fail: str) -> Iterator[str]:
        if fail == "first":
            raise SystemExit("none at all")
        yield "one"
        if fail == "second":
            raise SystemExit("no more")
        yield "two"

    url = deploy.at(lambda request: StreamingResponse(parts(request.query_params.get("fail", ""))))
    assert httpx.get(url, params={"fail": "first"}).status_code == 500
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url, params={"fail": "second"})
    assert httpx.get(url).text == "onetwo"


def test_a_stream_without_end_goes_on_until_its_reader_leaves(deploy: Deploy, tmp_path: Path) -> None:
    ended = Tally(tmp_path)

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * (4 * 1024 * 1024)
        finally:
            ended.note("ended")

    with httpx.stream("GET", deploy.at(lambda request: StreamingResponse(endless())), timeout=30) as response:
        size = 0
        for part in response.iter_raw():
            size += len(part)
            if size > 80 * 1024 * 1024:  # more than an answer in one piece may have
                break
    wait_until(lambda: ended.lines == ["ended"])


def test_a_stream_whose_first_part_is_late_is_cut_at_its_deadline(deploy: Deploy, tmp_path: Path) -> None:
    ended = Tally(tmp_path)

    async def late() -> AsyncIterator[bytes]:
        try:
            await asyncio.sleep(60)
            yield b"x"
        finally:
            ended.note("ended")

    assert httpx.get(deploy.at(lambda request: StreamingResponse(late()), request_timeout_s=0.5)).status_code == 504
    wait_until(lambda: ended.lines == ["ended"])


def test_while_one_response_is_made_the_next_request_runs(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def parts() -> AsyncIterator[str]:
        await gate.pass_through_async()
        yield "late"

    def handler(request: serve.Request) -> Any:
        return StreamingResponse(parts()) if "wait" in request.query_params else "at once"

    url = deploy.at(handler, max_concurrent_queries=2, sync_threads=2)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(httpx.get, url, params={"wait": "1"})
        wait_until(lambda: gate.came == 1)
        assert httpx.get(url).text == "at once"
        gate.open()
        assert waiting.result(30).text == "late"


# Background tasks.


@pytest.mark.parametrize("kind", KINDS)
def test_a_background_task_runs_after_the_answer(deploy: Deploy, tmp_path: Path, kind: Any) -> None:
    gate, done = Gate(tmp_path), Tally(tmp_path)

    def work(what: str) -> None:
        gate.pass_through()
        done.note(what)

    async def work_later(what: str) -> None:
        done.note(what)

    def make() -> Response:
        tasks = BackgroundTasks([BackgroundTask(work, "first"), BackgroundTask(work_later, "second")])
        return JSONResponse({"ok": True}, background=tasks)

    assert httpx.get(deploy.at(kind(make))).json() == {"ok": True}  # though its work waits at the gate
    assert not done.lines
    gate.open()
    wait_until(lambda: done.lines == ["first", "second"])


def test_a_background_task_that_fails_costs_nothing_but_itself(deploy: Deploy, tmp_path: Path) -> None:
    tried = Tally(tmp_path)

    def fail() -> None:
        tried.note("tried")
        raise SystemExit("in the background")

    url = deploy.at(lambda request: PlainTextResponse("fine", background=BackgroundTask(fail)))
    assert [httpx.get(url).text for _ in range(3)] == ["fine"] * 3
    wait_until(lambda: tried.lines == ["tried"] * 3)


def test_a_replica_that_drains_finishes_its_background_tasks(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate, done = Gate(tmp_path), Tally(tmp_path)

    def work() -> None:
        gate.pass_through()
        done.note("done")

    url, name = deploy.named(lambda request: PlainTextResponse("old", background=BackgroundTask(work)))
    assert httpx.get(url).text == "old"
    wait_until(lambda: gate.came == 1)
    client.update_backend(name, lambda request: "new")
    gate.open()
    wait_until(lambda: done.lines == ["done"])
    assert httpx.get(url).text == "new"


# Headers.


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda: Response(status_code=304, headers={"etag": '"a"'}), 304),
        (lambda: Response(status_code=204), 204),
        (lambda: Response(status_code=205), 205),
        (lambda: RedirectResponse("/elsewhere", 303), 303),
        (lambda: Response(b"bytes of no kind"), 200),
    ],
)
def test_no_content_type_is_invented(deploy: Deploy, make: Any, status: int) -> None:
    url = urlsplit(deploy.at(lambda request: make()))
    with closing(http.client.HTTPConnection(url.netloc, timeout=30)) as connection:
        connection.request("GET", url.path)
        response = connection.getresponse()
        assert (response.status, response.getheader("content-type")) == (status, None)


def test_a_content_type_of_the_handlers_own_stays(deploy: Deploy) -> None:
    response = httpx.get(deploy.at(lambda request: Response("a,b", media_type="text/csv")))
    assert response.headers["content-type"] == "text/csv; charset=utf-8"


def test_headers_without_end_are_an_error_that_says_so(deploy: Deploy) -> None:
    def handler(request: Any) -> Response:
        response = Response(b"")
        response.raw_headers += [(b"x-many", b"y" * 1000)] * 100
        return response

    response = httpx.get(deploy.at(handler))
    assert response.status_code == 500 and "bytes of headers" in response.json()["detail"]


def test_a_bytearray_is_a_body_as_bytes_are(deploy: Deploy) -> None:
    assert httpx.get(deploy.at(lambda request: bytearray(b"\xff\x00"))).content == b"\xff\x00"
