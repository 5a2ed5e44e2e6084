"""Collapse monitors: what they measure, and when the alarm goes off."""

from __future__ import annotations

import math

import pytest
import torch

from vjepa.monitors import CollapseAlarm, collapse_metrics, effective_rank, sample_rows


@pytest.mark.parametrize("shape", [(300, 16), (20, 64)])
def test_effective_rank_counts_equal_directions(shape):
    rows = torch.zeros(shape)
    for direction in range(5):
        rows[2 * direction, direction], rows[2 * direction + 1, direction] = 3.0, -3.0
    assert float(effective_rank(rows)) == pytest.approx(5, rel=1e-5)
    assert float(effective_rank(rows + 100)) == pytest.approx(5, rel=1e-5)


def test_effective_rank_is_the_entropy_of_the_covariance_spectrum():
    rows = torch.zeros(4, 2)
    rows[0, 0], rows[1, 0], rows[2, 1], rows[3, 1] = 3.0, -3.0, 1.0, -1.0
    p, q = 0.9, 0.1
    assert float(effective_rank(rows)) == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)), rel=1e-6)
    assert float(effective_rank(torch.ones(10, 4))) == 1.0


def test_metrics_of_spread_and_constant_features():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4, 300, 32, generator=generator)
    healthy = collapse_metrics(spread, 2 * spread[0])
    assert float(healthy["target_std"]) == pytest.approx(1, abs=0.05)
    assert float(healthy["effective_rank"]) > 30
    assert float(healthy["predictor_variance"]) == pytest.approx(4, rel=0.1)
    constant = collapse_metrics(torch.randn(32, generator=generator).expand(4, 300, 32), torch.ones(10, 32))
    assert float(constant["target_std"]) < 1e-6
    assert float(constant["effective_rank"]) < 1.01
    assert float(constant["predictor_variance"]) == 0


def test_metrics_scale_with_no_feature_norm_and_take_bf16():
    features = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    small = collapse_metrics(1000 * features, features[0].bfloat16())
    assert float(small["target_std"]) == pytest.approx(
        float(collapse_metrics(features, features[0])["target_std"]), rel=1e-4
    )


def test_sampling_repeats_and_leaves_the_generator_alone():
    rows = torch.arange(5000.0).unsqueeze(1)
    state = torch.get_rng_state()
    first = sample_rows(rows, 100)
    assert first.shape == (100, 1)
    assert first.unique().numel() == 100
    assert torch.equal(first, sample_rows(rows, 100))
    assert torch.equal(torch.get_rng_state(), state)


def feed(alarm: CollapseAlarm, stds: list[float]) -> list[tuple[int, str]]:
    return [
        (number, event.kind)
        for number, std in enumerate(stds)
        for event in alarm.observe({"target_std": std, "effective_rank": 20.0})
    ]


def line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / (count - 1) for i in range(count)]


def test_healthy_dip_raises_no_alarm():
    assert feed(CollapseAlarm(), line(0.68, 0.47, 40) + line(0.47, 0.8, 60)) == []


def test_collapse_raises_one_alarm_and_recovery_one_event():
    alarm = CollapseAlarm(patience=3)
    falling = line(0.68, 0.1, 15)
    first_below = next(number for number, std in enumerate(falling) if std < 0.35 * 0.68)
    assert feed(alarm, [*falling, *[0.1] * 10]) == [(first_below + 2, "collapse")]
    assert alarm.active
    assert feed(alarm, [0.25, 0.1, 0.25, 0.3, 0.3]) == []
    assert feed(alarm, [0.5, 0.5, 0.5, 0.5]) == [(2, "recovered")]
    assert not alarm.active


def test_single_outlier_raises_no_alarm():
    assert feed(CollapseAlarm(), [0.68, 0.1, 0.1, 0.6, 0.1, 0.1, 0.6]) == []


def test_rank_alone_raises_the_alarm():
    alarm = CollapseAlarm()
    events = [
        e
        for rank in [16.0, 4.7, 4.7, 4.7, 2.4, 2.4, 2.4]
        for e in alarm.observe({"target_std": 0.6, "effective_rank": rank})
    ]
    assert [(event.kind, event.metric) for event in events] == [("collapse", "effective_rank")]


def test_state_continues_the_count():
    alarm, resumed = CollapseAlarm(), CollapseAlarm()
    feed(alarm, [0.68, 0.1, 0.1])
    resumed.load_state_dict(alarm.state_dict())
    assert feed(resumed, [0.1]) == [(0, "collapse")]
