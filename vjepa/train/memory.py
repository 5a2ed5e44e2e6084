"""Memory that a step on a CPU frees is memory for the next one.

glibc maps large blocks anew each time and gives the end of the heap back, and the system clears each page of them at its
next use: hundreds of thousands of page faults a step, which take longer than the work on many of these tensors.
"""

from __future__ import annotations

import ctypes
import functools
import platform

# mallopt's parameters, of <malloc.h>
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
NEVER = -1  # as a trim threshold
LARGEST = 1 << 30  # bytes of a block that comes from the heap: more than any tensor of a step that suits a CPU
OLDEST = 1 << 25  # what a glibc takes that refuses more
AHEAD = 1 << 26  # bytes by which the heap grows at least


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for as long as it lives; False where the C library is not glibc.

    For all that the process does, not for tensors alone; it then holds the most that it has needed at once.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # first: the others alone would leave it at 128 KiB for good
    if not (libc.mallopt(MMAP_THRESHOLD, LARGEST) or libc.mallopt(MMAP_THRESHOLD, OLDEST)):
        return False
    return bool(libc.mallopt(TRIM_THRESHOLD, NEVER)) and bool(libc.mallopt(TOP_PAD, AHEAD))
