"""Whether an address or a Host header is of this machine and of no network."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")  # an address in brackets or a name, and perhaps a port: nothing else


def is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)  # what an IPv4 peer is called where the listener speaks IPv6
    return (mapped or ip).is_loopback


def names_loopback(host_header: str) -> bool:
    """Whatever the port. A name that only resolves to this machine does not count: a page elsewhere may own it (DNS rebinding)."""
    found = _HOST.fullmatch(host_header)
    host = (found[1] or found[2]) if found else ""
    return host.lower() == "localhost" or is_loopback(host)
