"""Handlers that do nothing, so that the benchmark measures the path of a request alone."""

import mqserve as serve


@serve.endpoint("/noop")
def noop(request: serve.Request) -> str:
    return "ok"


@serve.endpoint("/async_noop")
async def async_noop(request: serve.Request) -> str:
    return "ok"
