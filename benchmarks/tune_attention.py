"""Which tiles, and which share of exponentials without the exp unit, make varlen_attention fastest on this GPU.

    python benchmarks/tune_attention.py [--head-dim 24] [--packing truncate] [--seconds 420] [--out FOLDER]

Tries every candidate of the forward kernel, then of the kernel of grad_q, then of that of grad_k and grad_v, the other
one at its best so far, on the sequences of a step of 24 clips: of the predictor (head_dim up to 32), or of the encoder.
A candidate whose result is not the one of the committed tiles, to a few roundings, is out; one that the chip has no room for
too. Prints all, fastest first, with the one that is committed marked, and writes FOLDER/tuning_attention_<head_dim>.json.
What wins goes into TILES, QUERIES and KEYS of kernels/_triton_attention*.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_attention import HEADS, lengths_of  # the folder is no installed package
from benchmarks.clocks import DeviceClock
from benchmarks.workloads import LONG, SHORT

CLIPS = 24
REPEATS = 7
SHARES = (0, 8, 4)
FORWARD = [
    *((64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (64, 256, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2)),
    *((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 256, 8, 2)),
]
BACKWARD = [
    *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
    *((128, 32, 8, 3), (128, 128, 8, 2), (64, 32, 4, 3)),
]
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}  # of the largest value


@dataclass(frozen=True)
class Candidate:
    """Rows owned and walked over, warps, stages; one exponential in `share` (0: none) by multiply-adds."""

    tile: tuple[int, int, int, int]
    share: int

    def __str__(self) -> str:
        owned, walked, warps, stages = self.tile
        return f"{owned:4} x {walked:3}, {warps} warps, {stages} stages, share {self.share}"


class Problem:
    """The tensors of one attention, and what the committed tiles make of them."""

    def __init__(self, lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        from vjepa.kernels import _triton_attention, _triton_attention_backward

        self.forward_module, self.backward_module = _triton_attention, _triton_attention_backward
        total = sum(lengths)
        self.qkv = torch.randn(total, 3, heads, head_dim, device=device).to(dtype)
        self.grad = torch.randn(total, heads, head_dim, device=device).to(dtype)
        self.lengths, offsets = torch.tensor(lengths), torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
        offsets = offsets.to(device, torch.int32)
        self.sets = (offsets, self.lengths, head_dim**-0.5, offsets, self.lengths)
        self.family = _triton_attention.family(device, dtype)
        self.flop = 4 * heads * head_dim * sum(length**2 for length in lengths)
        self.out, self.lse = self.forward()
        self.grads = self.backward()

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.forward_module.varlen_attention(*self.qkv.unbind(1), *self.sets)

    def backward(self) -> tuple[Tensor, ...]:
        return self.backward_module.varlen_attention_backward(
            self.grad, *self.qkv.unbind(1), self.out, self.lse, *self.sets
        )

    def right(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        return all(
            float((a.double() - b.double()).abs().max()) <= CLOSE[a.dtype] * float(b.abs().max())
            for a, b in zip(found, expected, strict=True)
        )


def committed(module: ModuleType, name: str, family: str, width: int) -> Candidate:
    """What a launcher uses as it is."""
    widths = getattr(module, name)[family]
    tile = widths[min(most for most in widths if width <= most)]
    return Candidate((tile.owned, tile.walked, tile.warps, tile.stages), tile.share)


def use(module: ModuleType, name: str, family: str, candidate: Candidate) -> None:
    """Let the launcher use a candidate from now on."""
    from vjepa.kernels._triton_attention_parts import Tile

    getattr(module, name)[family] = {256: Tile(*candidate.tile, share=candidate.share)}


def tune(
    problem: Problem,
    module: ModuleType,
    name: str,
    candidates: Sequence[Candidate],
    clock: Callable[[Callable[[], object]], float],
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """A row for each candidate that was tried: its median time, or why it is out. Leaves the fastest in use."""
    backward = module is problem.backward_module
    run = problem.backward if backward else problem.forward
    before = getattr(module, name)[problem.family]
    best: tuple[float, Candidate | None] = (float("inf"), None)
    for candidate in candidates:
        row: dict[str, Any] = {"kernel": name, "tile": candidate.tile, "share": candidate.share}
        if time.monotonic() > deadline:
            yield {**row, "out": "no time left"}
            continue
        try:
            use(module, name, problem.family, candidate)
            found = run()
            if not problem.right(found[: 3 if backward else 1], problem.grads if backward else [problem.out]):
                yield {**row, "out": "wrong"}
                continue
            seconds = statistics.median(clock(run) for _ in range(REPEATS))
        except Exception as error:  # of whatever type: too little memory on the chip, a compiler that gives up
            yield {**row, "out": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            continue
        best = min(best, (seconds, candidate), key=lambda pair: pair[0])
        flop = problem.flop * (2.5 if backward else 1)
        yield {**row, "seconds": seconds, "tflop_s": flop / seconds / 1e12}
    if best[1] is None:
        getattr(module, name)[problem.family] = before
    else:
        use(module, name, problem.family, best[1])


def report(rows: Sequence[dict[str, Any]], mark: Candidate) -> str:
    """The rows of one kernel, fastest first."""
    lines = []
    for row in sorted(rows, key=lambda row: row.get("seconds", float("inf"))):
        candidate = Candidate(row["tile"], row["share"])
        figure = f"{row['seconds'] * 1e6:8.1f} us {row['tflop_s']:6.1f} TFLOP/s" if "seconds" in row else row["out"]
        lines.append(f"{row['kernel']:8} {candidate}  {figure}{'  <- committed' if candidate == mark else ''}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", type=int, default=24, choices=sorted(HEADS), help="of the heads (24)")
    parser.add_argument("--packing", default="truncate", choices=("truncate", "exact"), help="of the masks (truncate)")
    parser.add_argument("--seconds", type=float, default=420, help="after which nothing new is tried (420)")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the JSON (benchmarks/results)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(f"tune_attention: PyTorch {torch.__version__} finds no CUDA device")
    device, head_dim = torch.device("cuda", 0), options.head_dim
    what = "predictor" if head_dim <= 32 else "context"
    lengths = lengths_of(what, options.packing, (SHORT, LONG), CLIPS)
    problem = Problem(lengths, HEADS[head_dim], head_dim, torch.bfloat16, device)
    clock, deadline, rows = DeviceClock(), time.monotonic() + options.seconds, []
    made_by = problem.forward_module.meta(problem.forward_module.TILES, problem.family, head_dim, 1, "ieee")
    for module, name, tiles in (
        (problem.forward_module, "TILES", FORWARD),
        (problem.backward_module, "QUERIES", BACKWARD),
        (problem.backward_module, "KEYS", BACKWARD),
    ):
        mark = committed(module, name, problem.family, made_by["E0"] + made_by["E1"])
        every = [Candidate(tile, share) for tile in tiles for share in SHARES]
        tried = list(tune(problem, module, name, list(dict.fromkeys([mark, *every])), clock, deadline))
        print(report(tried, mark), flush=True)
        rows += tried
    Path(options.out).mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(), "lengths": lengths, "packing": options.packing, "rows": rows}
    Path(options.out, f"tuning_attention_{head_dim}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
