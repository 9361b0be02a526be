"""Ids of requests that every proxy of one port recognizes: the one that is asked to cancel a request may not be the one that sent it."""

from __future__ import annotations

from hashlib import blake2b
from hmac import compare_digest

from ..broker.envelope import mint_id

_RANDOM_DIGITS, _MARK_BYTES = 24, 4


class CommonIds:
    """Mints ids of 96 random bits and a mark of 32 bits, which is their keyed hash. `key` is known to the proxies of the port only, so an
    id is as hard to guess as any."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<CommonIds>"

    def mint(self) -> str:
        random = mint_id()[:_RANDOM_DIGITS]
        return random + self._mark(random)

    def are_ours(self, future_id: str) -> bool:
        """Whether one of the port's proxies has minted the id."""
        return compare_digest(self._mark(future_id[:_RANDOM_DIGITS]), future_id[_RANDOM_DIGITS:])

    def _mark(self, random: str) -> str:
        return blake2b(random.encode(), key=self._key, digest_size=_MARK_BYTES).hexdigest()
