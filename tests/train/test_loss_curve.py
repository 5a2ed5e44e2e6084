"""200 steps give the losses that were recorded: whatever makes the step faster must not move them beyond rounding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_curve", GOLDEN / "curve.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

SAMPLE = (
    3.0  # what was recorded as rounding is the difference of one pair of runs; other roundings differ by a few times
)


def distance(losses: list[float], recorded: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, recorded, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_the_recorded_ones(precision: str) -> None:
    recorded = json.loads((GOLDEN / "curve.json").read_text())[precision]
    assert recorded["rounding"] < {"fp32": 1e-4, "bf16": 2e-3}[precision]  # a curve that tells
    assert distance(golden.curve(precision), recorded["losses"]) <= SAMPLE * recorded["rounding"]


def test_the_curve_would_show_another_recipe() -> None:
    """A momentum that differs by 0.002 is far outside the tolerance of both precisions."""
    recorded = json.loads((GOLDEN / "curve.json").read_text())["bf16"]
    moved = golden.curve("bf16", momentum=(0.978, 1.0))
    assert distance(moved, recorded["losses"]) > SAMPLE * recorded["rounding"]
