"""The memory of a step serves the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from vjepa.train.memory import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from vjepa.train.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()
def work():
    for megabytes in (3, 40, 70):
        a = torch.ones(megabytes << 18)
        b = a * 2
        del a, b
for _ in range(5):  # until the heap is as large as it gets, with what lies between the tensors
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
MEGABYTES, PAGE = 3 * 2 * (3 + 40 + 70), 4096

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_tensors_of_every_size_find_memory_that_is_there() -> None:
    """Without the setting nearly all pages are new each time (huge pages, where the system gives them, count once)."""
    assert faults("kept") < 0.1 * MEGABYTES * 2**20 / PAGE


def test_elsewhere_than_with_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory.__wrapped__() is False
