"""What a server said no to, or is not trusted in, as a sentence for whoever sets it up."""

from __future__ import annotations

import re
from typing import Any

import redis.asyncio as redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from yarl import URL

_MEND = "`mqserve setup --print` shows the rights of each role"
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
_TRUST = "MQSERVE_CA_FILE names the authority that signed it, and the URL names the server as the certificate does"


class ExplainedRedis(redis.Redis):
    """A client whose refusals name the command and the key: Redis 7.0 itself says only "one of the keys"."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except NoPermissionError as error:
            keys = [argument for argument in args[1:] if isinstance(argument, str) and argument.startswith("mqserve:")]
            raise NoPermissionError(f"{' '.join([str(args[0]), *keys[:1]])}: {error}") from None


def store_refusal(error: BaseException, url: str) -> str:
    """The sentence, or nothing when Redis failed in another way."""
    user = URL(url).user or "default"
    if _UNTRUSTED in str(error):
        return f"Redis's certificate is not trusted ({error}): {_TRUST}"
    if isinstance(error, NoPermissionError) or "The user executing the script" in str(error):
        return f"Redis does not let user {user!r} do what this process needs ({error}): {_MEND}"
    if isinstance(error, AuthenticationError) or (isinstance(error, RedisError) and str(error).startswith("NOAUTH")):
        return f"Redis refuses the login of user {user!r} ({error}): is the URL's password the one it was given? {_MEND}"
    return ""


def broker_refusal(error: BaseException | None, url: str = "") -> str:
    """The sentence, or nothing when RabbitMQ failed in another way."""
    text = str(error)
    if _UNTRUSTED in text:
        return f"RabbitMQ's certificate is not trusted ({error}): {_TRUST}"
    if "Login was refused" in text:
        user = URL(url).user or "guest"
        return f"RabbitMQ refuses the login of user {user!r}: does it exist, and is the URL's password the one it was given? {_MEND}"
    if "Connection.OpenOk" in text and "Connection.Close" in text:
        vhost = URL(url).path.removeprefix("/") or "/"
        return (
            f"RabbitMQ does not open virtual host {vhost!r} for user {URL(url).user or 'guest'!r}: make it with `rabbitmqctl add_vhost`, "
            f"or give the user rights in it. {_MEND}"
        )
    if found := re.search(r"(?:(\w+) )?access to (\w+) '(.+?)' (?:in vhost '.+?' )?refused for user '(.+?)'", text):
        kind, what, name, user = found.groups()
        return f"RabbitMQ does not let user {user!r} do this: it lacks {kind or 'a right of'} access to {what} {name!r}. {_MEND}"
    return ""
