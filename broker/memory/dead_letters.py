"""Dead letters in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from ..dead_letters import DeadLetter
from ..queue_names import DEAD_LETTER_LIMIT


class EmbeddedDeadLetters:
    """Implements `DeadLetters`."""

    def __init__(self, letters: deque[DeadLetter], at_most: int | None) -> None:
        self._letters = letters
        self._at_most = at_most
        self.waiting = len(letters)
        self.is_read_elsewhere = False
        self._held: list[DeadLetter] = []

    def __repr__(self) -> str:
        return f"<EmbeddedDeadLetters {len(self._held)} held>"

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        for _ in range(self.waiting if self._at_most is None else min(self._at_most, self.waiting)):
            if not self._letters:
                return
            self._held.append(letter := self._letters.popleft())
            yield letter

    async def remove(self, letter: DeadLetter) -> None:
        self._held = [held for held in self._held if held is not letter]

    def put_back(self) -> None:
        """Puts the held letters back. If there is no room for all, the oldest are dropped."""
        room = DEAD_LETTER_LIMIT - len(self._letters)
        self._letters.extendleft(self._held[: -room - 1 : -1])
