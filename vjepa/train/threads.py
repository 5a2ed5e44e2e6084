"""How many threads the training process computes with on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PROCESSES = "LOCAL_WORLD_SIZE"  # training processes on this machine, as torchrun tells


def usable_processors() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside(num_workers: int) -> int:
    """A thread for each processor that the loader's workers leave, but at least for every second one.

    PyTorch's threads wait for each other by spinning, so a thread that shares its processor with a worker holds up all of
    them. Never more than PyTorch would take: OMP_NUM_THREADS and torch.set_num_threads still bound it.
    """
    mine = usable_processors() // int(os.environ.get(PROCESSES, "1"))
    return min(torch.get_num_threads(), max(1, mine // 2, mine - num_workers))


@contextmanager
def compute_threads(number: int) -> Iterator[None]:
    """PyTorch computes with `number` threads inside, and with as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
