"""What is checked of a request line beyond what the parser checks: the protocol that it names, and the form of its target."""

from __future__ import annotations

import re

import httptools

_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(/[^#]*)?", re.IGNORECASE)


class Refused(Exception):
    """Raised while a request is read; `status` and `detail` are the answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def check_protocol(url: bytes, head: bytes) -> None:
    """For a request line that came in pieces, or has more than one space behind the target; `head` is what came of the head. Raises Refused
    for another protocol, such as RTSP, which the parser takes for HTTP."""
    if re.search(b" %b +HTTP/" % re.escape(url), head) is None:
        raise Refused(505, "this is HTTP/1.1, and the request says another protocol")


def not_http(error: httptools.HttpParserError, url: bytes, head: bytes) -> Refused:
    """Returns the refusal of what the parser gave up on: a request line with another protocol or version gets to know that. `head` is what
    came of the head, if it was in that."""
    line = rb"(?m)^\S+ +%b +([A-Za-z][\w.+-]*/\d+\.\d+)\r?$" % (re.escape(url) or rb"\S+")
    for protocol in re.findall(line, head):
        if protocol not in (b"HTTP/1.0", b"HTTP/1.1"):
            return Refused(505, f"this is HTTP/1.1, and the request says {protocol.decode()}")
    return Refused(400, f"this is not HTTP/1.1 as RFC 9112 has it ({error})")


def origin_form(url: bytes, method: bytes, host: bytes) -> bytes:
    """Returns the path of `http://host/path`, which every server must take, only where it says the same as the Host header."""
    if url == b"*" and method == b"OPTIONS":
        return url
    absolute = _ABSOLUTE.fullmatch(url)
    if absolute is None or absolute[1].lower() != host.lower():
        raise Refused(400, "the request target must be a path, or a URL of the host that the Host header names")
    return absolute[2] or b"/"
