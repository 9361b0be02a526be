"""The soak's own client, a process of its own: deploys the backends, calls them by handle, as jobs too, shuts the instance down.

Reads commands from its input, one per line: `load RATE SECONDS SEED`, `shutdown`. Writes one JSON object per line, of what it did.
"""

import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mqserve as serve
from mqserve.broker.errors import (
    BrokerUnavailable,
    MQServeError,
    NoReplica,
    NotRouted,
    Overloaded,
    RequestTimeout,
    StoreUnavailable,
    UnknownJob,
)
from tests.faults.soak.backends import BACKENDS, PIPELINES, REQUEST_TIMEOUT_S, SCHEDULES
from tests.faults.soak.ledger import JOB_S, End
from tests.tallies import Tally

FIRST_NUMBER = 1_000_000  # the numbers below are the soak's
GRACE_S = 10.0
WAITERS = 400
JOBS_SHARE = 0.3
JOB_BACKENDS = ("quick", "patient", "raising", "retried", *PIPELINES)
NOT_CALLED = ("big", "talking", "retried", "ticking", "passing", "arriving")
UNAVAILABLE = (BrokerUnavailable, StoreUnavailable, NoReplica, NotRouted)

_printing = threading.Lock()


def main() -> None:
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # it logs each lost connection as an error, with a traceback
    client = serve.connect()
    tally = Tally(Path(sys.argv[1]))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda name: deploy(client, name, tally), BACKENDS))
    for name, stages in PIPELINES.items():
        client.create_pipeline(name, stages, route=f"/{name}")
    say(event="deployed", tally=str(tally.path))
    for line in sys.stdin:
        match line.split():
            case ["load", rate, seconds, seed]:
                load(client, float(rate), float(seconds), int(seed))
                say(event="loaded")
            case ["shutdown"]:
                client.shutdown()
                say(event="down")
                return


def deploy(client: serve.Client, name: str, tally: Tally) -> None:
    backend = BACKENDS[name]
    client.create_backend(
        name, backend.target, tally, config={"num_replicas": backend.replicas, "request_timeout_s": REQUEST_TIMEOUT_S, **backend.config}
    )
    client.create_endpoint(name, backend=name, route=backend.route, methods=("GET", "POST"))


def load(client: serve.Client, rate: float, seconds: float, seed: int) -> None:
    chance = random.Random(seed)
    names = [name for name in BACKENDS if name not in NOT_CALLED]
    handles = {name: client.get_handle(name) for name in (*names, *JOB_BACKENDS)}
    for name, (endpoint, cron) in SCHEDULES.items():
        client.schedule(name, endpoint, cron=cron)
    until, due, number = time.monotonic() + seconds, time.monotonic(), FIRST_NUMBER
    with ThreadPoolExecutor(WAITERS) as waiters:
        while (due := due + chance.expovariate(rate)) < until:
            time.sleep(max(0, due - time.monotonic()))
            number += 1
            if chance.random() < JOBS_SHARE:
                name = chance.choice(JOB_BACKENDS)
                waiters.submit(send_job, handles[name], name, number)
                continue
            name = chance.choice(names)
            sent = time.monotonic()
            future = handles[name].remote({"number": number})
            say(event="sent", kind="handle", number=number, backend=name, at=sent, key=future.id)
            if chance.random() < 0.25:
                future = client.future(future.id)  # as another part of the program would read it
            waiters.submit(wait_for, future, number, sent)
    for name in SCHEDULES:
        until_done(partial(client.delete_schedule, name))


def wait_for(future: serve.Future, number: int, sent: float) -> None:
    end, detail, value = End.ANSWERED, "", None
    try:
        value = future.result(max(0.0, sent + REQUEST_TIMEOUT_S + GRACE_S - time.monotonic()))
    except RequestTimeout:
        end, detail = End.EXPIRED, "504"
    except Overloaded:
        end, detail = End.FAILED, "429"
    except UNAVAILABLE:
        end, detail = End.FAILED, "503"
    except TimeoutError:
        end = End.HANGING
    except MQServeError as error:
        end, detail = End.FAILED, repr(error)
    except Exception as error:  # by name: the code went by value, and so is another class
        if type(error).__name__ == "Refused":
            end, value = End.USER_ERROR, str(error)
        else:
            end, detail = End.FAILED, repr(error)
    say(event="end", number=number, end=end, detail=detail, value=value, at=time.monotonic())


def send_job(handle: serve.Handle, backend: str, number: int) -> None:
    """Sends a job and waits for it. One that has not ended in time is left open: that is judged with the rest."""
    sent = time.monotonic()
    try:
        job = handle.submit({"number": number})
    except UNAVAILABLE:
        say(event="sent", kind="submit", number=number, backend=backend, at=sent, key="")
        return say(event="end", number=number, end=End.FAILED, detail="503", value=None, at=time.monotonic())
    say(event="sent", kind="submit", number=number, backend=backend, at=sent, key=job.id)
    until = sent + JOB_S
    while (left_s := until - time.monotonic()) > 0:
        end, detail, value = End.ANSWERED, "", None
        try:
            value = job.result(left_s)
        except TimeoutError:
            return None
        except (*UNAVAILABLE, UnknownJob):  # the store is away, or has lost it
            time.sleep(0.5)
            continue
        except Exception as error:
            end, value = (End.USER_ERROR, str(error)) if type(error).__name__ == "Refused" else (End.FAILED, None)
            detail = "" if end is End.USER_ERROR else repr(error)
        return say(event="end", number=number, end=end, detail=detail, value=value, at=time.monotonic())


def until_done(act: Callable[[], object]) -> None:
    """Again and again where a server is away."""
    while True:
        try:
            act()
            return
        except UNAVAILABLE:
            time.sleep(0.5)


def say(**what: Any) -> None:
    with _printing:
        print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
