"""Schedules equal what the released trainer computed (golden/released_schedules.json) and stay put after their end."""

import json
from pathlib import Path

import pytest

from vjepa.schedules import Schedules

GOLDEN = json.loads((Path(__file__).parent / "golden" / "released_schedules.json").read_text())["runs"]


@pytest.mark.parametrize("run", GOLDEN, ids=lambda run: f"{run['args']['total_steps']}steps")
def test_every_row_of_the_released_schedules(run: dict) -> None:
    schedules = Schedules(**{**run["args"], "momentum": tuple(run["args"]["momentum"])})
    for step, *values in run["rows"]:
        # The same formulas in float64; a few last bits may differ where the order of operations does.
        assert schedules.at(step) == pytest.approx(values, rel=1e-14, abs=1e-18)


@pytest.mark.parametrize(
    ("step", "lr", "weight_decay", "momentum"),
    [
        (0, 2.00035e-4, 0.0400000001, 0.998),
        (12000, 6.249999998e-4, 0.05001391, 0.99821333),
        (45000, 4.7319558e-4, 0.16438172, 0.9988),
        (89999, 7.5042e-5, 0.36562306, 0.99959998),
    ],
)
def test_published_vit_large_values(step: int, lr: float, weight_decay: float, momentum: float) -> None:
    values = Schedules(90_000, 12_000).at(step)
    assert values.lr == pytest.approx(lr, rel=5e-6)
    assert values.weight_decay == pytest.approx(weight_decay, rel=1e-7)
    assert values.momentum == pytest.approx(momentum, rel=1e-8)


def test_the_last_warm_up_step_has_exactly_the_peak() -> None:
    assert Schedules(90_000, 12_000).at(11_999).lr == 6.25e-4


def test_values_stay_at_the_end_after_it() -> None:
    schedules = Schedules(100, 10, scale=1.0)
    assert schedules.at(100) == schedules.at(1000) == (1e-6, 0.4, 1.0)


def test_warm_up_as_long_as_the_run() -> None:
    assert Schedules(5, 5, scale=1.0).at(4).lr == 6.25e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"warmup_steps": 101}, r"warmup_steps must be within 0..total_steps=100, got 101"),
        ({"warmup_steps": -1}, "warmup_steps must be within"),
        ({"scale": 0.5}, "scale must be a finite number of at least 1"),
        ({"scale": float("inf")}, "scale must be"),
        ({"lr": -1e-3}, "lr must be a finite number"),
        ({"final_weight_decay": float("nan")}, "final_weight_decay must be"),
        ({"momentum": (0.9, 1.1)}, "momentum must be two numbers"),
        ({"momentum": (0.9,)}, "momentum must be two numbers"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedules(**{"total_steps": 100, "warmup_steps": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"scale": None}, "scale must be a number, got None"),
        ({"momentum": 0.9}, r"momentum must be two numbers \(start, end\), got 0\.9"),
    ],
)
def test_what_is_no_number_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Schedules(**{"total_steps": 100, "warmup_steps": 10, **arguments})


def test_steps_must_be_ints_from_zero() -> None:
    with pytest.raises(TypeError, match=r"total_steps must be an int, got 100.0"):
        Schedules(100.0, 10)
    with pytest.raises(TypeError, match=r"k must be an int, got 1\.5"):
        Schedules(100, 10).at(1.5)
    with pytest.raises(ValueError, match="k must be a step number counted from 0, got -1"):
        Schedules(100, 10).at(-1)
