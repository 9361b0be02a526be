"""Tells whether an address or a Host header belongs to this machine alone."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")  # an address in brackets or a name, with an optional port


def is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)  # the form of an IPv4 peer's address on an IPv6 listener
    return (mapped or ip).is_loopback


def names_loopback(host_header: str) -> bool:
    """Whether the header names this machine, with any port. A name that merely resolves to this machine does not count, since another
    site may own it (DNS rebinding)."""
    found = _HOST.fullmatch(host_header)
    host = (found[1] or found[2]) if found else ""
    return host.lower() == "localhost" or is_loopback(host)
