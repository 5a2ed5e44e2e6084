"""What each part of our step on a CPU is worth: the step as it is and without the part, in turns.

    python -m benchmarks.step_changes [--precision bf16] [--rounds 5] [--page docs/tuning.md]

ViT-S, 2 clips of 16 x 224 x 224, masks packed by truncation. Writes the table between the markers of the page for the
precision. Factors are medians over the rounds of the time without the part over the time with it.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.kernels import _cpu_tiles, _dispatch
from vjepa.model import blocks, precision, predictor
from vjepa.train import memory

from .machine import machine
from .ours import Ours
from .profile_step import CLIPS, DTYPES, MODEL, insert
from .steps import Workload, workload
from .words import about_line

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tuning.md"
WHOLE = "the step as it is"
# what glibc comes to by itself once it has seen such blocks: 32 MiB, twice that, its padding of 128 KiB
MALLOC_DEFAULT = {memory.MMAP_THRESHOLD: 1 << 25, memory.TRIM_THRESHOLD: 1 << 26, memory.TOP_PAD: 1 << 17}


@contextmanager
def without_native(*ops: str) -> Iterator[None]:
    """The native rows of these operators are out of the table."""
    with ExitStack() as stack:
        for op in ops:
            rows = {name: row for name, row in _dispatch._TABLE[op].items() if name != "cpu"}
            stack.enter_context(mock.patch.dict(_dispatch._TABLE, {op: rows}))
        yield


def all_tokens(layers: Any, x: Tensor, cu: Tensor, lengths: Any, checkpointing: bool, wanted: blocks.Wanted) -> Any:
    """run_blocks that computes all tokens in the last block too, and then takes the wanted ones."""
    found, branch = blocks.run_blocks(layers, x, cu, lengths, checkpointing)
    assert branch is not None
    return found.index_select(0, wanted.rows), branch.index_select(0, wanted.rows)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    for name, value in MALLOC_DEFAULT.items():
        libc.mallopt(name, value)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        memory.keep_freed_memory.cache_clear()
        memory.keep_freed_memory()


@contextmanager
def libraries_linear() -> Iterator[None]:
    with mock.patch.object(precision, "linear", F.linear), mock.patch.object(blocks, "linear", F.linear):
        yield


def by_autocast(step: Ours) -> None:
    """From now on weights are cast in each step, and gradients are float32."""
    step.trainer._low = None
    step.trainer._forward.model = step.model


def variants(work: Workload) -> dict[str, tuple[Ours, Callable[[], AbstractContextManager[Any]]]]:
    """The step as it is, and without each part."""
    step = Ours(work)
    found: dict[str, tuple[Ours, Callable[[], AbstractContextManager[Any]]]] = {
        WHOLE: (step, nullcontext),
        "native attention, else PyTorch's": (step, lambda: without_native("varlen_attention")),
        "native GELU, norms and bias sums, else PyTorch's": (step, lambda: without_native("mlp", "add_layer_norm")),
        "linear layers by the faster library, else F.linear": (step, libraries_linear),
        "the predictor's last block for targets alone, else for all tokens": (
            step,
            lambda: mock.patch.object(predictor, "run_blocks", all_tokens),
        ),
        "one pass of the optimizer, else AdamW, average, copies apart": (
            step,
            lambda: without_native("adamw_ema_", "gradient_norms"),
        ),
        "freed memory kept, else given back": (step, freed_memory_given_back),
    }
    if work.dtype == torch.float32 and _cpu_tiles.instructions() & _cpu_tiles.TILES:
        found["products of float32 by tiles of bfloat16, else PyTorch's"] = (
            step,
            lambda: mock.patch.object(_cpu_tiles, "serve", return_value=False),
        )
    if work.dtype == torch.bfloat16:
        cast = Ours(work)
        by_autocast(cast)
        found["bf16 copies of the weights, else autocast"] = (cast, nullcontext)
    return found


def measure(work: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round."""
    contenders = variants(work)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first is not counted
        for name in order.sample(list(contenders), len(contenders)):
            step, without = contenders[name]
            with without():
                start = time.perf_counter()
                step.step()["loss"]
                seconds = time.perf_counter() - start
            if number:
                times[name].append(seconds)
    return times


def table(times: dict[str, list[float]], line: str) -> str:
    whole = times[WHOLE]
    rows = [f"{line}. The step as it is: {statistics.median(whole):.2f} s (median of {len(whole)} rounds)."]
    rows += ["", "| what the step has | without it, s | factor | over the rounds |", "|---|---|---|---|"]
    for name, seconds in times.items():
        if name == WHOLE:
            continue
        factors = [without / with_it for without, with_it in zip(seconds, whole, strict=True)]
        low, high = min(factors), max(factors)
        cells = f"{statistics.median(seconds):.2f} | {statistics.median(factors):.2f}x | {low:.2f} to {high:.2f}x"
        rows.append(f"| {name} | {cells} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part of our step on a CPU is worth.")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted (%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the markers (%(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    times = measure(workload(MODEL, CLIPS, DTYPES[arguments.precision], device), arguments.rounds)
    new = table(times, about_line(machine(device)))
    arguments.page.write_text(insert(arguments.page.read_text(), arguments.precision, new))
    print(new)


if __name__ == "__main__":
    main()
