"""Settings of an instance and of the trust between its processes. They are read once, from arguments and the environment, and handed on
whole."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from yarl import URL

from .callbacks import NO_CALLBACK_SETTINGS, CallbackSettings
from .errors import BadValue
from .process.tls import secured
from .queue_names import check_namespace
from .result_files import ResultFiles, parse_result_store
from .values.header_seals import HeaderSeals
from .values.signing import MIN_KEY_BYTES, Signer
from .values.webhook_signing import derived_secret, read_webhook_secrets

PREFIX = "MQSERVE_"
MIN_TOKEN_LENGTH = 16
CONSUMER_TIMEOUT_S = 1800.0  # RabbitMQ's default


@dataclass(frozen=True, slots=True)
class Settings:
    """Precedence of every field: argument or flag, environment (`MQSERVE_*`, or a file named by `MQSERVE_*_FILE`), default."""

    namespace: str = "mqserve"
    broker_url: str = field(default="", repr=False)
    store_url: str = field(default="", repr=False)
    secret_keys: tuple[bytes, ...] = field(default=(), repr=False)
    admin_token: str = field(default="", repr=False)  # grants other machines access to the system paths of a proxy
    replica_broker_url: str = field(default="", repr=False)  # these four: URLs that a node gives to its children instead of its own
    replica_store_url: str = field(default="", repr=False)
    proxy_broker_url: str = field(default="", repr=False)
    proxy_store_url: str = field(default="", repr=False)
    trusted_users: tuple[str, ...] = ()  # RabbitMQ users whose sealed pickles replicas open; empty: any user
    header_users: tuple[str, ...] = ()  # RabbitMQ users whose `mq` headers replicas trust without a valid seal
    callbacks: CallbackSettings = NO_CALLBACK_SETTINGS
    consumer_timeout_s: float = CONSUMER_TIMEOUT_S  # what rabbitmq.conf says; only a RabbitMQ before 3.12 heeds it for jobs
    result_folder: Path | None = None  # of large results of jobs

    @property
    def embedded(self) -> bool:
        """Whether the queue and the store live in this process."""
        return not self.broker_url

    @property
    def signer(self) -> Signer:
        return Signer(self.secret_keys, self.namespace)

    @property
    def result_files(self) -> ResultFiles:
        return ResultFiles(self.result_folder, self.namespace)

    @property
    def webhook_secrets(self) -> tuple[bytes, ...]:
        """What webhooks are signed with, the current one first; none without a key. Receivers are given the current one."""
        if self.callbacks.secret:
            return read_webhook_secrets(self.callbacks.secret)
        return tuple(derived_secret(key, self.namespace) for key in self.secret_keys)

    @property
    def header_seals(self) -> HeaderSeals:
        return HeaderSeals(self.secret_keys, self.namespace)

    @classmethod
    def read(
        cls,
        env: Mapping[str, str] = os.environ,
        *,
        namespace: str | None = None,
        broker_url: str | None = None,
        store_url: str | None = None,
    ) -> Self:
        """Reads the settings. Raises BadValue for one of the two URLs without the other, a bad namespace, a short key or token, or an
        unreadable file."""
        broker = broker_url if broker_url is not None else read_secret(env, "BROKER_URL")
        store = store_url if store_url is not None else read_secret(env, "STORE_URL")
        if bool(broker) != bool(store):
            there, missing = ("MQSERVE_BROKER_URL", "MQSERVE_STORE_URL") if broker else ("MQSERVE_STORE_URL", "MQSERVE_BROKER_URL")
            raise BadValue(f"{there} is set and {missing} is not: set both for the distributed form, or none for the embedded one")
        broker = _checked(broker, "MQSERVE_BROKER_URL", env)
        store = _checked(store, "MQSERVE_STORE_URL", env)
        keys = tuple(key.encode() for name in ("SECRET_KEY", "SECRET_KEY_PREVIOUS") if (key := read_secret(env, name)))
        if not broker and not keys:
            keys = (os.urandom(MIN_KEY_BYTES),)  # one process only, so nobody else needs to know the key

        def url(name: str) -> str:
            return _checked(read_secret(env, name.removeprefix(PREFIX)), name, env)

        settings = cls(
            check_namespace(namespace or env.get(PREFIX + "NAMESPACE") or "mqserve"),
            broker,
            store,
            keys,
            admin_token=_check_token(read_secret(env, "ADMIN_TOKEN")),
            replica_broker_url=url("MQSERVE_REPLICA_BROKER_URL"),
            replica_store_url=url("MQSERVE_REPLICA_STORE_URL"),
            proxy_broker_url=url("MQSERVE_PROXY_BROKER_URL"),
            proxy_store_url=url("MQSERVE_PROXY_STORE_URL"),
            trusted_users=_users(env, "MQSERVE_TRUSTED_USERS"),
            header_users=_users(env, "MQSERVE_HEADER_USERS"),
            callbacks=CallbackSettings.read(env, read_secret(env, "WEBHOOK_SECRET")),
            consumer_timeout_s=_seconds(env, "MQSERVE_CONSUMER_TIMEOUT_S", CONSUMER_TIMEOUT_S),
            result_folder=parse_result_store(env.get("MQSERVE_RESULT_STORE", "")),
        )
        _ = settings.signer  # validates the keys now, so that a short one fails here and not at the first request
        signs = bool(settings.webhook_secrets)  # validates the secret, too
        if settings.callbacks.rules.hosts and not signs:
            raise BadValue("MQSERVE_CALLBACK_HOSTS is set, and there is nothing to sign webhooks with: set MQSERVE_SECRET_KEY, too")
        return settings

    def for_replica(self) -> Self:
        """Returns the settings for a node's replica: with the replica's own credentials if the node has some for it, without the proxy's,
        the admin token and what is about webhooks."""
        return replace(self._for_child(self.replica_broker_url, self.replica_store_url), admin_token="")

    def for_proxy(self) -> Self:
        """Returns the settings for a node's proxy."""
        return self._for_child(self.proxy_broker_url, self.proxy_store_url)

    def _for_child(self, broker_url: str, store_url: str) -> Self:
        return replace(
            self, broker_url=broker_url or self.broker_url, store_url=store_url or self.store_url,
            replica_broker_url="", replica_store_url="", proxy_broker_url="", proxy_store_url="", callbacks=NO_CALLBACK_SETTINGS,
        )  # fmt: skip

    def to_env(self) -> dict[str, str]:
        """Returns the environment for a child process: URLs and keys go by environment and never by argument."""
        env = {PREFIX + "NAMESPACE": self.namespace, PREFIX + "BROKER_URL": self.broker_url, PREFIX + "STORE_URL": self.store_url}
        for name, key in zip(("SECRET_KEY", "SECRET_KEY_PREVIOUS"), self.secret_keys, strict=False):
            env[PREFIX + name] = key.decode()
        others = {
            "MQSERVE_ADMIN_TOKEN": self.admin_token,
            "MQSERVE_REPLICA_BROKER_URL": self.replica_broker_url,
            "MQSERVE_REPLICA_STORE_URL": self.replica_store_url,
            "MQSERVE_PROXY_BROKER_URL": self.proxy_broker_url,
            "MQSERVE_PROXY_STORE_URL": self.proxy_store_url,
            "MQSERVE_TRUSTED_USERS": ",".join(self.trusted_users),
            "MQSERVE_HEADER_USERS": ",".join(self.header_users),
            "MQSERVE_RESULT_STORE": self.result_folder.as_uri() if self.result_folder is not None else "",
            "MQSERVE_CONSUMER_TIMEOUT_S": "" if self.consumer_timeout_s == CONSUMER_TIMEOUT_S else f"{self.consumer_timeout_s:g}",
        }
        return env | {name: value for name, value in (others | self.callbacks.to_env()).items() if value}


