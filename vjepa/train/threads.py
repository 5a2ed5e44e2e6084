"""How many threads the training process computes with on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def cores_left_to_workers(device: torch.device, num_workers: int) -> Iterator[None]:
    """On a CPU, PyTorch computes with a thread for each core that the loader's workers leave, at least one; then as before.

    PyTorch's threads wait for each other by spinning, so a thread that shares its core with a worker holds up all of
    them. Never raises the number of threads: OMP_NUM_THREADS and torch.set_num_threads still bound it.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(before, max(1, usable_cores() - num_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
