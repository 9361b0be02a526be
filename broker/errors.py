"""One family of errors. A subclass exists only where a caller acts differently. `status` is HTTP's number for each: what a web client
hears of it, also where a handler lets it pass.

MQServeError
├── BadEnvelope            these bytes will never parse: dead-letter them, do not retry
│   └── BadSignature       … or were not signed by a key of this instance
├── NotEncodable           a value that cannot travel (also a TypeError)
├── BrokerUnavailable      RabbitMQ is not there; `maybe_sent` says whether a publish may have arrived
├── StoreUnavailable       Redis is not there, or takes no writes
│   └── WrongType          … or has a value of another type at a key: what members write anew is deleted first
├── QueueMismatch          a queue of that name exists with other arguments
├── NotRouted              no queue is bound to that backend
├── NoReplica              a backend without a replica for so long that waiting is no use
├── BackendGone            the backend was deleted, or its instance shut down, before there was a result
├── Overloaded             the backend's queue is full; try again after `retry_after_s`
├── TooLarge               a body or a head above the limit
├── RequestTimeout         no result within the request's time (also a TimeoutError)
├── Cancelled              the caller gave the request up
├── RemoteError            user code failed over there, and its exception could not travel
├── BackendFailed          replicas of a backend do not get ready, or proxies cannot make what they are to serve
├── InstanceError          no instance, a second one, or one that was shut down
│   └── InstanceEnded      … while a client was a member of it
├── BadValue               (also a ValueError)
├── BadType                (also a TypeError)
├── UnknownBackend         neither a backend of that name nor dead letters of one
└── UnknownEndpoint        (also a KeyError)
"""

import msgspec

UNPARSABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they ought to be: text that is not UTF-8 and deep nesting it leaves to Python."""


RIGHTS_MEND = "`mqserve setup --print` shows the rights of each role"
"""The way out of every refused right."""


class MQServeError(Exception):
    """Everything we raise on purpose."""

    status = 500


class BadEnvelope(MQServeError):
    """The bytes will never parse: dead-letter them, do not retry."""


class BadSignature(BadEnvelope):
    """The bytes may be anybody's: nothing of them was decoded."""


class NotEncodable(MQServeError, TypeError):
    """A value that neither MessagePack nor a signed pickle may carry."""


class BrokerUnavailable(MQServeError):
    """The broker did not take the message; with `maybe_sent`, it may have taken it and could not say so. `public`: as below."""

    status = 503

    def __init__(self, message: str, *, maybe_sent: bool = False, public: str = "") -> None:
        super().__init__(message)
        self.maybe_sent = maybe_sent
        self.public = public


class StoreUnavailable(MQServeError):
    """The store did not answer within our budget, or refused; `public` says why in words for anybody."""

    status = 503

    def __init__(self, message: str, *, public: str = "") -> None:
        super().__init__(message)
        self.public = public


class WrongType(StoreUnavailable):
    """A key holds a value of another type than ours: somebody else wrote it."""

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
    """The backend has had no replica for so long that waiting is no use."""

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
    """More bytes than the limit, refused before they were published; `status` is 413 or 431."""

    def __init__(self, message: str, *, status: int = 413) -> None:
        super().__init__(message)
        self.status = status


class RequestTimeout(MQServeError, TimeoutError):
    """The request's time is spent; `phase` is where: `queue` or `run`."""

    status = 504

    def __init__(self, message: str, *, phase: str = "queue") -> None:
        super().__init__(message)
        self.phase = phase


class Cancelled(MQServeError):
    """The caller gave the request up before it had a result."""

    status = 499


class RemoteError(MQServeError):
    """User code raised something that could not be brought here; the remote traceback is a note on it."""


class BackendFailed(MQServeError):
    """The replicas of a backend do not get ready, or a proxy cannot follow; the message carries their own reason."""


class InstanceError(MQServeError):
    """No instance to act on, one too many, or one that was shut down."""


class InstanceEnded(InstanceError):
    """The instance of this client was shut down, perhaps started again since: join what runs now."""


class BadValue(MQServeError, ValueError):
    """A value that the system refuses."""


class BadType(MQServeError, TypeError):
    """An argument of the wrong type."""


class UnknownBackend(MQServeError):
    """Neither a backend of that name nor dead letters of one."""


class UnknownEndpoint(MQServeError, KeyError):
    """No endpoint of that name."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def public_words(error: MQServeError) -> str:
    """For web clients: addresses and users of our servers are for the log only."""
    if not isinstance(error, BrokerUnavailable | StoreUnavailable):
        return str(error)
    what = "the message broker" if isinstance(error, BrokerUnavailable) else "the store of results"
    return f"{what} {f'cannot be used now ({error.public})' if error.public else 'is away'}: try again later"


def untraced(error: MQServeError) -> MQServeError:
    """The same error to raise once more, or to keep: the one that was raised holds the frames that it went through, and all they hold."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


def words_of(error: BaseException | None) -> str:
    """For a log line or a sentence: an error may have nothing to say but its name, and a user's may raise when asked."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # such as SystemExit
        return type(error).__name__
