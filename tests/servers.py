"""RabbitMQ and Redis servers of our own: in a temporary folder, on free ports of the loopback interface.

Of the machine only the programs are used: not its configuration, data, Erlang cookie or port mapper (epmd). A watcher
process ends the servers should the tests die without doing so.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import redis

from tests.ports import free_port
from tests.server_programs import find_epmd, find_erl_call, find_rabbitmq, find_redis

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0


class ServerFailed(Exception):
    """The server did not start; the message ends with the tail of its log."""


class Certificates(NamedTuple):
    """PEM files of a server that also listens for TLS."""

    authority: Path
    certificate: Path
    key: Path


class PrivateServer(ABC):
    """One server; its port and its data stay the same over `stop()` or `kill()` and another `start()`.

    `close()` stops it and removes its folder: use it as a context manager.
    """

    name: ClassVar[str]

    def __init__(self, tls: Certificates | None = None) -> None:
        self.port = free_port()
        self.tls_port = free_port()
        self._tls = tls
        self._folder: Path | None = None
        self._processes: list[subprocess.Popen[bytes]] = []  # the server itself is the last one
        self._watcher: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} {'running' if self.running else 'stopped'}>"

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    def pid(self) -> int:
        return self._processes[-1].pid

    @property
    def running(self) -> bool:
        """Whether the process lives; a frozen one does."""
        return bool(self._processes) and self._processes[-1].poll() is None

    def start(self) -> Self:
        """Start the server and wait until it answers. Does nothing when it is running."""
        if self.running:
            return self
        self.kill()  # what the last run left behind, if its server died by itself
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"mqserve-{self.name.lower()}-"))
        try:
            self._launch(self._folder)
            self._watcher = watch(self._folder, [process.pid for process in self._processes])
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            self._remove_folder()
            raise
        return self

    def stop(self) -> None:
        """End the server as its operator would; its data stays for the next `start()`."""
        self.thaw()
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self.kill()

    def kill(self) -> None:
        """End the server as a crash would."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()
        if self._watcher is not None:
            self._watcher.communicate(b"done\n")
            self._watcher = None

    def freeze(self) -> None:
        """Let the server hang: its connections stay open, nothing is answered, until `thaw()`."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on. Does nothing to any other."""
        if self.running:
            os.kill(self.pid, signal.SIGCONT)

    def mend(self) -> None:
        """Whatever was done to it: afterwards it runs and answers."""
        self.thaw()
        self.start()

    def restart(self, *, with_data: bool = True, kindly: bool = True) -> None:
        """Stop (or kill) it and start it again, with what it had written or with an empty disk."""
        self.stop() if kindly else self.kill()
        if not with_data and self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
        self.start()

    def close(self) -> None:
        """End the server and remove all it wrote."""
        self.stop()
        self._remove_folder()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _launch(self, folder: Path) -> None:
        """Start the server's processes by `_spawn`, the server itself last."""

    @abstractmethod
    def _greet(self, connection: socket.socket) -> bool:
        """Whether the server answers as it should."""

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _spawn(self, *command: str | Path, folder: Path, env: Mapping[str, str] | None = None) -> None:
        with (folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop the server
            )
        self._processes.append(process)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            if not self.running:
                raise ServerFailed(f"{self.name} ended with status {self._processes[-1].returncode}:\n{self._log_tail()}")
            if self._answers():
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} did not answer within {START_DEADLINE_S:.0f} s:\n{self._log_tail()}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return self._greet(connection)
        except OSError:
            return False

    @property
    def log(self) -> str:
        """What it has printed, in all of its runs."""
        log = self._folder / "server.log" if self._folder else None
        return log.read_text(errors="replace") if log is not None and log.exists() else ""

    def _log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.splitlines()[-lines:]) or "(no log)"


class PrivateRedis(PrivateServer):
    """Keeps nothing on disk, unless it `keeps_data`: it comes back empty from `stop()` and `kill()`, and as it was from `freeze()`.

    With its data it comes back with all that it confirmed: each write is in the kernel's hands before it is answered.
    """

    name = "Redis"

    def __init__(self, tls: Certificates | None = None, acl: str = "", *, keeps_data: bool = False) -> None:
        super().__init__(tls)
        self._acl = acl  # the content of an aclfile
        self._keeps_data = keeps_data

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def forget(self) -> None:
        """Of a server that does not run: it will come back empty, whatever it keeps."""
        if self._folder is not None and not self.running:
            shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)

    @property
    def tls_url(self) -> str:
        return f"rediss://127.0.0.1:{self.tls_port}/0"

    def _launch(self, folder: Path) -> None:
        options = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--save": "",
            "--appendonly": "yes" if self._keeps_data else "no",
            "--dir": str(folder),
        }
        if self._acl:
            (folder / "users.acl").write_text(self._acl)
            options["--aclfile"] = str(folder / "users.acl")
        if self._tls is not None:
            files = {"ca-cert": self._tls.authority, "cert": self._tls.certificate, "key": self._tls.key}
            options |= {"--tls-port": str(self.tls_port), "--tls-auth-clients": "no"}
            options |= {f"--tls-{kind}-file": str(path) for kind, path in files.items()}
        self._spawn(find_redis(), *(word for option in options.items() for word in option), folder=folder)

    def say(self, *words: object) -> Any:
        """What the server answers to a command, e.g. `say("CONFIG", "SET", "maxmemory", "5mb")`."""
        with redis.Redis.from_url(self.url, socket_timeout=10) as client:
            return client.execute_command(*words)

    def limit_memory(self, limit: str = "0", policy: str = "noeviction") -> None:
        """`"1"` is too little for any write; `"0"` takes the limit away."""
        self.say("CONFIG", "SET", "maxmemory-policy", policy)
        self.say("CONFIG", "SET", "maxmemory", limit)

    def mend(self) -> None:
        was_running = self.running
        super().mend()
        if was_running:
            self.limit_memory()
            self.say("CONFIG", "SET", "maxclients", "10000")

    def _greet(self, connection: socket.socket) -> bool:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))


