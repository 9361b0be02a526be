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
_WRITTEN = re.compile(r"[!-\[\]-~]+")  # printable ASCII without blanks and backslashes, which parsers read in different ways


class CallbackRules(msgspec.Struct, frozen=True):
    """Which callback URLs are taken: those of these hosts, each a name or `*.` and the end of one; by http only if that is allowed."""

    hosts: tuple[str, ...] = ()
    http: bool = False

    def check(self, url: str) -> URL:
        """Returns the URL, parsed. Raises BadValue for one that is not taken, with the reason."""
        if len(url) > MAX_URL_LENGTH or not _WRITTEN.fullmatch(url):
            raise BadValue(f"a callback URL has at most {MAX_URL_LENGTH} characters of ASCII, without blanks: percent-encode the others")
        try:
            parsed = URL(url)
            host, _ = (parsed.raw_host or "").rstrip(".").lower(), parsed.port
        except ValueError as error:
            raise BadValue(f"the callback URL does not parse ({error}): write it as https://host/path") from None
        if parsed.scheme not in ("https", "http") or not host:
            raise BadValue("a callback URL begins with https:// and a host, such as https://hooks.example.com/jobs")
        if parsed.raw_user is not None or parsed.raw_password is not None or parsed.raw_fragment:
            raise BadValue("a callback URL has no user, no password and no fragment: what it is sent is signed instead")
        if not self.hosts:
            raise BadValue("this instance calls nobody back: set MQSERVE_CALLBACK_HOSTS for its controllers, or ask for the result")
        if not any(_matches(host, allowed) for allowed in self.hosts):
            raise BadValue(f"{host!r} is none of the hosts that may be called back: its operator lists them in MQSERVE_CALLBACK_HOSTS")
        if parsed.scheme == "http" and not self.http:
            raise BadValue("a callback URL begins with https://: http:// is taken only if the controllers have MQSERVE_CALLBACK_HTTP=1")
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
            if not _HOST.fullmatch(host) and not _is_address(host):
                raise BadValue(f"MQSERVE_CALLBACK_HOSTS names {host!r}: write names of hosts, such as hooks.example.com or *.example.com")
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
