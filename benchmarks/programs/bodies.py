"""A handler that answers with the JSON it got, and one that answers with the length of the body."""

from typing import Any

import mqserve as serve


@serve.endpoint("/json", methods=["POST"])
async def json(request: serve.Request) -> Any:
    return request.data


@serve.endpoint("/length", methods=["POST"])
async def length(request: serve.Request) -> str:
    return str(len(request.data))
