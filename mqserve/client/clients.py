"""The open clients of this process, one for each place, and the choice among them when a call names none.

The module-level functions use the current client: the one that was started or joined last; inside a replica always that of the replica's
own instance.
"""

from __future__ import annotations

from ..broker.errors import InstanceError
from ..broker.process import forks
from ..broker.settings import Settings
from ..instance.starting import StartOptions
from ..replicas.context import in_replica, in_replica_process
from .client import Client
from .handle import Address
from .lifetime import State
from .session import open_client


class Clients:
    """The register of open clients. A client is in it from its opening to its end."""

    def __init__(self) -> None:
        # serializes connects: of two threads that connect to one place, the second gets the first one's client
        self._opening = forks.Lock()
        self._lock = forks.Lock()  # guards the three fields below, which are replaced as a whole
        self._open: tuple[Client, ...] = ()
        self._started: tuple[Client, ...] = ()  # clients whose instance this process started
        self._given: tuple[Client, ...] = ()  # clients started or joined here; the last one is current
        self.were_asked_for = False  # whether the user's program, rather than mqserve itself, used the API
        self._of_replica: Client | None = None  # in a replica process: the client of its own instance

    def __repr__(self) -> str:
        return f"<Clients {self._open}>"

    # Opening.

    def start(self, settings: Settings, options: StartOptions) -> Client:
        """Starts an instance. Raises InstanceError if this process runs one already."""
        with self._opening:
            own = self.own()
            if own is not None and not own.has_ended:
                raise InstanceError(f"this process has an instance already, {own!r}: use it, or end it first with its shutdown()")
            if own is not None:
                own.shutdown()  # the instance has ended; shut down its remains
            client = open_client(settings, options, self._forget)
            with self._lock:
                self._open, self._started = (*self._open, client), (*self._started, client)
            return self._give(client)

    def connect(self, settings: Settings | None = None) -> Client:
        """Returns the client of that place, or of `default`, and makes it the current one. Raises InstanceError if no instance runs
        there."""
        with self._opening:
            before = self._open
            client = self.default() if settings is None else self._join(settings)
            if client.is_out_of_reach:
                raise InstanceError(forks.NOT_HERE)
            return self._give(client.give_again() if client in before else client)

    def _give(self, client: Client) -> Client:
        with self._lock:
            if client.is_open and not in_replica():  # inside a replica the current client never changes
                self._given = (*(other for other in self._given if other is not client), client)
        return client

    def _join(self, settings: Settings, *, is_asked_for: bool = True) -> Client:
        # without the lock: a middleware may call this while its own instance starts
        if settings.embedded and self._open_at(settings) is None:
            raise InstanceError(
                f"there is no instance in this process under the namespace {settings.namespace!r}, and another process's embedded one "
                "cannot be joined: call serve.start(), or set MQSERVE_BROKER_URL and MQSERVE_STORE_URL"
            )
        with self._opening:
            client = self._open_at(settings)
            if client is not None and client.has_ended:
                client = self._renewed(client)
            if client is None and settings.embedded:
                return self._join(settings)  # this raises an error, which says that there is none any more
            if client is None:
                client = open_client(settings, None, self._forget)
                with self._lock:
                    self._open = (*self._open, client)
                    if is_asked_for and not in_replica():
                        self._given = (*self._given, client)
            return client

    def _open_at(self, settings: Settings) -> Client | None:
        return next((client for client in reversed(self._open) if _is_one_place(client.settings, settings)), None)

    def _renewed(self, client: Client) -> Client | None:
        """Returns the client of an ended instance, moved on to the next one; None if it ran the ended instance, since it is then of no
        use."""
        if client.owns:
            client.shutdown()
            return None
        client.find_again()
        return client

    def _forget(self, client: Client) -> None:
        """Removes a client that ends. After a close the previous client is current again. After a shutdown none is: a second
        `serve.shutdown()` must not end another instance."""
        with self._lock:
            was_current = self._given[-1:] == (client,)
            self._open, self._started, self._given = (
                tuple(other for other in kept if other is not client) for kept in (self._open, self._started, self._given)
            )
            if was_current and client.state is State.SHUT_DOWN:
                self._given = ()

    # Finding.

    def current(self) -> Client:
        """The client that the module-level functions use; `default` if none is current."""
        self.were_asked_for = True
        given = self._given
        return given[-1] if given and not in_replica() else self.default()

    def default(self) -> Client:
        """Inside a replica the client of its own instance; else that of the instance that this process started last; else that of the
        instance that the environment names; else the one joined last. Raises InstanceError if there is none of these."""
        if in_replica_process():
            return self._own_of_replica()
        started = next((client for client in reversed(self._started) if not (client.has_ended or client.is_out_of_reach)), None)
        if started is not None:
            return started
        settings = Settings.read()
        if settings.embedded and (joined := self._given or self._open):
            return joined[-1]
        return self._join(settings)

    def _own_of_replica(self) -> Client:
        own = self._of_replica
        if own is None or not own.is_open:
            own = self._of_replica = self._join(Settings.read())
        return own

    def own(self) -> Client | None:
        """The client of the instance that this process runs, else None."""
        return next((client for client in self._started if client.owns), None)

    def at(self, address: Address) -> Client:
        """The client for a client or handle that arrived by pickle: of the same instance, else of the one that has its namespace now."""
        here = [client for client in self._open if client.address.namespace == address.namespace]
        exact = [client for client in here if client.address == address]
        if not here:
            return self._join(Settings.read(namespace=address.namespace), is_asked_for=False)
        return (exact or here)[-1]

    def shutdown(self) -> None:
        """Ends the current client's instance, else the one that this process runs; does nothing if there is neither."""
        client = next(reversed(self._given), None) or self.own()
        if client is not None:
            client.shutdown()


def _is_one_place(one: Settings, other: Settings) -> bool:
    """Whether both settings name one place, which has at most one instance. The embedded form makes a new key each time it reads its
    settings, so there keys do not count."""
    if (one.namespace, one.broker_url, one.store_url) != (other.namespace, other.broker_url, other.store_url):
        return False
    return one.embedded or one.secret_keys == other.secret_keys


clients = Clients()
