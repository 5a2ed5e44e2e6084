"""Peak memory of a call on a CPU, as Linux counts the pages of the process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from .clocks import Call

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what, written to CLEAR, sets the peak to what is there now


def host_peak(call: Call) -> int | None:
    """Bytes that the process grows by while `call` runs, or None where that cannot be told (no Linux, no glibc).

    What earlier calls have freed is given back first, so that it cannot serve this call unseen.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    gc.collect()
    if trim is None or not _reset(trim):
        call()
        return None
    before = _kilobytes("VmRSS")
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def _reset(trim: ctypes._CFuncPtr) -> bool:
    trim(0)
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # a container may forbid it
        return False
    return True


def _kilobytes(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
