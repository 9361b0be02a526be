"""Server-sent events of a handler that yields, and the page that shows them as they come:

    mqserve run examples/events.py

Then open http://127.0.0.1:8000/ in a browser. A browser whose connection is cut comes back by itself and goes on where it was.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.responses import HTMLResponse

import mqserve as serve

STEPS = 12
STEP_S = 0.25  # the time that each step of the work takes
PAGE = Path(__file__).with_name("sse.html").read_text()


@serve.endpoint("/", methods=["GET"])
def page(request: serve.Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


@serve.endpoint("/work", methods=["GET"])
async def work(request: serve.Request) -> AsyncIterator[dict[str, int]]:
    for step in range(1, STEPS + 1):
        yield {"step": step, "of": STEPS}
        await asyncio.sleep(STEP_S)
