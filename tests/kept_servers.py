"""A RabbitMQ and a Redis to debug on: `python -m tests.kept_servers` prints the variables that name them, and ends both at Ctrl-C."""

import signal
from contextlib import suppress

from tests.instances import SECRET_KEY
from tests.servers import PrivateRabbitMQ, PrivateRedis


def main() -> None:
    with PrivateRabbitMQ() as broker, PrivateRedis() as store:
        for prefix in ("MQSERVE_TEST_", "MQSERVE_"):
            print(f"export {prefix}BROKER_URL='{broker.url}' {prefix}STORE_URL='{store.url}'")
        print(f"export MQSERVE_SECRET_KEY='{SECRET_KEY}'", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
