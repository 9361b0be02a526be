"""What the soak serves: every run marks its number in a tally, and answers with a word that no other run says."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

import mqserve as serve
from tests.tallies import Tally

REQUEST_TIMEOUT_S = 15.0
BIG_BYTES = 200_000
STEPS = 40  # of an answer that flows
STEP_S = 0.025
GOODBYE = "goodbye"  # of a session, which its app then closes
ENDED = 4000  # with this code
PROBE = 0  # the number of requests that only ask whether anybody answers: they are in no tally
TRIES = 3  # of the jobs that are tried again; the last one succeeds
PASSES = 2  # stages of a pipeline before its last one
FIRINGS_FROM = 1_000_000_000  # the number of a firing is its time, in seconds since 1970, and no other number is as high


class Refused(Exception):
    """What one of the backends raises, always."""


class NotYet(Exception):
    """What one of the backends raises in all tries of a job but the last."""


class Backend(NamedTuple):
    target: Any
    replicas: int
    route: str
    config: dict[str, Any]


class Quick:
    """Plain code, 5 ms."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __call__(self, request: Any) -> dict[str, Any]:
        number, word = begin(request, self._tally)
        time.sleep(0.005)
        return answer(number, word)


class Patient:
    """Async code that waits for 50 ms."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Any) -> dict[str, Any]:
        number, word = begin(request, self._tally)
        await asyncio.sleep(0.05)
        return answer(number, word)


class Batched:
    """Up to eight at a time."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    @serve.accept_batch
    def __call__(self, requests: list[Any]) -> list[dict[str, Any]]:
        begun = [begin(request, self._tally) for request in requests]
        time.sleep(0.005)
        return [answer(number, word) for number, word in begun]


class Raising:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __call__(self, request: Any) -> None:
        number, word = begin(request, self._tally)
        raise Refused(f"{number} {word}")


class Big:
    """Bodies that neither ride in an inbox entry nor fit one frame."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __call__(self, request: Any) -> dict[str, Any]:
        number, word = begin(request, self._tally)
        return {**answer(number, word), "fill": request.data["fill"]}


class Flowing:
    """Streams a second of numbered steps."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        number, word = begin(request, self._tally)
        for step in steps_of(number):
            yield {**answer(number, word), "step": step}
            await asyncio.sleep(STEP_S)


class Replayed:
    """Plain code that streams, and is replayed when its replica dies: so every reader gets all of it, by the words of several runs."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __call__(self, request: Any) -> Iterator[dict[str, Any]]:
        number, word = begin(request, self._tally)
        for step in steps_of(number):
            yield {**answer(number, word), "step": step}
            time.sleep(0.005)


class Talking:
    """An ASGI app: a session of it says the word of its run, and then what it hears."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            with suppress(WebSocketDisconnect):
                await self._talk(WebSocket(scope, receive, send))
        elif scope["type"] == "http":
            await PlainTextResponse("talk to me")(scope, receive, send)

    async def _talk(self, socket: WebSocket) -> None:
        word = begin_run(int(socket.url.path.rpartition("/")[2]), self._tally)
        await socket.accept()
        await socket.send_text(word)
        while (said := await socket.receive_text()) != GOODBYE:
            await socket.send_text(said)
        await socket.close(ENDED)


class Retried:
    """Async code that needs several tries for a job. The ones that failed are in no tally, since each job has them."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Any) -> dict[str, Any]:
        if request.attempt < TRIES and request.data["number"] != PROBE:
            raise NotYet(f"{request.data['number']}")
        number, word = begin(request, self._tally)
        return answer(number, word)


class Passing:
    """A stage of a pipeline, which notes nothing: it says how often the request has come by."""

    def __init__(self, tally: Tally) -> None:
        pass

    async def __call__(self, request: Any) -> dict[str, Any]:
        return {"number": request.data["number"], "passed": request.data.get("passed", 0) + 1}


class Arriving:
    """The last stage, which finds that the others were there."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Any) -> dict[str, Any]:
        number, word = begin(request, self._tally)
        if number != PROBE and request.data.get("passed") != PASSES:
            raise ValueError(f"{number} has passed {request.data.get('passed', 0)} stages")
        return answer(number, word)


