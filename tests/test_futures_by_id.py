"""`serve.future(id)`, in both forms: it asks when it is asked, and waits only while somebody does."""

import asyncio
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until


@pytest.fixture
def held(deploy: Deploy, gate: Gate) -> str:
    """The endpoint of a handler that waits for the gate."""

    def hold(request: serve.ServeRequest) -> str:
        gate.pass_through()
        return "passed"

    return deploy(hold)


def test_it_is_done_once_there_is_a_result_and_asks_anew_each_time(held: str, gate: Gate) -> None:
    sent = serve.get_handle(held).remote()
    ref = serve.future(sent.id)
    assert not ref.done() and not ref.done()
    gate.open()
    assert wait_until(ref.done)
    assert ref.result(timeout=0) == "passed" == serve.future(sent.id).result(timeout=0)


def test_it_is_done_once_the_handler_has_raised(deploy: Deploy) -> None:
    def fail(request: serve.ServeRequest) -> None:
        raise LookupError("nothing here")

    ref = serve.future(serve.get_handle(deploy(fail)).remote().id)
    assert wait_until(ref.done)
    with pytest.raises(LookupError, match="nothing here"):
        ref.result(timeout=0)


def test_an_id_that_nobody_sent_is_not_done(client: serve.Client) -> None:
    ref = client.future(uuid.uuid4().hex)
    assert not ref.done()
    with pytest.raises(TimeoutError, match="no result yet after 0 s"):
        ref.result(timeout=0)
    assert serve.wait([ref], timeout=0) == ([], [ref])


def test_a_wait_that_ended_without_a_result_is_taken_up_again(held: str, gate: Gate) -> None:
    ref = serve.future(serve.get_handle(held).remote().id)
    with pytest.raises(TimeoutError, match="no result yet"):
        ref.result(timeout=0.05)
    assert serve.wait([ref], timeout=0.05) == ([], [ref])
    gate.open()
    assert ref.result(timeout=30) == "passed"


def test_results_that_are_there_are_found_without_waiting(held: str, gate: Gate) -> None:
    gate.open()
    handle = serve.get_handle(held)
    sent = [handle.remote() for _ in range(3)]
    serve.get(sent, timeout=30)
    refs = [serve.future(ref.id) for ref in sent]
    assert serve.wait(refs, num_returns=3.0, timeout=0) == (refs, [])  # type: ignore[arg-type]
    assert serve.get(refs, timeout=0) == ["passed"] * 3


def test_it_is_awaited_by_several_and_waited_for_by_threads(held: str, gate: Gate) -> None:
    ref = serve.future(serve.get_handle(held).remote().id)

    async def wait() -> list[str]:
        threads = [asyncio.to_thread(ref.result, 30) for _ in range(2)]
        waits = asyncio.gather(ref, ref, *threads)
        given_up = asyncio.ensure_future(_awaited(ref))
        await asyncio.sleep(0)
        given_up.cancel()
        gate.open()
        return await waits

    assert asyncio.run(wait()) == ["passed"] * 4


async def _awaited(ref: serve.Future) -> object:
    return await ref


def test_a_cancelled_one_says_so_to_all_who_wait(held: str, gate: Gate) -> None:
    sent = serve.get_handle(held).remote()
    ref = serve.future(sent.id)
    said = list[object]()

    def wait() -> None:
        try:
            said.append(ref.result(timeout=30))
        except serve.MQServeError as error:
            said.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: gate.came == 1)
    assert ref.cancel() and ref.done()
    waiting.join(30)
    gate.open()
    assert "cancelled" in str(said)
    for each in (ref, sent):
        with pytest.raises(serve.MQServeError, match="cancelled"):
            each.result(timeout=30)


def test_one_that_has_its_result_is_not_cancelled(held: str, gate: Gate) -> None:
    gate.open()
    sent = serve.get_handle(held).remote()
    assert sent.result(timeout=30) == "passed"
    assert not serve.future(sent.id).cancel()
    assert serve.future(sent.id).result(timeout=0) == "passed"


def test_a_handler_asks_for_another_requests_end(deploy: Deploy, held: str, gate: Gate) -> None:
    def ask(request: serve.ServeRequest) -> bool:
        return serve.future(request.data).done()

    asking = serve.get_handle(deploy(ask))
    sent = serve.get_handle(held).remote()
    assert asking.remote(sent.id).result(timeout=30) is False
    gate.open()
    sent.result(timeout=30)
    assert asking.remote(sent.id).result(timeout=30) is True


@pytest.mark.parametrize("number", [1.5, 0, 3, "2", True, None])
def test_a_number_of_returns_that_is_none_is_refused(client: serve.Client, number: object) -> None:
    refs = [client.future(uuid.uuid4().hex) for _ in range(2)]
    with pytest.raises(serve.MQServeError, match="num_returns must be a whole number between 1 and that of the futures"):
        serve.wait(refs, num_returns=number, timeout=0)  # type: ignore[arg-type]


ASK = """
import sys, mqserve as serve
print([serve.future(future_id).done() for future_id in sys.argv[1:]])
"""


@distributed_only
def test_another_process_knows_what_is_done(held: str, gate: Gate, environment: dict[str, str]) -> None:
    gate.open()
    sent = serve.get_handle(held).remote()
    sent.result(timeout=30)
    command = [sys.executable, "-c", ASK, sent.id, uuid.uuid4().hex]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60).stdout == "[True, False]\n"


@distributed_only
def test_each_question_is_one_read_and_nothing_goes_on_asking(client: serve.Client, store_url: str) -> None:
    ref = client.future(uuid.uuid4().hex)
    with asked(store_url, ref.id) as (commands, beats):
        assert [ref.done() for _ in range(3)] == [False] * 3
        with pytest.raises(TimeoutError):
            ref.result(timeout=0)
        assert wait_until(lambda: len(commands) == 4), commands
        with pytest.raises(TimeoutError):
            ref.result(timeout=0.3)
        before = len(beats)
        wait_until(lambda: len(beats) > before)  # what was still under way has come by then
        so_far, before = len(commands), len(beats)
        assert so_far > 4
        wait_until(lambda: len(beats) >= before + 2)
        assert len(commands) == so_far


@contextmanager
def asked(store_url: str, future_id: str) -> Iterator[tuple[list[str], list[str]]]:
    """What Redis is told meanwhile: the commands that name this id, and the members' beats."""
    commands, beats = list[str](), list[str]()
    with redis.Redis.from_url(store_url) as listening, listening.monitor() as monitor:

        def listen() -> None:
            for told in monitor.listen():
                if future_id in told["command"]:
                    commands.append(told["command"])
                elif ":beats" in told["command"]:
                    beats.append(told["command"])
                elif "the end of this test" in told["command"]:
                    return

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield commands, beats
        finally:
            with redis.Redis.from_url(store_url) as client:
                client.echo("the end of this test")
            listener.join(30)
