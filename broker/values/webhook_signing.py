"""The signatures of webhooks, as Standard Webhooks say (symmetric ones, `v1`): receivers check them with a library of that."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from ..errors import BadValue

PREFIX = "whsec_"
_MIN_BYTES, _MAX_BYTES = 24, 64


class WebhookSigner:
    """Signs with each of the secrets, so that receivers may have an earlier one while the key is changed."""

    def __init__(self, secrets: Sequence[bytes], namespace: str) -> None:
        self._secrets = secrets
        self._namespace = namespace

    def __repr__(self) -> str:
        return f"<WebhookSigner with {len(self._secrets)} secrets>"

    def id_of(self, job_id: str, event: str) -> str:
        """Returns the id of a webhook, by which its receiver knows it again: also if the key is changed before it is sent once more. It is
        no secret, and travels beside the job's id."""
        return "msg_" + hashlib.sha256(f"{self._namespace}\0{job_id}\0{event}".encode()).hexdigest()[:40]

    def headers(self, webhook_id: str, body: bytes, now_s: int) -> dict[str, str]:
        signed = b"%s.%d.%s" % (webhook_id.encode(), now_s, body)
        signatures = [base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in self._secrets]
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(now_s),
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }


def derived_secret(key: bytes, namespace: str) -> bytes:
    """Returns the secret of an instance that was given none. It says nothing about the key."""
    return hmac.digest(key, f"mqserve webhooks {namespace}".encode(), hashlib.sha256)


def written(secret: bytes) -> str:
    """Returns a secret as receivers are given it."""
    return PREFIX + base64.b64encode(secret).decode()


def read_webhook_secrets(text: str) -> tuple[bytes, ...]:
    """Returns those of a list with commas. Raises BadValue, without showing a secret."""
    return tuple(_read(part.strip()) for part in text.split(",") if part.strip())


def _read(text: str) -> bytes:
    try:
        secret = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not (text.startswith(PREFIX) and _MIN_BYTES <= len(secret) <= _MAX_BYTES):
        raise BadValue(
            f"MQSERVE_WEBHOOK_SECRET must be {PREFIX} and {_MIN_BYTES} to {_MAX_BYTES} bytes in base64, or several of these with commas "
            f'between them: make one with `echo "{PREFIX}$(openssl rand -base64 32)"`'
        )
    return secret
