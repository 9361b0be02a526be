"""Run the tests on real servers: `python -m tests.run_tests [pytest arguments]`, which is what `make test` does.

Takes the servers of MQSERVE_TEST_BROKER_URL and MQSERVE_TEST_STORE_URL, else makes sure that RabbitMQ and Redis can be
started (see tests/servers.py), installing them where that needs no password; in CI also the browser of tests/browsers.py.
"""

import os
import shutil
import subprocess
import sys

from tests.browsers import find_browser
from tests.server_programs import HOW_TO_INSTALL, missing_servers

APT_INSTALL = """
# Only the programs are wanted: without this file Debian would start the services, on the ports of the machine's own.
policy=/usr/sbin/policy-rc.d
if [ -e "$policy" ]; then
    "$policy" rabbitmq-server start && { echo "$policy lets new services start: not installing" >&2; exit 1; }
    [ $? -eq 101 ] || { echo "$policy does not say whether new services start: not installing" >&2; exit 1; }
else
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\\nexit 101\\n' > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends "$@"
if [ -d /run/systemd/system ]; then systemctl disable "$@"; fi  # nor at the next boot
"""


def main() -> None:
    given = [name for name in ("MQSERVE_TEST_BROKER_URL", "MQSERVE_TEST_STORE_URL") if os.environ.get(name)]
    if len(given) == 1:
        sys.exit(f"Only {given[0]} is set: set both test URLs, or neither to use private servers.")
    if not given:
        ensure_servers()
    if os.environ.get("CI") and find_browser() is None:  # elsewhere its tests are skipped
        install_browser()
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]])


def ensure_servers() -> None:
    missing = missing_servers()
    if missing and (root := become_root()) is not None and shutil.which("apt-get"):
        print(f"{', '.join(missing)}: installing with apt-get, without starting any service", flush=True)
        packages = [program for program in ("rabbitmq-server", "redis-server") if any(program in line for line in missing)]
        subprocess.run([*root, "/bin/sh", "-ec", APT_INSTALL, "install", *packages], check=False)
        missing = missing_servers()
    if missing:
        sys.exit(f"The tests run on real servers, and {', '.join(missing)}.\n{HOW_TO_INSTALL}")


def install_browser() -> None:
    if (root := become_root()) is not None and shutil.which("apt-get"):
        print("Chromium is not installed: installing with apt-get", flush=True)
        subprocess.run([*root, "apt-get", "update", "--quiet"], check=False)
        quietly = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--quiet", "--yes", "--no-install-recommends")
        subprocess.run([*root, *quietly, "chromium", "chromium-driver"], check=False)


def become_root() -> list[str] | None:
    """What to put before a command to run it as root without a password; None where that is not possible."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True).returncode == 0:
        return [sudo, "-n"]
    return None


if __name__ == "__main__":
    main()
