"""Takes from a forked child what belongs to its parent: descriptors, signal handlers, event loops, locks.

A child of `os.fork` (multiprocessing's fork, a pool, a data loader, a pre-forking server) holds a copy of every descriptor and has none
of our threads. A connection of ours would stay open in the child after our death, and RabbitMQ would deliver our unacked messages again
only after missed heartbeats. A signal for the child would end us, since it writes into the wake-up descriptor that both share. So
descriptors, handlers and loops are registered where they are made, and the hooks below take them from each child. Programs started by
exec need no hook: our descriptors are close-on-exec.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from ..failures import traceback_of
from .printable import printable_lines

logger = logging.getLogger(__name__)

CAME_BACK_EXIT = 70
CAME_BACK = (
    "a process that a handler or a middleware forked returned from it, or awaits, and has no event loop: it is ended here; let it end by "
    "os._exit() or sys.exit(), or use multiprocessing"
)
NOT_HERE = (
    "this process was forked from the one that runs the embedded instance, and has none of its threads and connections: send requests from "
    "the parent or over HTTP, call serve.start() here, or set MQSERVE_BROKER_URL and MQSERVE_STORE_URL, since children join the "
    "distributed form by themselves"
)

depth = 0
"""The number of forks between the start of the program and this process. An object made at another depth belongs to a parent."""


class Descriptor(Protocol):
    """A socket or a file, which knows its number or that it is closed."""

    def fileno(self) -> int: ...


class Forkable(Protocol):
    """An object that repairs its own copy in a forked child."""

    def after_fork(self) -> None: ...


D = TypeVar("D", bound=Descriptor)
Address = tuple[str, int]
# Tells the open file behind a descriptor: uvloop closes a number before its socket object knows, and then user code may reuse the number.
Identity = tuple[int, int]

# held while a descriptor is made and registered, and during each fork, so that no child gets an unregistered one
_making = threading.RLock()
_descriptors: WeakKeyDictionary[Any, Identity] = WeakKeyDictionary()  # by Descriptor
_forkable: WeakSet[Any] = WeakSet()  # of Forkable
_served: list[Address] = []  # local addresses on which we accept connections
_handlers: dict[int, Any] = {}  # our signal handlers
_mask: set[Any] = set()  # signal mask of the forking thread before the fork


class Lock:
    """A reentrant lock that is free in a forked child, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _forkable.add(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


# Registering what is ours.


def guard(descriptor: D) -> D:
    """Registers a descriptor: no child gets it while it is open. Returns it."""
    _descriptors[descriptor] = _identity(descriptor.fileno())
    return descriptor


def is_open(descriptor: Descriptor) -> bool:
    """Whether a guarded descriptor's number still refers to the file that it was opened for."""
    try:
        return _identity(descriptor.fileno()) == _descriptors[descriptor]
    except (OSError, ValueError):  # a closed file raises ValueError
        return False


def guarded_socket(family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
    with _making:
        return guard(socket.socket(family, kind, proto))


def guarded_pipe() -> tuple[io.FileIO, io.FileIO]:
    """Returns (reading end, writing end), both guarded."""
    with _making:
        reading, writing = os.pipe()
        return guard(io.FileIO(reading, "rb")), guard(io.FileIO(writing, "wb"))


@contextmanager
def guarded_service(listener: socket.socket) -> Iterator[None]:
    """Inside the block no child gets the listener or a connection that it accepted. Accepted connections are recognized by their local
    address: libuv accepts them before Python hears of them, so nothing could register them."""
    address: Address = listener.getsockname()[:2]
    _served.append(address)
    try:
        yield
    finally:
        _served.remove(address)


def mend_in_children(forkable: Forkable) -> None:
    """Calls `forkable.after_fork()` in each child, for as long as the object lives."""
    _forkable.add(forkable)


def take_signals(*numbers: int) -> None:
    """Registers the current handlers of these signals as ours: a child gets Python's defaults for them."""
    with _making:
        _handlers.update({number: signal.getsignal(number) for number in numbers})


# Ending a child that runs on into our code.


def end_if_forked_since(born: int, error: BaseException | None = None) -> None:
    """Ends this process if it was forked since `born`. Code of ours calls this when user code returns to it: user code may have forked
    and let the child go on."""
    if depth != born:
        end_child(error)


def end_child(error: BaseException | None = None) -> NoReturn:
    """Ends this process, a child that user code forked and did not end; with the exit code of a `SystemExit`, as Python would."""
    code: object = CAME_BACK_EXIT
    with suppress(BaseException):
        if type(error) is SystemExit:
            code = error.code or 0
        else:
            logger.error("%s", CAME_BACK if error is None else f"{CAME_BACK}\n{printable_lines(traceback_of(error).rstrip())}")
        if not isinstance(code, int):
            logger.error("%s", code)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF if isinstance(code, int) else 1)


# The fork hooks.


def _before_fork() -> None:
    global _mask
    _making.acquire()
    if _handlers:  # a signal that reaches the child before it has handlers of its own would run ours
        _mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)


def _after_fork_in_parent() -> None:
    if _handlers:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)
    _making.release()


def _after_fork_in_child() -> None:
    global depth
    depth += 1
    handlers = dict(_handlers)
    try:
        _forget_signals(handlers)
        _replace([*_registered(), *_of_services()])
        for forkable in list(_forkable):
            forkable.after_fork()
    finally:
        _descriptors.clear()
        _served.clear()
        _handlers.clear()
        _making.release()
        if handlers:
            signal.pthread_sigmask(signal.SIG_SETMASK, _mask)  # last: signals that arrived meanwhile are delivered here


def _registered() -> list[int]:
    return [descriptor.fileno() for descriptor in list(_descriptors) if is_open(descriptor)]


def _identity(fd: int) -> Identity:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _of_services() -> Iterator[int]:
    if _served:
        for fd in _open_descriptors():
            address = _local_address(fd)
            if address and any(address[1] == port and host in (address[0], "0.0.0.0", "::") for host, port in _served):
                yield fd


def _open_descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # no /proc
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _local_address(fd: int) -> Address | None:
    """The local address of a TCP socket, else None."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        probe = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        is_tcp = probe.family in (socket.AF_INET, socket.AF_INET6) and probe.type == socket.SOCK_STREAM
        address: Address | None = probe.getsockname()[:2] if is_tcp else None
        return address
    finally:
        probe.detach()


def _replace(fds: Sequence[int]) -> None:
    """Replaces the descriptors by /dev/null rather than closing them: objects of this process still have the numbers and will close them
    some time, when the numbers may belong to other files. The first one is closed before, since a process may be at its limit."""
    if fds:
        os.close(fds[0])
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            if fd != nothing:
                os.dup2(nothing, fd, inheritable=False)
        if nothing not in fds:
            os.close(nothing)


def _forget_signals(handlers: Mapping[int, Any]) -> None:
    if handlers:
        signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
