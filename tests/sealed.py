"""Headers as mqserve's own senders put them on a message, for tests that stand in for one, or in the way of one."""

from collections.abc import Sequence
from typing import Any

from mqserve.broker.dead_letters import read_properties
from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.values.header_seals import HeaderSeals
from tests.instances import SECRET_KEY


def sealed(
    namespace: str,
    backend: str,
    message_id: str,
    header: Header,
    *,
    body: bytes = b"",
    content_type: str = "application/json",
    keys: Sequence[str] = (SECRET_KEY,),
) -> dict[str, Any]:
    """`mq` and `mq-seal` for a message with these."""
    seals = HeaderSeals([key.encode() for key in keys], namespace).of(backend)
    packed = Envelope(message_id, body, content_type, header).to_amqp("", seals)
    return {name: bytes(value) for name, value in (read_properties(packed).headers or {}).items()}  # type: ignore[arg-type]
