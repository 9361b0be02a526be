"""Turns RabbitMQ's refusals, and untrusted certificates, into sentences for operators."""

from __future__ import annotations

import re

from yarl import URL

from ..errors import RIGHTS_MEND
from ..process.tls import UNTRUSTED, UNTRUSTED_MEND


def broker_refusal(error: BaseException | None, url: str = "") -> str:
    """Returns the sentence, or an empty string if RabbitMQ failed in another way."""
    text = str(error)
    if UNTRUSTED in text:
        return f"RabbitMQ's certificate is not trusted ({error}): {UNTRUSTED_MEND}"
    if "Login was refused" in text:
        user = URL(url).user or "guest"
        return f"RabbitMQ refuses the login of user {user!r}: does it exist, and is the URL's password the one it was given? {RIGHTS_MEND}"
    if "Connection.OpenOk" in text and "Connection.Close" in text:
        vhost = URL(url).path.removeprefix("/") or "/"
        return (
            f"RabbitMQ does not open virtual host {vhost!r} for user {URL(url).user or 'guest'!r}: make it with `rabbitmqctl add_vhost`, "
            f"or give the user rights in it. {RIGHTS_MEND}"
        )
    if found := re.search(r"(?:(\w+) )?access to (\w+) '(.+?)' (?:in vhost '.+?' )?refused for user '(.+?)'", text):
        kind, what, name, user = found.groups()
        return f"RabbitMQ does not let user {user!r} do this: it lacks {kind or 'a right of'} access to {what} {name!r}. {RIGHTS_MEND}"
    return ""
