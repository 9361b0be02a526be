"""Children as processes: started by command line, each in a session of its own, each with a pipe to its parent."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..broker.errors import BadValue
from ..broker.process import forks
from ..broker.process.lifeline import PIPE_VARIABLE
from ..broker.process.listener import bind, new_common_file
from ..broker.settings import PREFIX, Settings
from .detached_log import PATH_VARIABLE, detached_log, open_log

if TYPE_CHECKING:
    from .node import Share

# No other variable is inherited: a variable that only the parent was meant to read must not override a flag.
_INHERITED = {
    PREFIX + name for name in ("VERBOSE", "ENVIRONMENTS", "NUM_CPUS", "NUM_GPUS", "RESOURCES", "METRICS_HOST", "METRICS_PORT", "CODE_CACHE")
}
_INHERITED |= {"MQSERVE_INSECURE", PATH_VARIABLE}


class Process:
    """One child process. Implements `Child`. Our end of its pipe lives as long as this process does."""

    def __init__(self, arguments: Sequence[str], popen: subprocess.Popen[bytes], writing: io.FileIO | None) -> None:
        self._arguments = arguments
        self._popen = popen
        self._writing = writing

    @classmethod
    def start(
        cls,
        arguments: Sequence[str],
        settings: Settings,
        *,
        detached: bool = False,
        python: str = sys.executable,
        variables: Mapping[str, str] = {},
        hands_on: Sequence[int] = (),
    ) -> Process:
        """Raises OSError where the system starts no more processes."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in _INHERITED}
        environment = {**inherited, **settings.to_env(), **variables, "PYTHONPATH": _import_path()}
        reading = writing = None
        if not detached:
            reading, writing = forks.guarded_pipe()
            environment[PIPE_VARIABLE] = str(reading.fileno())
        output = _detached_output(settings.namespace, environment) if detached else None
        try:
            popen = subprocess.Popen(
                [python, "-m", "mqserve", *arguments], env=environment, pass_fds=(*hands_on, *((reading.fileno(),) if reading else ())),
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        except BaseException:
            if writing:
                writing.close()
            raise
        finally:
            if output is not None and output >= 0:
                os.close(output)
            if reading:
                reading.close()
        return cls(arguments, popen, writing)

    def __repr__(self) -> str:
        return f"<Process {self.pid} mqserve {' '.join(self._arguments)}, {self._popen.returncode}>"

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    async def wait(self) -> str:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def tell(code: int) -> None:
            if not ended.done():
                ended.set_result(code)

        def reap() -> None:
            code = self._reap()
            with suppress(RuntimeError):  # the loop may be closed by then
                loop.call_soon_threadsafe(tell, code)

        threading.Thread(target=reap, name=f"wait for {self.pid}", daemon=True).start()
        return _how_it_ended(await ended)

    def _reap(self) -> int:
        """Waits for the child and returns its exit code. Before reaping it, kills what it left behind in its session: until then its pid,
        and so the session's number, cannot be reused."""
        with suppress(ChildProcessError, ProcessLookupError, PermissionError):  # ChildProcessError: another thread has polled it meanwhile
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            os.killpg(self.pid, signal.SIGKILL)
        return self._wait()

    def _wait(self) -> int:
        code = self._popen.wait()
        if self._writing:
            self._writing.close()
        return code

    def disown(self) -> None:
        """Stops watching how it ends, but still reaps it: otherwise it would be a zombie for as long as this process lives."""
        threading.Thread(target=self._wait, name=f"reap {self.pid}", daemon=True).start()

    def stop(self) -> None:
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kills the child and everything that it started: the session is its own."""
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}" if code else ""
    if -code in (signal.SIGTERM, signal.SIGINT):  # it was told to end before it had a signal handler
        return ""
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no name
        return f"killed by signal {-code}"


class ProcessLauncher:
    """Implements `Launcher`. It holds the socket on which its proxies listen: while one follows another, connections wait in it.

    `held_by_replicas` are descriptors that each replica inherits and holds until it ends.
    """

    def __init__(self, settings: Settings, held_by_replicas: Sequence[int] = ()) -> None:
        self._settings = settings
        self._held_by_replicas = held_by_replicas
        self._listener: socket.socket | None = None
        self._common: io.FileIO | None = None  # the file of the proxies, if several share the socket
        self._address = ("", 0)

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> Process:
        arguments = ["replica", backend, "--replica-id", replica_id, "--node-id", node]
        settings, held = self._settings.for_replica(), self._held_by_replicas
        return Process.start(arguments, settings, python=share.python, variables=share.environment, hands_on=held)

    def proxy(self, proxy_id: str, host: str, port: int, node: str, *, shares_port: bool) -> Process:
        arguments = ["proxy", "--host", host, "--port", str(port), "--proxy-id", proxy_id, "--node-id", node]
        listener = self._listen(host, port)
        if listener is None:  # the proxy fails at the same address, and reports why in the usual place
            return Process.start(arguments, self._settings.for_proxy())
        fds = {"--fd": listener.fileno()}
        if shares_port:
            self._common = self._common or new_common_file()
            fds["--common-fd"] = self._common.fileno()
        arguments += [word for option, fd in fds.items() for word in (option, str(fd))]
        return Process.start(arguments, self._settings.for_proxy(), hands_on=tuple(fds.values()))

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._common is not None:
            self._common.close()
            self._common = None

    def _listen(self, host: str, port: int) -> socket.socket | None:
        if self._listener is None or self._address != (host, port):
            self.stop_listening()
            with suppress(BadValue):
                self._listener, self._address = bind(host, port), (host, port)
        return self._listener


def _detached_output(namespace: str, environment: dict[str, str]) -> int:
    """Returns the output for an instance without a terminal: its log file. The starter's own output would keep a pipe open, and its
    reader would never see the end."""
    path = detached_log(namespace)
    try:
        output = open_log(path)
    except OSError:
        return subprocess.DEVNULL
    environment[PATH_VARIABLE] = str(path)
    return output


def _import_path() -> str:
    """The children's PYTHONPATH: they must be able to import what this process can, and the folder of the user's file is on `sys.path`
    only here."""
    own = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    own |= {path for path in sys.path if path.endswith((".zip", "lib-dynload"))}
    wanted = [path for path in [*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)] if path and path not in own]
    return os.pathsep.join(dict.fromkeys(wanted))
