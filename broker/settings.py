"""Where an instance is and how its processes trust each other: read once, from arguments and the environment, and handed on whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from yarl import URL

from .errors import BadValue
from .queue_names import check_namespace
from .signing import MIN_KEY_BYTES, Signer

PREFIX = "MQSERVE_"
MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """Precedence of every field: argument or flag, environment (`MQSERVE_*`, or a file named by `MQSERVE_*_FILE`), default."""

    namespace: str = "mqserve"
    broker_url: str = field(default="", repr=False)
    store_url: str = field(default="", repr=False)
    secret_keys: tuple[bytes, ...] = field(default=(), repr=False)
    admin_token: str = field(default="", repr=False)  # opens the system paths of a proxy to other machines

    @property
    def embedded(self) -> bool:
        """Whether the queue and the store live in this process."""
        return not self.broker_url

    @property
    def signer(self) -> Signer:
        return Signer(self.secret_keys, self.namespace)

    @classmethod
    def read(
        cls,
        env: Mapping[str, str] = os.environ,
        *,
        namespace: str | None = None,
        broker_url: str | None = None,
        store_url: str | None = None,
    ) -> Self:
        """Raises BadValue for one of the two URLs without the other, a bad namespace, a short key or token, or an unreadable file."""
        broker = broker_url if broker_url is not None else read_secret(env, "BROKER_URL")
        store = store_url if store_url is not None else read_secret(env, "STORE_URL")
        if bool(broker) != bool(store):
            there, missing = ("MQSERVE_BROKER_URL", "MQSERVE_STORE_URL") if broker else ("MQSERVE_STORE_URL", "MQSERVE_BROKER_URL")
            raise BadValue(f"{there} is set and {missing} is not: set both for the distributed form, or none for the embedded one")
        _check_scheme(broker, ("amqp://", "amqps://"), "MQSERVE_BROKER_URL")
        _check_scheme(store, ("redis://", "rediss://"), "MQSERVE_STORE_URL")
        keys = tuple(key.encode() for name in ("SECRET_KEY", "SECRET_KEY_PREVIOUS") if (key := read_secret(env, name)))
        if not broker and not keys:
            keys = (os.urandom(MIN_KEY_BYTES),)  # one process: nobody else needs to know it
        token = _check_token(read_secret(env, "ADMIN_TOKEN"))
        settings = cls(check_namespace(namespace or env.get(PREFIX + "NAMESPACE") or "mqserve"), broker, store, keys, token)
        _ = settings.signer  # a key that is too short is said now, not at the first request
        return settings

    def to_env(self) -> dict[str, str]:
        """For a child process: URLs and keys go by environment, never by argument."""
        env = {PREFIX + "NAMESPACE": self.namespace, PREFIX + "BROKER_URL": self.broker_url, PREFIX + "STORE_URL": self.store_url}
        for name, key in zip(("SECRET_KEY", "SECRET_KEY_PREVIOUS"), self.secret_keys, strict=False):
            env[PREFIX + name] = key.decode()
        if self.admin_token:
            env[PREFIX + "ADMIN_TOKEN"] = self.admin_token
        return env


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


def masked(url: str) -> str:
    """The URL as it may be shown: without its password."""
    parsed = URL(url)
    return str(parsed.with_password("***")) if parsed.password else str(parsed)


def _check_token(token: str) -> str:
    if token and not (len(token) >= MIN_TOKEN_LENGTH and token.isascii() and token.isprintable() and " " not in token):
        raise BadValue(
            f"MQSERVE_ADMIN_TOKEN needs at least {MIN_TOKEN_LENGTH} ASCII characters without spaces: make one with `openssl rand -hex 32`"
        )
    return token


def _check_scheme(url: str, schemes: tuple[str, ...], name: str) -> None:
    if url and not url.startswith(schemes):
        shown = url.partition("://")[0] if "://" in url else "no scheme"
        raise BadValue(f"{name} has {shown}, and needs {' or '.join(schemes)}: for example {schemes[0]}localhost")
