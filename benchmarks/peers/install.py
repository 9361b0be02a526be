"""Makes the peers' environments under .venv-peers/, each from its pinned requirements.txt; one that cannot be installed is said.

make bench-peers                (or: python -m benchmarks.peers.install ray celery)
"""

from __future__ import annotations

import subprocess
import sys
import venv

from . import ENVIRONMENTS, FOLDER, PEERS


def main() -> None:
    for folder in dict.fromkeys(PEERS[name].folder for name in sys.argv[1:] or PEERS):
        requirements, environment = FOLDER / folder / "requirements.txt", ENVIRONMENTS / folder
        stamp = environment / ".installed"
        if stamp.exists() and stamp.read_text() == requirements.read_text():
            continue
        print(f"installing {folder} into .venv-peers/{folder}", flush=True)
        venv.create(environment, clear=True, with_pip=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--requirement", str(requirements)]).returncode == 0:
            stamp.write_text(requirements.read_text())
        else:
            print(f"{folder} could not be installed, and is left out of `make bench`", file=sys.stderr)


if __name__ == "__main__":
    main()
