"""Eight backends of one replica each, which `idle.py` leaves alone."""

import mqserve as serve

BACKENDS = 8


def noop(request: serve.Request) -> str:
    return "ok"


for number in range(BACKENDS):
    serve.endpoint(f"/idle{number}", name=f"idle{number}")(noop)