class PrivateRabbitMQ(PrivateServer):
    """One node, without plugins: durable queues and persistent messages survive `stop()` and `kill()`."""

    name = "RabbitMQ"

    def __init__(self, tls: Certificates | None = None) -> None:
        super().__init__(tls)
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._alarms: set[str] = set()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def tls_url(self) -> str:
        return f"amqps://guest:guest@127.0.0.1:{self.tls_port}/"

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints, e.g. for `ctl("set_vm_memory_high_watermark", "0.0001")`."""
        if self._folder is None:
            raise ServerFailed("rabbitmqctl needs a started server")
        rabbitmqctl = find_rabbitmq().with_name("rabbitmqctl")
        result = subprocess.run(
            [rabbitmqctl, "--quiet", *arguments],
            env=self._env(self._folder),
            capture_output=True,
            text=True,
            timeout=START_DEADLINE_S,
        )
        if result.returncode:
            raise ServerFailed(f"rabbitmqctl {' '.join(arguments)}: {result.stdout}{result.stderr}")
        return result.stdout

    def eval(self, expression: str) -> str:
        """What an Erlang expression comes to in the server: by erl_call, or by rabbitmqctl, which takes seconds."""
        if (erl_call := find_erl_call()) is not None and self._folder is not None:
            cookie = (self._folder / ".erlang.cookie").read_text()
            result = subprocess.run(
                [erl_call, "-c", cookie, "-sname", f"mqserve-{self.port}@localhost", "-e"],
                env=self._env(self._folder),
                input=f"{expression}.\n",
                capture_output=True,
                text=True,
                timeout=START_DEADLINE_S,
            )
            if result.returncode == 0 and result.stdout.startswith("{ok, "):
                return result.stdout.removeprefix("{ok, ").removesuffix("}")
        return self.ctl("eval", f"{expression}.").strip()

    def alarm(self, kind: str) -> None:
        """The server finds itself short of `memory` or `disk`, and reads no publishing connection any more, until `calm`."""
        if kind == "memory":
            self.ctl("set_vm_memory_high_watermark", "0.0000001")
        else:
            self.ctl("set_disk_free_limit", "9999GB")
        self._alarms.add(kind)

    def calm(self) -> None:
        """Ends the alarms."""
        if "memory" in self._alarms:
            self.ctl("set_vm_memory_high_watermark", "0.4")
        if "disk" in self._alarms:
            self.ctl("set_disk_free_limit", "50MB")
        self._alarms.clear()

    def mend(self) -> None:
        super().mend()
        self.calm()

    def _launch(self, folder: Path) -> None:
        for name, content in CONFIGURATION.items():
            (folder / name).write_text(content)
        if self._tls is not None:
            lines = [f"listeners.ssl.default = 127.0.0.1:{self.tls_port}"]
            files = {"cacertfile": self._tls.authority, "certfile": self._tls.certificate, "keyfile": self._tls.key}
            lines += [f"ssl_options.{kind} = {path}" for kind, path in files.items()]
            with (folder / "rabbitmq.conf").open("a") as conf:
                conf.writelines(f"{line}\n" for line in lines)
        # Started by us and in the foreground, or Erlang would start one that nobody owns.
        self._spawn(find_epmd(), "-port", str(self._epmd_port), "-address", "127.0.0.1", folder=folder, env=self._env(folder))
        self._spawn(find_rabbitmq(), folder=folder, env=self._env(folder))

    def _env(self, folder: Path) -> dict[str, str]:
        ours = {
            "HOME": str(folder),  # Erlang makes its cookie here
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"mqserve-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_LOGS": "-",  # to our server.log, where a failed start leaves its reason too
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server: we signal it, not a parent of it
        }
        foreign = ("RABBITMQ_", "ERL_", "XDG_", "NOTIFY_SOCKET")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours

    def _greet(self, connection: socket.socket) -> bool:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        return connection.recv(64).startswith(b"\x01\x00\x00")  # a method frame on channel 0: Connection.Start


CONFIGURATION = {
    "rabbitmq.conf": "disk_free_limit.absolute = 50MB\n",
    "advanced.config": "[].\n",
    "enabled_plugins": "[].\n",
    "rabbitmq-env.conf": "",
}


def watch(folder: Path, pids: list[int]) -> subprocess.Popen[bytes]:
    """Start a shell that ends the processes and removes the folder if we go away without writing it a line.

    Our end of its pipe closes whatever kills us, which is more than `atexit` and signal handlers can say.
    """
    script = 'read -r _ || { kill -9 "$@"; sleep 1; rm -rf "$0"; }'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, str(folder), *map(str, pids)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
