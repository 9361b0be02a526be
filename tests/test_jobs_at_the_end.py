"""What becomes of those who wait for a job when the instance ends."""

import threading
from collections.abc import Callable

import mqserve as serve
from tests.instances import started


async def double(request: serve.ServeRequest) -> int:
    return 2 * int(request.data)


def test_whoever_waits_or_follows_is_told_that_the_client_was_shut_down() -> None:
    outcomes: list[BaseException] = []

    def wait(what: Callable[[], object]) -> None:
        try:
            what()
        except serve.InstanceError as error:
            outcomes.append(error)

    with started() as client:
        client.create_backend("b", double)
        client.create_endpoint("b", backend="b")
        job = client.get_handle("b").options(delay_s=600).submit(1)
        events = job.events()
        assert next(events).state == "queued"
        waits = [threading.Thread(target=wait, args=(what,)) for what in (job.result, lambda: list(events), serve.gather(job).result)]
        for waiting in waits:
            waiting.start()
    for waiting in waits:
        waiting.join(30)
    assert len(outcomes) == 3 and all("shut down" in str(error) for error in outcomes)