class Ticking:
    """What a schedule calls, once a second."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def __call__(self, request: Any) -> dict[str, Any]:
        at = request.headers.get("x-scheduled-for")
        number = int(datetime.fromisoformat(at).timestamp()) if at else PROBE
        return answer(number, begin_run(number, self._tally))


BACKENDS = {
    "quick": Backend(Quick, 3, "/quick/{number:int}", {}),
    "patient": Backend(Patient, 2, "/patient/{number:int}", {}),
    "batched": Backend(Batched, 2, "/batched", {"max_batch_size": 8, "batch_wait_timeout": 0.01}),
    "raising": Backend(Raising, 2, "/raising", {}),
    "big": Backend(Big, 2, "/big", {}),
    "flowing": Backend(Flowing, 2, "/flowing/{number:int}", {}),
    "replayed": Backend(Replayed, 2, "/replayed/{number:int}", {"on_death": "replay"}),
    "talking": Backend(Talking, 2, "/talking", {}),
    "retried": Backend(Retried, 2, "/retried", {"retry": serve.Retry(attempts=5, on=(NotYet,), backoff_s=0.5, factor=1)}),
    "passing": Backend(Passing, 2, "/passing", {}),
    "arriving": Backend(Arriving, 1, "/arriving", {}),
    "ticking": Backend(Ticking, 1, "/ticking", {}),
}
PIPELINES = {"piped": ["passing"] * PASSES + ["arriving"]}  # each with a route of its name
SCHEDULES = {"each-second": ("ticking", "* * * * * *")}  # endpoint and cron
REPLICAS = sum(backend.replicas for backend in BACKENDS.values())


def begin(request: Any, tally: Tally) -> tuple[int, str]:
    """The number of the request and the word of this run, in the tally before anything else happens."""
    number = request.path_params["number"] if "number" in request.path_params else request.data["number"]
    return number, begin_run(number, tally)


def begin_run(number: int, tally: Tally) -> str:
    word = os.urandom(6).hex()
    if number != PROBE:
        tally.note(f"{number} {os.getpid()} {word}")
    return word


def answer(number: int, word: str) -> dict[str, Any]:
    return {"number": number, "square": number * number, "word": word}


def steps_of(number: int) -> range:
    return range(1 if number == PROBE else STEPS)


def words_in_steps(number: int, steps: list[Any]) -> list[str]:
    """The word of each of these steps, which are the first ones of the answer. Raises ValueError if one is missing, doubled or wrong."""
    for step, value in enumerate(steps):
        if value != {**answer(number, value.get("word", "")), "step": step}:
            raise ValueError(f"{str(value)[:200]} is not step {step} of {number}")
    return [str(value["word"]) for value in steps]


def body_of(backend: str, number: int) -> dict[str, Any]:
    """What to send."""
    return {"number": number, "fill": "x" * BIG_BYTES} if backend == "big" else {"number": number}


def word_in(backend: str, number: int, value: Any) -> str:
    """The word of the run that gave this answer. Raises ValueError for what is no answer to this number."""
    if isinstance(value, list) and len(value) == STEPS and len(words := set(words_in_steps(number, value))) == 1:
        return words.pop()  # collected from a generator
    right = (
        {**answer(number, value["word"]), **({"fill": "x" * BIG_BYTES} if backend == "big" else {})} if isinstance(value, dict) else None
    )
    if value != right:
        raise ValueError(f"{str(value)[:200]} is no answer of {backend} to {number}")
    return str(value["word"])


def word_in_refusal(number: int, message: str) -> str:
    """The word of the run that raised. Raises ValueError for what is not about this number."""
    said, _, word = message.partition(" ")
    if said != str(number) or not word:
        raise ValueError(f"{message[:200]!r} is no refusal of {number}")
    return word
