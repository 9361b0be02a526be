"""What tests deploy by its import string, and what handlers import since it does not travel."""

from contextvars import ContextVar
from typing import Any

import msgspec

COLOR: ContextVar[str] = ContextVar("COLOR", default="none")


class OrderStruct(msgspec.Struct):
    pieces: int
    items: list[dict[str, float]] = []


class Threshold:
    def reconfigure(self, config: dict[str, Any]) -> None:
        self.threshold = config["threshold"]

    def __call__(self, request: Any) -> Any:
        return self.threshold

    def twice(self, request: Any) -> Any:
        return self.threshold * 2
