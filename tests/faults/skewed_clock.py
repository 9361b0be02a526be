"""An mqserve command whose wall clock jumps: `python -m tests.faults.skewed_clock SECONDS -- proxy`.

It is so many seconds fast for two seconds, then as many slow, and so on. The monotonic clock goes on as it does everywhere.
"""

import sys
import time

JUMPS_EVERY_S = 2.0


def command(skew_s: float, *arguments: str) -> list[str]:
    """What to start: `mqserve` with these arguments, on such a clock."""
    return [sys.executable, "-m", "tests.faults.skewed_clock", str(skew_s), "--", *arguments]


def main() -> None:
    skew_s, _, *arguments = sys.argv[1:]
    skew(float(skew_s))
    sys.argv = ["mqserve", *arguments]
    from mqserve.commands.cli import main as run

    run()


def skew(seconds: float) -> None:
    right_time = time.time

    def wrong_time() -> float:
        is_fast = time.monotonic() % (2 * JUMPS_EVERY_S) < JUMPS_EVERY_S
        return right_time() + (seconds if is_fast else -seconds)

    time.time = wrong_time
    time.time_ns = lambda: int(wrong_time() * 1e9)


if __name__ == "__main__":
    main()
