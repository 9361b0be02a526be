"""TLS to broker and store, as their URLs ask for it. Certificates are verified unless an operator explicitly turns that off."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from yarl import URL

from ..errors import BadValue

UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"  # OpenSSL's name for it
UNTRUSTED_MEND = "MQSERVE_CA_FILE names the authority that signed it, and the URL names the server as the certificate does"

_CA_PARAMETERS = {"amqps": ("cafile", "capath", "cadata"), "rediss": ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")}
_YES = ("1", "true", "yes", "t", "y")


def secured(url: str, name: str, ca_file: str, *, insecure: bool) -> str:
    """Returns the URL, with `ca_file` added if it uses TLS and names no authority of its own.

    Raises BadValue where the URL turns verification off; the message names the variable and shows nothing of the URL.
    """
    parsed = URL(url)
    if parsed.scheme not in _CA_PARAMETERS:
        return url
    if not insecure and (how := _unverified(parsed.query)):
        raise BadValue(
            f"{name} says {how}, so anybody on the way could read and change everything: name your own authority by MQSERVE_CA_FILE "
            "instead, or say MQSERVE_INSECURE=1"
        )
    parameters = _CA_PARAMETERS[parsed.scheme]
    if not ca_file or any(parameter in parsed.query for parameter in parameters):
        return url
    return f"{url}{'&' if parsed.query_string else '?'}{parameters[0]}={quote(ca_file)}"


def _unverified(query: Mapping[str, str]) -> str:
    """Returns the URL parameter (aiormq's or redis-py's) that turns verification off, else an empty string."""
    if query.get("no_verify_ssl", "0") != "0":
        return f"no_verify_ssl={query['no_verify_ssl']}"
    if query.get("ssl_cert_reqs", "required") != "required":
        return f"ssl_cert_reqs={query['ssl_cert_reqs']}"
    if query.get("ssl_check_hostname", "1").lower() not in _YES:
        return f"ssl_check_hostname={query['ssl_check_hostname']}"
    return ""
