"""What an instance costs while nobody sends a request; `benchmarks/idle.py` has the figures of each process."""

import httpx
import psutil
import pytest

from tests.faults.members import Members
from tests.instances import Deploy, distributed_only, wait_until

BEATS = 4
WAKE_UPS = 20  # a beat, of the thread with the I/O loop: 6 to 8 are usual
CPU_S = 0.025  # a beat, a second: 0.002 is usual


def beats_at(members: Members, pid: int) -> int:
    """When the process wrote its last beat, in store milliseconds."""
    return max((beat.at for beat in members.last_beats() if beat.pid == pid), default=0)


@distributed_only
@pytest.mark.parametrize("kind", ["replica", "proxy"])
def test_an_idle_process_sleeps_between_its_beats(deploy: Deploy, store_url: str, shared_namespace: str, kind: str) -> None:
    assert httpx.get(deploy.at(lambda request: "ok")).text == "ok"
    members = Members(store_url, shared_namespace)
    (pid,) = members.pids(kind)
    process = psutil.Process(pid)

    def cost_of_beats() -> tuple[float, float]:
        """Wake-ups and CPU seconds of one beat, on the average of some."""
        cpu, wake_ups, began = process.cpu_times(), process.num_ctx_switches().voluntary, beats_at(members, pid)
        wait_until(lambda: beats_at(members, pid) >= began + BEATS * 1000)
        later = process.cpu_times()
        spent = later.user + later.system - cpu.user - cpu.system
        return (process.num_ctx_switches().voluntary - wake_ups) / BEATS, spent / BEATS

    # the first seconds after a request are no rest yet
    wait_until(lambda: (found := cost_of_beats())[0] < WAKE_UPS and found[1] < CPU_S, told=lambda: f"{cost_of_beats()}")
