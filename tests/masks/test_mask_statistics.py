"""What the default masks hide: the table measured on the released sampler, and the bias of truncation in time."""

import json

import pytest
import torch

from vjepa.kernels import TokenIndices
from vjepa.masks import Masks, MultiBlock, mask_generator, mask_statistics

GRID = (8, 14, 14)
BATCHES = 80


@pytest.fixture(scope="module")
def rows() -> dict[str, list[list[dict]]]:
    """Statistics of BATCHES batches of 24 clips: packing -> kind -> rows."""
    out = {}
    for packing in ("exact", "budget", "truncate"):
        sampler = MultiBlock(GRID, packing=packing)
        batches = [mask_statistics(sampler(24, mask_generator(3, 0, k)), GRID)["kinds"] for k in range(BATCHES)]
        out[packing] = [[batch[kind] for batch in batches] for kind in range(2)]
    return out


def _mean(rows: list[dict], *path: str) -> float:
    values = []
    for row in rows:
        for key in path:
            row = row[key]
        values.append(row)
    return sum(values) / len(values)


# One block size per batch makes the clips of a batch alike: batch means vary by 38 tokens (measured over 400 batches),
# so the mean of 80 has a standard error of 38 / sqrt(80) = 4.2, and the reference's number has its own: tolerance 20.
# Extremes depend on the number of draws: none may lie more than two positions (16 tokens) outside the measured range.
@pytest.mark.parametrize(("kind", "mean", "std", "low", "high", "hidden"), [
    (0, 583, 120, 208, 1096, 0.63),
    (1, 292, 113, 48, 528, 0.81),
])  # fmt: skip
def test_exact_context_sizes(rows: dict, kind: int, mean: int, std: int, low: int, high: int, hidden: float) -> None:
    exact = rows["exact"][kind]
    assert _mean(exact, "context", "mean") == pytest.approx(mean, abs=20)
    square = _mean([{"v": r["context"]["std"] ** 2 + r["context"]["mean"] ** 2} for r in exact], "v")
    assert (square - _mean(exact, "context", "mean") ** 2) ** 0.5 == pytest.approx(std, rel=0.08)
    assert min(r["context"]["min"] for r in exact) >= low - 16
    assert max(r["context"]["max"] for r in exact) <= high + 16
    assert _mean(exact, "hidden") == pytest.approx(hidden, abs=0.015)
    assert _mean(exact, "dropped") == pytest.approx(0, abs=1e-12)


# The shortest of 24 varies by 66 and 41 tokens from batch to batch: standard errors 7 and 4.6, tolerance 4 of them.
@pytest.mark.parametrize(("kind", "mean", "tolerance", "hidden", "lost_context", "lost_target"), [
    (0, 363, 28, 0.77, 0.38, 0.23),
    (1, 105, 18, 0.93, 0.65, 0.13),
])  # fmt: skip
def test_truncated_context_sizes(
    rows: dict, kind: int, mean: int, tolerance: int, hidden: float, lost_context: float, lost_target: float
) -> None:
    exact, truncated = rows["exact"][kind], rows["truncate"][kind]
    assert all(row["context"]["std"] == row["target"]["std"] == 0 for row in truncated)
    assert _mean(truncated, "context", "mean") == pytest.approx(mean, abs=tolerance)
    assert _mean(truncated, "hidden") == pytest.approx(hidden, abs=0.015)
    lost = {part: 1 - _mean(truncated, part, "mean") / _mean(exact, part, "mean") for part in ("context", "target")}
    assert lost["context"] == pytest.approx(lost_context, abs=0.03)
    assert lost["target"] == pytest.approx(lost_target, abs=0.02)


def test_truncation_takes_the_context_of_the_last_steps_and_the_others_do_not(rows: dict) -> None:
    for kind in range(2):
        over_time = {
            packing: torch.tensor([row["context_over_time"] for row in rows[packing][kind]]).mean(0)
            for packing in ("exact", "budget", "truncate")
        }
        kept = over_time["truncate"] / over_time["exact"]
        assert kept[0] > 0.85
        assert kept[6:].mean() < 0.12
        assert torch.allclose(over_time["exact"], over_time["exact"][:1].expand(8))
        assert over_time["budget"].max() / over_time["budget"].min() < 1.05


def test_budget_reaches_the_hidden_ratio(rows: dict) -> None:
    for kind, tolerance in ((0, 1e-3), (1, 2e-2)):  # some long-range masks leave fewer tokens than the budget
        hidden = _mean(rows["budget"][kind], "hidden")
        assert 0.9 - 1e-3 <= hidden <= 0.9 + tolerance


def test_statistics_of_a_small_batch_by_hand() -> None:
    context = TokenIndices.from_sets([torch.tensor([0, 1]), torch.tensor([0, 1, 4, 5])])
    target = TokenIndices.from_sets([torch.tensor([2]), torch.tensor([2, 3, 6])])
    statistics = mask_statistics(Masks(context, target, torch.zeros(2, dtype=torch.int64)), (2, 2, 2))
    assert statistics == {
        "clips": 2,
        "kinds": [
            {
                "kind": 0,
                "sets": 2,
                "context": {"mean": 3.0, "std": 1.0, "min": 2, "max": 4},
                "target": {"mean": 2.0, "std": 1.0, "min": 1, "max": 3},
                "hidden": 1 - 3 / 8,
                "dropped": 1 - 5 / 8,
                "context_over_time": [0.5, 0.25],
            }
        ],
    }
    assert json.loads(json.dumps(statistics)) == statistics


def test_statistics_without_a_grid_leave_out_the_shares() -> None:
    masks = MultiBlock(GRID)(2, torch.Generator().manual_seed(0))
    assert set(mask_statistics(masks)["kinds"][1]) == {"kind", "sets", "context", "target"}
