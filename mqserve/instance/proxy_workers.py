"""Several external proxies on one port: what `mqserve proxy --http-workers N` runs, where no node does it."""

from __future__ import annotations

import asyncio

from ..broker.errors import InstanceError
from ..broker.process.lifeline import stop_event
from ..broker.process.listener import bind, new_common_file
from ..broker.settings import Settings
from ..controller.node import STOP_MARGIN_S
from ..controller.processes import Process
from ..controller.state.beats import PROXY_DRAIN_S
from .starting import keep_child_running


async def run_proxy_workers(settings: Settings, host: str, port: int, count: int, *, debug: bool) -> int:
    """Runs the proxies until this process is told to stop, and restarts those that end; returns the exit code.

    Raises BadValue if the address cannot be bound, and InstanceError, when none is left, if not all could be started.
    """
    stop = stop_event()
    workers: dict[int, Process] = {}
    with bind(host, port) as listener:
        try:
            with new_common_file() as common:
                fds = listener.fileno(), common.fileno()
                arguments = ["proxy", "--host", host, "--port", str(port), "--fd", str(fds[0]), "--common-fd", str(fds[1])]
                arguments += ["--debug"] if debug else []

                def start(worker: int) -> Process:
                    workers[worker] = Process.start(arguments, settings, hands_on=fds)
                    return workers[worker]

                async def keep(worker: int) -> None:
                    await keep_child_running(f"proxy {worker} of {count}", workers[worker], lambda: start(worker), is_stopping)

                async def is_stopping() -> bool:
                    return stop.is_set()

                for worker in range(1, count + 1):
                    start(worker)
                async with asyncio.TaskGroup() as tasks:
                    keeping = [tasks.create_task(keep(worker)) for worker in workers]
                    await stop.wait()
                    for task in keeping:
                        task.cancel()
        except OSError as error:  # those that start again wait for better times, see `keep_child_running`
            raise InstanceError(f"cannot start {count} proxies on port {port}: {error}") from error
        finally:
            await _end(list(workers.values()))
    return 0


async def _end(workers: list[Process]) -> None:
    """Lets all drain at the same time, and kills those that do not end."""
    for process in workers:
        process.stop()
    if workers:
        await asyncio.wait([asyncio.create_task(process.wait()) for process in workers], timeout=PROXY_DRAIN_S + STOP_MARGIN_S)
    for process in workers:
        process.kill()
