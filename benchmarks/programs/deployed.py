"""An instance with so many backends, and so many routes to them: `deployed.py PORT BACKENDS ROUTES`. The path of route 7 is /r7."""

import signal
import sys

import mqserve as serve


async def noop(request: serve.Request) -> str:
    return "ok"


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background program begins with SIGINT ignored
    port, backends, routes = map(int, sys.argv[1:])
    client = serve.start(http_options={"port": port})
    with client.deploying():
        for number in range(backends):
            client.create_backend(f"b{number}", noop)
        for number in range(routes):
            client.create_endpoint(f"r{number}", backend=f"b{number % backends}", route=f"/r{number}")
    try:
        signal.pause()
    except KeyboardInterrupt:
        client.shutdown()


if __name__ == "__main__":
    main()
