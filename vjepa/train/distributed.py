"""Rank, world size and the few collective calls of the training loop; one process needs none of it."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine, which is its CUDA device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def current_world() -> World:
    """The world as torch.distributed knows it: rank 0 of 1 when it is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    rank = dist.get_rank()
    return World(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))


@contextmanager
def distributed_world() -> Iterator[World]:
    """Joins the process group that torchrun describes in RANK and WORLD_SIZE, and leaves it at the end.

    Without those variables, or inside a group that the caller made, nothing is set up and nothing torn down. Make a Trainer
    inside in a function of its own, so that it is gone at the end: it keeps the group's threads.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not launched or dist.is_initialized():
        yield current_world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # The group's threads end with its last reference. One that frees a tensor while the interpreter ends kills the process,
    # so nobody may keep the group: neither default arguments of this module, if it is imported while there is a group, nor
    # a trainer that only the garbage collector frees.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield current_world()
    finally:
        gc.collect()
        dist.destroy_process_group()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes (the tensor itself with one process)."""
    size = current_world().size
    if size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / size


def any_rank(flag: int) -> int:
    """The largest `flag` of all processes, so that all of them take the same branch."""
    if current_world().size == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(flag, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank, on every process."""
    world = current_world()
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all processes."""
    if current_world().size > 1:
        dist.barrier()
