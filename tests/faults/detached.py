"""A detached instance as its machine sees it: which of its processes live, and what of it is left anywhere."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import redis

from tests.instances import NOISE_S, CommandLine, wait_until
from tests.ports import free_port

THREE = ("supervisor", "controller", "node")
BACK_WITHIN_S = 15 + NOISE_S  # what is promised, and what a busy machine may add

BREAKING = """
import os, sys
from pathlib import Path
words = sys.orig_argv[3:4]
folder = Path(__file__).parent
if words and sys.orig_argv[1:3] == ["-m", "mqserve"]:
    with (folder / "started").open("a") as starts:
        starts.write(f"{words[0]}\\n")
    if (folder / f"no-{words[0]}").exists():
        print(f"the {words[0]} is broken", file=sys.stderr, flush=True)
        os._exit(7)
"""


class Detached:
    """One that `mqserve start` left, in a folder of its own. Its processes can be broken: they then end as soon as they are started."""

    def __init__(self, shell: CommandLine, namespace: str) -> None:
        self.namespace = namespace
        self._folder = shell.folder / "breaking"
        self._folder.mkdir(exist_ok=True)
        (self._folder / "sitecustomize.py").write_text(BREAKING)
        path = os.pathsep.join([str(self._folder), shell.env["PYTHONPATH"]])
        self.state = shell.folder / "state"
        self.shell = shell.with_variables(XDG_STATE_HOME=str(self.state), PYTHONPATH=path)
        self.port = free_port()

    def __repr__(self) -> str:
        return f"<Detached {self.namespace}: {self.pids()}>\n{self.log}"

    @property
    def log(self) -> str:
        path = self.state / "mqserve" / f"{self.namespace}.log"
        return path.read_text() if path.exists() else "(no log)"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> None:
        begun = self.shell.run("start", "--port", str(self.port), *arguments)
        assert begun.returncode == 0, begun.stderr

    def deploy(self) -> None:
        deployed = self.shell.python(
            "import mqserve as serve\n"
            "serve.connect()\n"
            "serve.create_backend('b', lambda request: 'well', config={'num_replicas': 2})\n"
            "serve.create_endpoint('b', backend='b', route='/b')\n"
        )
        assert deployed.returncode == 0, deployed.stderr

    def pids(self, *roles: str) -> dict[str, list[int]]:
        """Of the living processes, by role; of all roles, or of these."""
        found: dict[str, list[int]] = {role: [] for role in roles}
        for process in psutil.process_iter():
            try:
                words = process.cmdline()[1:4]
                if words[:2] != ["-m", "mqserve"] or process.environ().get("MQSERVE_NAMESPACE") != self.namespace:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and (not roles or words[2] in roles):
                    found.setdefault(words[2], []).append(process.pid)
            except psutil.Error:
                continue
        return found

    def the_three(self) -> dict[str, int]:
        """Once each of them runs, and no second one."""

        def are_there() -> dict[str, int]:
            pids = self.pids(*THREE)
            return {role: pids[role][0] for role in THREE} if all(len(pids[role]) == 1 for role in THREE) else {}

        return wait_until(are_there, BACK_WITHIN_S, told=lambda: self)

    def kill(self, *roles: str) -> None:
        """In one moment: each is stopped before the first one ends."""
        pids = [pid for role in roles for pid in self.pids(role)[role]]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)

    def serves(self) -> bool:
        try:
            return httpx.get(f"{self.url}/b", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def break_starts_of(self, role: str) -> None:
        (self._folder / f"no-{role}").touch()

    def mend_starts(self) -> None:
        for path in self._folder.glob("no-*"):
            path.unlink()

    @property
    def starts(self) -> Counter[str]:
        """How often each role was started."""
        return Counter((self._folder / "started").read_text().split())

    def close(self) -> None:
        """Nothing of it outlives its test, also one that failed."""
        until = time.monotonic() + 20
        while (pids := self.pids()) and time.monotonic() < until:
            for pid in (pid for role in (*THREE, *pids) for pid in pids.get(role, [])):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


def keys_left(store_url: str, namespace: str) -> list[str]:
    """Those that would stay for ever."""
    with redis.Redis.from_url(store_url) as store:
        return [key.decode() for key in store.scan_iter(f"mqserve:{namespace}:*") if store.ttl(key) < 0]


def files_left(detached: Detached) -> list[str]:
    """Locks of the three."""
    return [path.name for role in THREE for path in Path(detached.state).rglob(f"*.{role}.lock")]
