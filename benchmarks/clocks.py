"""What times a call.

On a GPU the L2 cache is emptied before each repetition, by reading a larger buffer for so long that the host is far
ahead, and CUDA events time the device; on a CPU a clock does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

EMPTYING = 1 << 28  # bytes read before each repetition on a GPU, or four times its L2 cache if that is more
HOST_AHEAD = 1e-3  # seconds of reading queued before a timed call, so that its launches do not keep the GPU waiting

Call = Callable[[], object]
Clock = Callable[[Call], float]


class HostClock:
    """Seconds of a call by the host's clock, the mean of `calls` of them where one is too short."""

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls

    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        return (time.perf_counter() - start) / self.calls


class LaunchClock(HostClock):
    """Host seconds until a call has queued its work on an idle GPU: what it costs a step that launches bound."""

    def __call__(self, call: Call) -> float:
        torch.cuda.synchronize()
        return super().__call__(call)


class DeviceClock:
    """Seconds of a call on the GPU, between two events, with none of its data in the L2 cache and the host ahead."""

    def __init__(self) -> None:
        level2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.ones(max(4 * level2, EMPTYING) // 4, device="cuda")
        self.passes = 0
        for _ in range(3):
            once = self(self.buffer.sum)
        self.passes = 1 + int(HOST_AHEAD / once)

    def __call__(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(self.passes):
            self.buffer.sum()  # reading leaves nothing to be written back while the call runs
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
