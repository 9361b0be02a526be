"""The servers of a newer Debian than this machine's: `python -m tests.newer_servers FOLDER`, which is what `make test-newer` does.

Makes a small Debian in FOLDER/debian, and in FOLDER/bin programs that start its RabbitMQ (4.0) and Redis (8.0): name that
folder in MQSERVE_TEST_SERVERS and the tests take them. Only for root on Debian: `debootstrap` and `chroot` are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

RELEASE = "trixie"
PACKAGES = ("rabbitmq-server", "redis-server")
PROGRAMS = {
    "rabbitmq-server": "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",
    "rabbitmqctl": "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmqctl",
    "redis-server": "/usr/bin/redis-server",
    "epmd": "/usr/bin/epmd",
}
# In a mount namespace of its own, which goes with the program: the servers' folders are below /tmp, and Erlang reads /proc.
WRAPPER = """#!/bin/sh
root={root}
exec unshare --mount /bin/sh -ec '
    root=$0
    mount --bind /tmp "$root/tmp"
    mount -t proc proc "$root/proc"
    exec chroot "$root" "$@"
' "$root" {program} "$@"
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.newer_servers FOLDER")
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit("A newer Debian beside this one needs root, on Debian: name other servers in MQSERVE_TEST_SERVERS instead.")
    folder = Path(sys.argv[1]).resolve()
    root, programs = folder / "debian", folder / "bin"
    if not (root / "usr/bin/redis-server").exists():
        install(root)
    programs.mkdir(exist_ok=True)
    for name, pattern in PROGRAMS.items():
        (found,) = root.glob(pattern.lstrip("/"))
        path = programs / name
        path.write_text(WRAPPER.format(root=root, program=f"/{found.relative_to(root)}"))
        path.chmod(0o755)


def install(root: Path) -> None:
    if shutil.which("debootstrap") is None:
        subprocess.run(["apt-get", "update", "--quiet"], check=True)
        subprocess.run(["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", "debootstrap"], check=True)
    print(f"making a Debian {RELEASE} in {root}", flush=True)
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(root)], check=True)


if __name__ == "__main__":
    main()
