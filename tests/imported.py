"""What tests deploy by its import string."""

from typing import Any


class Threshold:
    def reconfigure(self, config: dict[str, Any]) -> None:
        self.threshold = config["threshold"]

    def __call__(self, request: Any) -> Any:
        return self.threshold

    def twice(self, request: Any) -> Any:
        return self.threshold * 2
