"""Where the time of a training step on a CPU goes, and what its products would take at the rate of a large one.

    python -m benchmarks.profile_step [--precision bf16] [--reference-repo PATH]

writes the table between the markers of docs/step_cpu.md for the precision: ViT-S, 2 clips of 16 x 224 x 224, masks
packed by truncation. torch.profiler times one step of ours, of straight PyTorch and, if a path is given, of the
released code, each after a step that is not counted. An operation's own time goes to the first group whose pattern
its name has, or else the name of what called it; what nothing recorded (Python, waiting) is "rest".
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .clocks import HostClock
from .contenders import RELEASED, STRAIGHT
from .flops import ATTENTION, PRODUCT, step_ops
from .harness import TERA, dtype_name
from .machine import machine, measure_ceilings
from .ours import Ours
from .released import Released
from .steps import Step, Workload, loss_of, workload
from .straight import Straight
from .words import about_line, duration

PAGE = Path(__file__).resolve().parents[1] / "docs" / "step_cpu.md"
MODEL, CLIPS = "vit_small", 2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UPDATE = "optimizer + EMA"
REST = "rest"
GROUPS = {
    UPDATE: r"^Optimizer\.step|^update$|gradient_norms|linalg_vector_norm|_foreach_norm|adamw|ema_",
    "attention": r"attention|softmax",
    "matrix products": r"::(mm|addmm|bmm|baddbmm|linear|matmul|_?mlp\w*|tubelet\w*)$|mkldnn|onednn|convolution",
    "norms + GELU + adds": r"layer_norm|gelu|::(add|mul|sub|div|sum|neg|abs|sgn|mean)_?$",
    "casts + copies": r"::(_to_copy|to|copy_|clone|contiguous|cat|stack|fill_|zero_|expand)$"
    r"|::(gather|scatter|index|repeat|zeros|empty|slice|predictor_tokens)\w*$",
}


class Found:
    """Seconds of each group in one step."""

    def __init__(self, groups: dict[str, float], wall: float) -> None:
        self.groups = {**groups, REST: max(0.0, wall - sum(groups.values()))}
        self.wall = wall


def group_of(names: Sequence[str]) -> str | None:
    """The group of an operation by its own name and those of its callers, innermost first.

    What the update calls belongs to it, whatever it is.
    """
    if any(re.search(GROUPS[UPDATE], name) for name in names):
        return UPDATE
    for name in names:
        for group, pattern in GROUPS.items():
            if re.search(pattern, name):
                return group
    return None


def measure(step: Step) -> Found:
    """The second step of a contender."""
    if isinstance(step, Straight):
        step.update = recorded("update", step.update)
    step.step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        loss_of(step.step())
        wall = time.perf_counter() - start
    groups = dict.fromkeys(GROUPS, 0.0)
    for event in found.events():
        names, caller = [], event
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        if group := group_of(names):
            groups[group] += event.self_cpu_time_total / 1e6
    return Found(groups, wall)


def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` inside a range that the profiler sees."""

    def run(*arguments: Any) -> Any:
        with record_function(name):
            return call(*arguments)

    return run


def table(found: dict[str, Found], work: Workload, gemm: float, line: str) -> str:
    """Markdown: a column for each contender, a row for each group, and the floor of products and attention."""
    low = 4 if work.dtype == torch.float32 else 2
    ops = step_ops(work.config, work.clips, work.masks.context.lengths, work.masks.target.lengths, low)
    floors = {"attention": ATTENTION, "matrix products": PRODUCT}
    rows = [f"| | {' | '.join(found)} | floor |", "|---|" + "---|" * (len(found) + 1)]
    for group in (*GROUPS, REST):
        floor = sum(op.flop for op in ops if op.kind == floors[group]) / gemm if group in floors else None
        cells = [f"{duration(one.groups[group])} ({one.groups[group] / one.wall:.0%})" for one in found.values()]
        rows.append(f"| {group} | {' | '.join(cells)} | {duration(floor) if floor else ''} |")
    flop = sum(op.flop for op in ops)
    walls = " | ".join(duration(one.wall) for one in found.values())
    rows.append(f"| **step** | {walls} | {duration(flop / gemm)} |")
    words = (
        f"{line}. A large matrix product reaches {gemm / TERA:.3f} TFLOP/s in the same run; floor: FLOP at that rate."
    )
    return "\n".join([words, "", *rows])


def insert(text: str, precision: str, new: str) -> str:
    """`text` with what is between the markers of `precision` replaced."""
    begin, end = f"<!-- {precision} -->", f"<!-- /{precision} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have one {begin} with one {end} after it")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a training step on a CPU goes.")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--reference-repo", metavar="PATH", help="a checkout of the released V-JEPA code")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the markers (%(default)s)")
    arguments = parser.parse_args()
    device, dtype = torch.device("cpu"), DTYPES[arguments.precision]
    work = workload(MODEL, CLIPS, dtype, device)
    makers: dict[str, Callable[[], Step]] = {"ours": lambda: Ours(work), STRAIGHT: lambda: Straight(work)}
    if arguments.reference_repo is not None:
        makers[RELEASED] = lambda: Released(work, arguments.reference_repo)
    found = {name: measure(make()) for name, make in makers.items()}
    gemm = measure_ceilings(device, HostClock()).gemm_tflop_s[dtype_name(dtype)] * TERA
    new = table(found, work, gemm, about_line(machine(device)))
    arguments.page.write_text(insert(arguments.page.read_text(), arguments.precision, new))
    print(new)


if __name__ == "__main__":
    main()
