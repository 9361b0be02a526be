"""Memory that a process has freed serves its next large body, without new pages from the kernel."""

import platform
import subprocess
import sys

import pytest

COPIES_OF_1_MB = """
import os, resource, sys, threading
from mqserve.broker.process.freed_memory import keep_freed_memory

def copy(times):
    for _ in range(times):
        first = b"".join([b"x" * 131072] * 8)
        second = first[:-1]

def faults():
    copy(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    copy(100)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

keep_freed_memory()
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""
ALL_NEW = 100 * 256


def page_faults(**env: str) -> list[int]:
    """Of a hundred times two copies: in the main thread, and in another one."""
    told = subprocess.run([sys.executable, "-c", COPIES_OF_1_MB], env=env, capture_output=True, text=True, check=True, timeout=60)
    return [int(line) for line in told.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc")
def test_copies_of_a_large_body_take_no_new_pages() -> None:
    assert max(page_faults()) < ALL_NEW / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc")
def test_limits_that_the_environment_sets_stay() -> None:
    assert min(page_faults(MALLOC_TRIM_THRESHOLD_="131072")) > ALL_NEW
