"""An mqserve command that dies, or waits, at one point of its own code: `python -m tests.faults.crash_points POINT HOW -- replica b`.

The product knows nothing of it: the function at the point is wrapped before the command runs. HOW is `kill`, or a path:
then the process touches `PATH.came` and goes on when PATH is there. A controller that is to die takes
a lapsed lead over sooner than others.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

POINTS = {
    "before the result is stored": "mqserve.broker.redis.store:RedisStore.record_then",
    "before the ack, the result being stored": "mqserve.broker.rabbitmq.consumer:RabbitDelivery.ack",
    "before a message is given back": "mqserve.broker.rabbitmq.consumer:RabbitDelivery.requeue",
    "before a request is published": "mqserve.broker.rabbitmq.queue:RabbitQueue.publish",
    "before the observed state is written": "mqserve.controller.loop:Controller._write",
    "before a queue is declared": "mqserve.broker.rabbitmq.queue:RabbitQueue.declare",
    "before the lead is taken": "mqserve.controller.lease:Leader.lead",
}


def command(point: str, how: str, *arguments: str) -> list[str]:
    """What to start: `mqserve` with these arguments, but for the point."""
    assert point in POINTS, f"{point!r} is none of {list(POINTS)}"
    return [sys.executable, "-m", "tests.faults.crash_points", point, how, "--", *arguments]


def main() -> None:
    point, how, _, *arguments = sys.argv[1:]
    wrap(POINTS[point], lambda: die() if how == "kill" else wait_for(Path(how)))
    if how == "kill":
        from mqserve.controller import lease

        lease.LEADER_TTL_S = 2  # type: ignore[attr-defined]
    sys.argv = ["mqserve", *arguments]
    from mqserve.commands.cli import main as run

    run()


def wrap(path: str, act: Callable[[], None]) -> None:
    """The method that `path` names does `act` first, whenever it is called."""
    module, _, names = path.partition(":")
    owner, _, name = names.partition(".")
    kind: Any = getattr(import_module(module), owner)
    method = getattr(kind, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return method(*args, **kwargs)

    setattr(kind, name, wrapped)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # it does not come to that


def wait_for(path: Path) -> None:
    """Holds the whole process, but for what other threads do."""
    path.with_name(f"{path.name}.came").touch()
    while not path.exists():
        time.sleep(0.005)


if __name__ == "__main__":
    main()
