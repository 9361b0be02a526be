"""What a forked child has of ours and must not keep: descriptors, signal handlers, event loops, locks.

A child of `os.fork` (multiprocessing's fork, a pool, a data loader, a pre-forking server) holds a copy of every descriptor and has none of
our threads. Through it a connection of ours would stay open after our death, so that RabbitMQ delivers what we held only after its
heartbeats, and a signal for the child would end us, since it writes into the wake-up descriptor that both share. So what is ours is
registered where it is made, and the hooks below take it from each child. What starts by exec needs no hook: there our descriptors close
by themselves.
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
    "a process that a handler or a middleware has forked came back from it, or awaits, and has no event loop: it ends here; let it end by "
    "os._exit() or sys.exit(), or use multiprocessing"
)
NOT_HERE = (
    "this process was forked from the one that runs the embedded instance, and has none of its threads and connections: send requests from "
    "the parent or over HTTP, call serve.start() here, or set MQSERVE_BROKER_URL and MQSERVE_STORE_URL, since children join the "
    "distributed form by themselves"
)

depth = 0
"""How many forks lie between this process and the start of its program. What was made at another depth is a parent's."""


class Descriptor(Protocol):
    """A socket or a file: it knows its number, or that it is closed."""

    def fileno(self) -> int: ...


class Forkable(Protocol):
    """What mends its own copy in a child."""

    def after_fork(self) -> None: ...


D = TypeVar("D", bound=Descriptor)
Address = tuple[str, int]
Identity = tuple[
    int, int
]  # of what is open under a number: uvloop closes one before its socket knows, and then the number may be the user's

_making = threading.RLock()  # held while a descriptor is made and registered, and through each fork: so no child has one that is not
_descriptors: WeakKeyDictionary[Any, Identity] = WeakKeyDictionary()  # by Descriptor
_forkable: WeakSet[Any] = WeakSet()  # of Forkable
_served: list[Address] = []  # where we accept connections
_handlers: dict[int, Any] = {}  # our signal handlers
_mask: set[Any] = set()  # of the thread that forks, before that


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


# What is ours.


def guard(descriptor: D) -> D:
    """No child gets this one, as long as it is open."""
    _descriptors[descriptor] = _identity(descriptor.fileno())
    return descriptor


def is_open(descriptor: Descriptor) -> bool:
    """Whether a guarded one still has its number for what it was opened for."""
    try:
        return _identity(descriptor.fileno()) == _descriptors[descriptor]
    except (OSError, ValueError):  # ValueError is that of a file that knows that it is closed
        return False


def guarded_socket(family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
    with _making:
        return guard(socket.socket(family, kind, proto))


def guarded_pipe() -> tuple[io.FileIO, io.FileIO]:
    """(reading end, writing end)."""
    with _making:
        reading, writing = os.pipe()
        return guard(io.FileIO(reading, "rb")), guard(io.FileIO(writing, "wb"))


@contextmanager
def guarded_service(listener: socket.socket) -> Iterator[None]:
    """Inside the block no child gets the listener, nor a connection that it accepted. These go by their local address, which is the
    listener's: libuv accepts them before Python hears of it, so nothing could register them."""
    address: Address = listener.getsockname()[:2]
    _served.append(address)
    try:
        yield
    finally:
        _served.remove(address)


def mend_in_children(forkable: Forkable) -> None:
    """Its `after_fork` is called in each child, as long as it lives."""
    _forkable.add(forkable)


def take_signals(*numbers: int) -> None:
    """The handlers that these signals have now are ours: a child gets Python's defaults for them."""
    with _making:
        _handlers.update({number: signal.getsignal(number) for number in numbers})


# What a child does instead.


def end_if_forked_since(born: int, error: BaseException | None = None) -> None:
    """For code of ours to which the user's returns: where that forked and did not end its child, the child would go on as we do."""
    if depth != born:
        end_child(error)


def end_child(error: BaseException | None = None) -> NoReturn:
    """Ends this process, which user code has forked and not ended; with the code of a `SystemExit`, as Python would."""
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


# The hooks.


def _before_fork() -> None:
    global _mask
    _making.acquire()
    if _handlers:  # else one that comes for the child before it has its own handlers would be ours
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
            signal.pthread_sigmask(signal.SIG_SETMASK, _mask)  # last: what has come meanwhile is taken here


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
    """Of a TCP socket."""
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
    """By /dev/null, rather than closing them: objects of this process still have the numbers and close them some time, when they might be
    of something else. The first one is closed before, since a process may be at its limit."""
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
