"""BentoML: python server.py PORT noop|bodies, which are the paths it serves. It takes JSON by POST alone."""

import os
import sys
from typing import Any

import bentoml

OPTIONS = {"workers": 1, "logging": {"access": {"enabled": False}}}


@bentoml.service(**OPTIONS)
class Noop:
    @bentoml.api(route="/noop")
    def noop(self) -> str:
        return "ok"

    @bentoml.api(route="/async_noop")
    async def async_noop(self) -> str:
        return "ok"


@bentoml.service(**OPTIONS)
class Bodies:
    @bentoml.api(route="/json")
    async def json(self, items: list[Any]) -> dict[str, Any]:
        return {"items": items}

    @bentoml.api(route="/length")
    async def length(self, data: str) -> str:
        return str(len(data))


if __name__ == "__main__":
    port, kind = sys.argv[1:]
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", f"server:{kind.title()}", "--port", port, "--host", "127.0.0.1"])