DEFAULTS = Settings()


def read_secret(env: Mapping[str, str], name: str) -> str:
    """`MQSERVE_<name>`, or the content of the file that `MQSERVE_<name>_FILE` names."""
    if value := env.get(PREFIX + name):
        return value
    path = env.get(f"{PREFIX}{name}_FILE")
    if not path:
        return ""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadValue(f"{PREFIX}{name}_FILE names {path!r}, which cannot be read ({reason}): mend the path or its rights") from None


def _users(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Splits a comma-separated list."""
    return tuple(user.strip() for user in env.get(name, "").split(",") if user.strip())


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    try:
        found = float(text) if text else default
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise BadValue(f"{name} is {text!r}, and has to be a number of seconds, such as {default:g}")
    return found


def masked(url: str) -> str:
    """Returns the URL in a form fit for display: without its password, and without its query, which may hold another one."""
    parsed = URL(url).with_query(None)
    return str(parsed.with_password("***")) if parsed.password else str(parsed)


def _check_token(token: str) -> str:
    if token and not (len(token) >= MIN_TOKEN_LENGTH and token.isascii() and token.isprintable() and " " not in token):
        raise BadValue(
            f"MQSERVE_ADMIN_TOKEN needs at least {MIN_TOKEN_LENGTH} ASCII characters without spaces: make one with `openssl rand -hex 32`"
        )
    return token


def _checked(url: str, name: str, env: Mapping[str, str]) -> str:
    """Returns the URL, checked and completed for its client. Raises BadValue without showing the URL, which holds a password."""
    if not url:
        return url
    schemes = ("amqp://", "amqps://") if "BROKER" in name else ("redis://", "rediss://")
    if not url.startswith(schemes):
        shown = url.partition("://")[0] if "://" in url else "no scheme"
        raise BadValue(f"{name} has {shown}, and needs {' or '.join(schemes)}: for example {schemes[0]}localhost")
    try:
        _ = URL(url).port
    except ValueError:
        raise BadValue(
            f"{name} does not parse as a URL (it is not shown, for the password in it): write {schemes[0]}user:password@host:port, "
            "with %2F for / and %40 for @ in the password"
        ) from None
    return secured(url, name, _ca_file(env), insecure=env.get("MQSERVE_INSECURE") == "1")


def _ca_file(env: Mapping[str, str]) -> str:
    path = env.get("MQSERVE_CA_FILE", "")
    if path and not os.access(path, os.R_OK):
        raise BadValue(f"MQSERVE_CA_FILE names {path!r}, which cannot be read: it has to hold the certificates that are trusted, as PEM")
    return path
