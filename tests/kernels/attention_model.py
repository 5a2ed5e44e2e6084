"""How fast the loops of attention can be on an H200, from the instructions that they consist of.

A quarter of an SM issues one instruction of a warp each clock; its exp unit takes 8 clocks for one of 32 threads (16
results a clock and SM), its matrix unit does 1024 FLOP a clock in 16 bits. If enough warps are there for each of the
three to work while the others do, a step of a loop takes as long as the slowest of them; waiting is not in the model, so
that a measurement can only be slower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

CLOCK, SMS, QUARTERS = 1.847e9, 132, 4  # 16 * 132 * CLOCK = 3.9e12 exponentials a second
EXP_CLOCKS, MATRIX_FLOP = 8, 1024
# FLOP of a pair of query and key, by the head's width.
PRODUCTS = {"grad q ": 6, "grad k and v ": 8, "": 4}
NAME = re.compile(r"varlen_attention (grad q |grad k and v |)bf16 head_dim (\d+)(?:, 1 in (\d+) by multiply-adds)?$")
HEADER = ("kernel", "pairs", "instructions", "exp", "clocks: issue", "exp unit", "matrix unit", "TFLOP/s")


def clocks(fact: Any, products: int, width: int) -> tuple[float, float, float]:
    """Clocks of a step of a warp that each unit needs: issue, exp unit, matrix unit."""
    return fact.loop, EXP_CLOCKS * fact.exps, fact.pairs * 32 * products * width / MATRIX_FLOP


def rate(flop_of_pair: float, clocks_of_pair: float) -> float:
    """TFLOP/s of the whole chip."""
    return flop_of_pair * 32 / clocks_of_pair * QUARTERS * SMS * CLOCK / 1e12


def section(facts: Iterable[Any]) -> str:
    """Markdown for the variants on sm_90, by version of Triton."""
    lines = [
        "## What the loops of attention allow on an H200",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].splitlines(),
        "",
    ]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    backward: dict[tuple[str, str], dict[str, float]] = {}
    for fact in facts:
        found = NAME.match(fact.variant)
        if fact.arch != 90 or not found or not fact.loop or not fact.pairs:
            continue
        of, head_dim, _ = found.groups()
        products, longest = PRODUCTS[of], max(clocks(fact, PRODUCTS[of], fact.width))
        if of:
            backward.setdefault((head_dim, fact.triton), {})[of] = longest / fact.pairs
        name = f"{fact.variant.removeprefix('varlen_attention ')} (Triton {fact.triton})"
        cells = (fact.pairs, fact.loop, fact.exps, *(f"{value:.0f}" for value in clocks(fact, products, fact.width)))
        speed = rate(products * int(head_dim), longest / fact.pairs)
        lines.append(f"| {' | '.join(map(str, (name, *cells, f'{speed:.0f}')))} |")
    lines += [
        "",
        "Both backward kernels together, in the FLOP of an attention that computes nothing twice (10 E a pair):",
        "",
    ]
    lines += ["| head_dim | Triton | TFLOP/s |", "|---|---|---|"]
    for (head_dim, version), parts in backward.items():
        if len(parts) == 2:
            lines.append(f"| {head_dim} | {version} | {rate(10 * int(head_dim), sum(parts.values())):.0f} |")
    return "\n".join(lines)
