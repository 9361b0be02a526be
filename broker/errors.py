"""One family of errors. A subclass exists only where a caller acts differently. `status` is the HTTP status that a web client gets, also
when a handler lets the error pass.

MQServeError
├── BadEnvelope            these bytes will never parse: dead-letter them, do not retry
│   └── BadSignature       … or were not signed by a key of this instance
├── NotEncodable           a value that cannot be encoded for the wire (also a TypeError)
├── BrokerUnavailable      RabbitMQ is not there; `maybe_sent` says whether a publish may have arrived
├── StoreUnavailable       Redis is not there, or takes no writes
│   └── WrongType          … or holds a value of another Redis type at a key; members delete and rewrite keys of theirs
├── QueueMismatch          a queue of that name exists with other arguments
├── NotRouted              no queue is bound to that backend
├── NoReplica              the backend has had no replica for so long that waiting is pointless
├── BackendGone            the backend was deleted, or its instance shut down, before there was a result
├── Overloaded             the backend's queue is full; try again after `retry_after_s`
├── TooLarge               a body or a head above the limit
├── RequestTimeout         no result within the request's time (also a TimeoutError)
├── Cancelled              the caller gave the request up
├── JobGoesOn              the job has not ended
├── ResultGone             the job has ended, and its result, or its message, is not kept any more
├── MembersFailed          a job was to get the results of others, and not all of these have succeeded
├── KeyMisused             the idempotency key was sent with another request
├── RemoteError            user code failed in a replica, and its exception could not be rebuilt here
│   └── ReplicaLost        … or the replica died and the request does not run again: at most once, or its answer had begun to flow
├── BackendFailed          replicas of a backend do not get ready, or proxies cannot serve what is declared
├── InstanceError          no instance, a second one, or one that was shut down
│   └── InstanceEnded      … while a client was a member of it
├── BadValue               a value that mqserve refuses (also a ValueError)
├── BadType                an argument of the wrong type (also a TypeError)
├── UnknownBackend         neither a backend of that name nor dead letters of one
├── UnknownEndpoint        (also a KeyError)
└── UnknownJob             nothing is known of a job of that id (also a KeyError)
"""

import msgspec

UNPARSABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""The errors that msgspec raises for invalid input. It leaves invalid UTF-8 and deep nesting to Python's own errors."""


RIGHTS_MEND = "`mqserve setup --print` shows the rights of each role"
"""The way out that every error about a missing right names."""


class MQServeError(Exception):
    """The base class of every error that we raise on purpose."""

    status = 500


class BadEnvelope(MQServeError):
    """The bytes will never parse: dead-letter them, do not retry."""


class BadSignature(BadEnvelope):
    """The seal does not fit, so anybody may have written the bytes; nothing of them was decoded."""


class NotEncodable(MQServeError, TypeError):
    """A value that neither MessagePack nor a signed pickle can carry."""


class BrokerUnavailable(MQServeError):
    """The broker did not take the message. With `maybe_sent`, it may have taken it without confirming. `public` says why, in words fit
    for strangers."""

    status = 503

    def __init__(self, message: str, *, maybe_sent: bool = False, public: str = "") -> None:
        super().__init__(message)
        self.maybe_sent = maybe_sent
        self.public = public


class StoreUnavailable(MQServeError):
    """The store did not answer within our budget, or refused. `public` says why, in words fit for strangers."""

    status = 503

    def __init__(self, message: str, *, public: str = "") -> None:
        super().__init__(message)
        self.public = public


class WrongType(StoreUnavailable):
    """A key holds a value of another Redis type than ours, so another program wrote it."""

    def __init__(self, key: str) -> None:
        super().__init__(wrong_type(key))
        self.key = key


def wrong_type(key: str) -> str:
    return (
        f"{key} in Redis is of another type than mqserve keeps there, so another program wrote it: "
        f"delete it (redis-cli DEL {key}), and it is made anew"
    )


class QueueMismatch(MQServeError):
    """A queue of that name exists with other arguments, and arguments are frozen: make a new generation."""


class NotRouted(MQServeError):
    """No queue is bound to the backend's name."""

    status = 503


class NoReplica(MQServeError):
    """The backend has had no replica for so long that waiting is pointless."""

    status = 503


class BackendGone(MQServeError):
    """The backend was deleted, or its instance shut down, and the request had no result in the time that was left."""

    status = 503


class Overloaded(MQServeError):
    """The backend's queue is full."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(MQServeError):
    """A body or a head above the limit, refused before it was published; `status` is 413 or 431."""

    def __init__(self, message: str, *, status: int = 413) -> None:
        super().__init__(message)
        self.status = status


class RequestTimeout(MQServeError, TimeoutError):
    """The request's time is up; `phase` is `queue` or `run`."""

    status = 504

    def __init__(self, message: str, *, phase: str = "queue") -> None:
        super().__init__(message)
        self.phase = phase


class Cancelled(MQServeError):
    """The caller gave the request up before it had a result."""

    status = 499


class JobGoesOn(MQServeError):
    """The job has not ended, which it must have for what was asked."""

    status = 409


class ResultGone(MQServeError):
    """The job has ended, and its result, or its message, is not kept any more."""

    status = 410


class MembersFailed(MQServeError):
    """The job was to get the results of others, and not all of these are there."""

    status = 424


class KeyMisused(MQServeError):
    """An idempotency key names one request, and this is another one."""

    status = 422


class RemoteError(MQServeError):
    """User code raised an exception that could not be rebuilt here; the remote traceback is a note on this error."""


class ReplicaLost(RemoteError):
    """The replica died, and the request does not run again: its delivery is at most once, or its answer had begun to flow."""

    status = 502


class BackendFailed(MQServeError):
    """The replicas of a backend do not get ready, or a proxy cannot follow; the message carries the reason they gave."""


class InstanceError(MQServeError):
    """No instance to act on, one too many, or one that was shut down."""


class InstanceEnded(InstanceError):
    """The instance of this client was shut down, perhaps started again since: join what runs now."""


class BadValue(MQServeError, ValueError):
    """A value that mqserve refuses."""


class BadType(MQServeError, TypeError):
    """An argument of the wrong type."""


class UnknownBackend(MQServeError):
    """Neither a backend of that name nor dead letters of one."""


class UnknownEndpoint(MQServeError, KeyError):
    """No endpoint of that name."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class UnknownJob(MQServeError, KeyError):
    """Nothing is known of a job of that id (any more)."""

    status = 404

    def __str__(self) -> str:
        return str(self.args[0])


def public_words(error: MQServeError) -> str:
    """The message for web clients: addresses and users of our servers appear in the log only."""
    if not isinstance(error, BrokerUnavailable | StoreUnavailable):
        return str(error)
    what = "the message broker" if isinstance(error, BrokerUnavailable) else "the store of results"
    return f"{what} {f'cannot be used now ({error.public})' if error.public else 'is away'}: try again later"


def untraced(error: MQServeError) -> MQServeError:
    """Returns a copy without traceback, to raise again or to keep: the raised original keeps its frames alive, and everything they hold."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


def words_of(error: BaseException | None) -> str:
    """The error's message, or its type name if the message is empty or cannot be read. For log lines: a user's exception may raise when
    asked."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # str() of a user's exception may even raise SystemExit
        return type(error).__name__
