"""What a training step takes at least, operation by operation, and what a measured one takes beside it.

    python -m benchmarks.floor                 writes docs/step_floor.md: ViT-L, 24 clips, at the limits of an H200
    python -m benchmarks.floor RESULTS.json    prints the parts of a step that were measured beside their floors

An operation takes at least the longest of its FLOP, its bytes and its exponentials at the limit of each. Against results the
limits are the ceilings that were measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa import VJEPAConfig

from .flops import ATTENTION, PASS, PRODUCT, Op, parameters, step_ops
from .steps import PARTS
from .words import duration

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "step_floor.md"
GIGA, TERA = 1e9, 1e12
MODEL, CLIPS = "vit_large", 24
CONTEXT, TARGETS = (364, 100), (758, 1110)  # tokens of the two kinds of masks in batches of 24, packed by truncation
MFU, RELEASED, ASSEMBLED, MEMORY = 0.5, 2.0, 1.3, 0.6  # targets; the last three against peers


@dataclass(frozen=True)
class Limits:
    """FLOP, bytes and exponentials a second; exponentials None: not known to be a limit."""

    name: str
    flop: float
    moved: float
    exps: float | None

    def seconds(self, op: Op) -> float:
        return max(op.flop / self.flop, op.moved / self.moved, op.exps / self.exps if self.exps else 0.0)

    def bound(self, op: Op) -> str:
        """Which of the limits it is."""
        shares = {"FLOP": op.flop / self.flop, "bytes": op.moved / self.moved}
        if self.exps:
            shares["exp"] = op.exps / self.exps
        return max(shares, key=shares.__getitem__)


H200 = Limits("H200 (data sheet)", 989 * TERA, 4.8 * TERA, 3.9 * TERA)


def total(ops: Iterable[Op], limits: Limits) -> float:
    """Seconds of operations that run one after the other."""
    return sum(limits.seconds(op) for op in ops)


# ----------------------------------------------------------------------------------------------------------------- page


def page() -> str:
    """docs/step_floor.md."""
    config = VJEPAConfig.from_preset(MODEL)
    context, target = ([n for n in lengths for _ in range(CLIPS)] for lengths in (CONTEXT, TARGETS))
    ops = step_ops(config, CLIPS, context, target)
    flop, floor = sum(op.flop for op in ops), total(ops, H200)
    at_peak, goal = flop / H200.flop, flop / H200.flop / MFU
    encoder, predictor = parameters(config)
    lines = [
        "# The floor of a training step",
        "",
        f"ViT-L, {CLIPS} clips of 16 x 224 x 224, bfloat16, masks packed by truncation: {CONTEXT[0]} and {CONTEXT[1]} "
        f"context tokens and {TARGETS[0]} and {TARGETS[1]} targets of a clip. `python -m benchmarks.floor` writes this "
        "page; the formulas are in `benchmarks/flops.py`. Nothing was measured for it: this is what a step of these "
        "operations cannot go below.",
        "",
        f"Limits: {H200.name}, {H200.flop / TERA:.0f} TFLOP/s of dense bfloat16 products, "
        f"{H200.moved / TERA:.1f} TB/s, {H200.exps / TERA:.1f} x 10^12 exponentials/s. An operation takes at least the "
        "longest of the three; the sum lets operations run one after the other.",
        "",
        "| part | operation | TFLOP | GB | 10^9 exp | floor | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, words in PARTS.items():
        own = [op for op in ops if op.part == part]
        lines += [_row(op.part, op.name, [op]) for op in own] + [_row(f"**{part}**", f"**{words}**", own)]
    lines += [
        _row("**step**", "**all**", ops),
        "",
        "## Arithmetic",
        "",
        f"- Model FLOP: {flop / TERA:.1f} TFLOP of the step, {flop / CLIPS / TERA:.2f} TFLOP of a clip; "
        f"{flop / TERA:.1f} / {H200.flop / TERA:.0f} TFLOP/s = {duration(at_peak)} at the peak of the products.",
        f"- Floor with memory and exponentials: {duration(floor)}, a model-FLOP utilisation of {at_peak / floor:.0%} "
        "of the data sheet. What a step takes beyond it is kernels below their limit, launches and waiting.",
        f"- For example a product of the target encoder, qkv: 2 x {CLIPS * config.num_tokens} tokens x {config.embed_dim} x "
        f"{3 * config.embed_dim} x {config.depth} blocks = "
        f"{2 * CLIPS * config.num_tokens * 3 * config.embed_dim**2 * config.depth / TERA:.2f} TFLOP.",
        f"- Weights: {encoder / 1e6:.0f} M in the encoder, {predictor / 1e6:.0f} M in the predictor. The update moves "
        f"{sum(op.moved for op in ops if op.part == 'update') / GIGA:.1f} GB.",
        "",
        "## Targets",
        "",
        "| target | what it means here |",
        "|---|---|",
        f"| {MFU:.0%} MFU | a step of {duration(goal)} or less: {CLIPS / goal:.0f} clips/s (of the measured products, "
        f"about 790 TFLOP/s: {duration(flop / (790 * TERA) / MFU)}) |",
        f"| {RELEASED:g}x the released code | the released step is to take at least {duration(RELEASED * goal)} "
        f"when ours takes {duration(goal)}; one below {duration(RELEASED * floor)} cannot be beaten so, ours being at its "
        "floor |",
        f"| {ASSEMBLED:g}x the assembled parts | likewise {duration(ASSEMBLED * goal)}, and {duration(ASSEMBLED * floor)} |",
        f"| {MEMORY:g}x their peak memory | measured: activations depend on what each keeps for its backward pass |",
        "",
        "`make gpu STAGE=step` measures the step, its parts and all contenders; `python -m benchmarks.floor` with its JSON "
        "then prints each part beside its floor, at the ceilings measured in that run.",
        "",
    ]
    return "\n".join(lines)


def _row(part: str, name: str, ops: Sequence[Op]) -> str:
    flop, moved, exps = (sum(getattr(op, key) for op in ops) for key in ("flop", "moved", "exps"))
    bound = H200.bound(ops[0]) if len(ops) == 1 else ""
    figures = [f"{flop / TERA:.3f}" if flop else "", f"{moved / GIGA:.2f}", f"{exps / GIGA:.1f}" if exps else ""]
    return f"| {' | '.join([part, name, *figures, duration(total(ops, H200)), bound])} |"


# -------------------------------------------------------------------------------------------------------------- results


def compared(content: dict[str, Any]) -> list[str]:
    """Each measured step and each part: its floor at the ceilings of the run, and how many times that everybody took."""
    ceilings, lines = content["ceilings"], [content["machine"]["device"]]
    for work in content["works"]:
        about, rows = work["about"], sorted(work["results"], key=lambda row: row["median"])
        gemm = ceilings["gemm_tflop_s"].get(work["dtype"])
        if not rows or gemm is None or "batches" in about:  # a time for each batch has a floor for each
            continue
        limits = Limits("this machine", gemm * TERA, ceilings["copy_gb_s"] * GIGA, ceilings["exp_s"])
        shapes, config = work["shapes"], VJEPAConfig.from_dict(about["config"])
        low = 4 if work["dtype"] == "float32" else 2
        ops = step_ops(config, shapes["video"][0], shapes["context"], shapes["target"], low)
        own = [op for op in ops if about["part"] in (None, op.part)]
        floor = total(own, limits)
        kinds = {kind: total((op for op in own if op.kind == kind), limits) for kind in (PRODUCT, ATTENTION, PASS)}
        split = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in kinds.items())
        lines.append(f"{work['name']}, {work['dtype']}, {work['packing']}: floor {duration(floor)} ({split})")
        for row in rows:
            above = row["median"] - floor
            words = (
                f"{duration(above)} above it" if above >= 0 else f"{duration(-above)} below it: more than the ceilings"
            )
            lines.append(
                f"    {row['contender']}: {duration(row['median'])}, {row['median'] / floor:.2f} floors, {words}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The floor of a training step.")
    parser.add_argument("results", nargs="?", type=Path, help="step-<device>.json of bench_step")
    arguments = parser.parse_args()
    if arguments.results is None:
        PAGE.write_text(page())
    else:
        print("\n".join(compared(json.loads(arguments.results.read_text()))))


if __name__ == "__main__":
    main()
