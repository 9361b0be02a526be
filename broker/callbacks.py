"""Callback URLs: where an instance tells of the ends of jobs. Who may be told is a setting of the controllers (`MQSERVE_CALLBACK_HOSTS`),
which the leading one writes into the observed document, so that proxies and clients can refuse the others."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from yarl import URL

from .errors import BadValue

MAX_URL_LENGTH = 2000

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_PORT = re.compile(r":(\*|[0-9]{1,5})")
ANY_PORT = "*"
_WRITTEN = re.compile(r"[!-\[\]-~]+")  # printable ASCII without blanks and backslashes, which parsers read in different ways


class NotAllowed(BadValue):
    """A callback URL that other settings would allow."""


class CallbackRules(msgspec.Struct, frozen=True):
    """Which callback URLs are taken: those of these hosts, by http only if that is allowed. Each host is a name, or `*.` and the end of
    one, with `:` and a port behind it (`*` for any) if that is not the one of the scheme."""

    hosts: tuple[str, ...] = ()
    http: bool = False

    def check(self, url: str) -> URL:
        """Returns the URL, parsed, with its path and query as they are written. Raises NotAllowed for one that these settings refuse, and
        BadValue for any other that is not taken, with the reason."""
        if len(url) > MAX_URL_LENGTH or not _WRITTEN.fullmatch(url):
            raise BadValue(f"a callback URL has at most {MAX_URL_LENGTH} characters of ASCII, without blanks: percent-encode the others")
        try:
            parsed = URL(url, encoded=True)
            host, port = (parsed.raw_host or "").rstrip(".").lower(), parsed.port
        except ValueError as error:
            raise BadValue(f"the callback URL does not parse ({error}): write it as https://host/path") from None
        if parsed.scheme not in ("https", "http") or not host:
            raise BadValue("a callback URL begins with https:// and a host, such as https://hooks.example.com/jobs")
        if parsed.raw_user is not None or parsed.raw_password is not None or parsed.raw_fragment:
            raise BadValue("a callback URL has no user, no password and no fragment: what it is sent is signed instead")
        if not self.hosts:
            raise BadValue("this instance calls nobody back: set MQSERVE_CALLBACK_HOSTS for its controllers, or ask for the result")
        ports = {its_port for its_host, its_port in map(_divided, self.hosts) if _matches(host, its_host)}
        if not ports:
            raise NotAllowed(f"{host!r} is none of the hosts that may be called back: its operator lists them in MQSERVE_CALLBACK_HOSTS")
        if not ports & {ANY_PORT, str(port), "" if parsed.is_default_port() else None}:
            raise NotAllowed(f"{host!r} may not be called back at port {port}: its operator lists host:port in MQSERVE_CALLBACK_HOSTS")
        if parsed.scheme == "http" and not self.http:
            raise NotAllowed("a callback URL begins with https://: http:// is taken only if the controllers have MQSERVE_CALLBACK_HTTP=1")
        return parsed


NO_CALLBACKS = CallbackRules()


@dataclass(frozen=True, slots=True)
class CallbackSettings:
    """What controllers are told of callbacks. Receivers have global addresses, or one of `networks`. Without a `secret` there are those
    that are derived from the instance's keys."""

    rules: CallbackRules = NO_CALLBACKS
    networks: tuple[Network, ...] = ()
    secret: str = field(default="", repr=False)

    @classmethod
    def read(cls, env: Mapping[str, str], secret: str) -> CallbackSettings:
        """Raises BadValue."""
        hosts = tuple(host.lower() for host in _listed(env, "MQSERVE_CALLBACK_HOSTS"))
        for host in hosts:
            name, port = _divided(host)
            if not (_HOST.fullmatch(name) or _is_address(name)) or (port not in ("", ANY_PORT) and not 1 <= int(port) <= 65535):
                raise BadValue(
                    f"MQSERVE_CALLBACK_HOSTS names {host!r}: write names of hosts, such as hooks.example.com, *.example.com or "
                    "hooks.example.com:8443"
                )
        rules = CallbackRules(hosts, http=env.get("MQSERVE_CALLBACK_HTTP") == "1")
        return cls(rules, tuple(map(_network, _listed(env, "MQSERVE_CALLBACK_NETWORKS"))), secret)

    def to_env(self) -> dict[str, str]:
        """Returns the variables that `read` reads."""
        return {
            "MQSERVE_CALLBACK_HOSTS": ",".join(self.rules.hosts),
            "MQSERVE_CALLBACK_HTTP": "1" if self.rules.http else "",
            "MQSERVE_CALLBACK_NETWORKS": ",".join(map(str, self.networks)),
            "MQSERVE_WEBHOOK_SECRET": self.secret,
        }


NO_CALLBACK_SETTINGS = CallbackSettings()


def receiver_of(url: str) -> str:
    """Returns the host of a callback URL, to be shown: the rest of the URL may hold a secret. Empty where it does not parse."""
    try:
        return URL(url, encoded=True).raw_host or ""
    except ValueError:
        return ""


def _divided(host: str) -> tuple[str, str]:
    """Returns a host of the settings, and its port; empty without one. An IPv6 address with a port has brackets."""
    if _is_address(host):
        return host, ""
    end = host.rfind(":")
    name, port = (host[:end], host[end + 1 :]) if end >= 0 and _PORT.fullmatch(host, end) else (host, "")
    return name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name, port


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) and len(host) >= len(allowed) if allowed.startswith("*.") else host == allowed


def _listed(env: Mapping[str, str], name: str) -> list[str]:
    return [part.strip() for part in env.get(name, "").split(",") if part.strip()]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise BadValue(f"MQSERVE_CALLBACK_NETWORKS names {text!r} ({error}): write networks such as 10.20.0.0/16") from None
