"""The script that tunes attention on a GPU: it keeps the fastest candidate that is right, whatever the others do."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.tune_attention")


@pytest.fixture
def problem(script, monkeypatch, device):
    problem = script.Problem((20, 5), 1, 8, torch.bfloat16, device)
    for module, names in ((problem.forward_module, ["TILES"]), (problem.backward_module, ["QUERIES", "KEYS"])):
        for name in names:
            monkeypatch.setattr(module, name, dict(getattr(module, name)))
    return problem


@pytest.mark.parametrize("name", ["TILES", "QUERIES", "KEYS"])
def test_the_fastest_right_candidate_stays_in_use(script, problem, monkeypatch, name):
    module = problem.forward_module if name == "TILES" else problem.backward_module
    candidates = [
        script.Candidate((16, 32, 4, 1), 0),
        script.Candidate((32, 32, 4, 1), 2),
        script.Candidate((24, 32, 4, 1), 0),  # no power of two
        script.Candidate((16, 16, 4, 1), 0),  # fast, and made wrong
    ]
    right, seconds = problem.right, iter([2.0, 1.0])

    def judge(found, expected):
        return getattr(module, name)[problem.family][256].walked > 16 and right(found, expected)

    monkeypatch.setattr(problem, "right", judge)
    monkeypatch.setattr(script, "REPEATS", 1)
    rows = list(script.tune(problem, module, name, candidates, lambda run: next(seconds), time.monotonic() + 60))
    assert [row.get("seconds") for row in rows] == [2.0, 1.0, None, None]
    assert "power of 2" in rows[2]["out"]
    assert rows[3]["out"] == "wrong"
    assert script.committed(module, name, problem.family, 16) == candidates[1]
    lines = script.report(rows, candidates[0]).splitlines()
    assert [line.endswith("<- committed") for line in lines] == [False, True, False, False]
    assert "share 2" in lines[0]


def test_nothing_is_tried_when_time_is_up_and_what_was_stays(script, problem):
    module, candidate = problem.forward_module, script.Candidate((16, 16, 4, 1), 8)
    before = module.TILES[problem.family]
    (row,) = script.tune(problem, module, "TILES", [candidate], lambda run: 1.0, time.monotonic() - 1)
    assert row["out"] == "no time left"
    assert module.TILES[problem.family] is before


def test_candidates_hold_what_the_kernels_can_make(script):
    for owned, walked, warps, stages in script.FORWARD + script.BACKWARD:
        assert walked >= 32  # one exponential in eight tells columns apart by their lowest five bits
        assert owned * walked <= 128 * 256
        assert warps in (4, 8)
        assert stages >= 2
