import json
from pathlib import Path

import pytest
import torch

from vjepa.positions import interpolate_positions, sincos_3d

TABLES = json.loads((Path(__file__).parent / "golden" / "positions.json").read_text())["tables"]


@pytest.mark.parametrize("case", TABLES, ids=lambda case: f"{case['dim']}-{case['uniform_power']}")
def test_released_tables(case, tools):
    got = tools.summary(sincos_3d(case["dim"], tuple(case["grid"]), case["uniform_power"]))
    assert got["shape"] == case["shape"]
    torch.testing.assert_close(torch.tensor(got["values"]), torch.tensor(case["values"]), rtol=0, atol=1e-6)
    assert got["abs_sum"] == pytest.approx(case["abs_sum"], rel=1e-6)


@pytest.mark.parametrize(("uniform", "shares"), [(True, (16, 16, 16)), (False, (24, 12, 12))])
def test_each_axis_fills_its_share_of_a_rectangular_grid(uniform, shares):
    table = sincos_3d(48, (3, 4, 5), uniform).view(3, 4, 5, 48)
    time, height, width = table.split(shares, dim=-1)
    for share, axis in ((time, 0), (height, 1), (width, 2)):
        along = share.movedim(axis, 0)
        assert torch.equal(along, along[:, :1, :1].expand_as(along))  # depends on its own axis alone
        assert not torch.equal(along[0], along[1])
    frequencies = 10000.0 ** (-torch.arange(shares[1] // 2, dtype=torch.float64) * 2 / shares[1])
    expected = torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]).float()
    torch.testing.assert_close(height[0, 3, 0], expected, rtol=0, atol=1e-7)


def test_table_is_cut_to_a_width_the_shares_exceed():
    assert torch.equal(sincos_3d(26, (2, 3, 2)), sincos_3d(30, (2, 3, 2))[:, :26])  # both have shares of 10


def test_interpolation_of_a_linear_ramp_stays_linear():
    t, h, w = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), torch.arange(8.0), indexing="ij")
    ramp = torch.stack([t, h, w], dim=-1).reshape(-1, 3)
    got = interpolate_positions(ramp, (4, 6, 8), (2, 3, 16)).view(2, 3, 16, 3)
    assert torch.allclose(got[:, 0, 0, 0], torch.tensor([0.5, 2.5]))  # cell centres: halving averages pairs
    assert torch.allclose(got[0, :, 0, 1], torch.tensor([0.5, 2.5, 4.5]))
    assert torch.allclose(got[0, 0, 1:15, 2], torch.arange(1, 15) / 2 - 0.25)


def test_equal_grid_gives_the_table_itself():
    table = sincos_3d(12, (2, 2, 3))
    assert interpolate_positions(table, (2, 2, 3), (2, 2, 3)) is table


def test_unusable_arguments_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of 8 when uniform_power is False, got 12"):
        sincos_3d(12, (2, 2, 2), uniform_power=False)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        sincos_3d(0, (2, 2, 2))
    with pytest.raises(TypeError, match=r"dim must be an int, got 12\.0"):
        sincos_3d(12.0, (2, 2, 2))
    for grid in ((2, 0, 2), (2, 2), (2, 2, 1.5), 8):
        with pytest.raises(ValueError, match=r"^grid must be \(t, h, w\), three ints of at least 1, got"):
            sincos_3d(12, grid)
    with pytest.raises(ValueError, match=r"new_grid must be \(t, h, w\), three ints of at least 1, got \(0, 2, 2\)"):
        interpolate_positions(torch.zeros(8, 12), (2, 2, 2), (0, 2, 2))
    with pytest.raises(ValueError, match=r"table must have shape \(8, D\).*got \(9, 12\)"):
        interpolate_positions(torch.zeros(9, 12), (2, 2, 2), (4, 2, 2))
