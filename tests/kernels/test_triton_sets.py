"""Ragged sets inside Triton kernels, and 64-bit offsets in the kernels that move their rows."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import TokenIndices, reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from vjepa.kernels import _triton_gather, _triton_scatter, _triton_sets  # noqa: E402
from vjepa.kernels._triton_sets import IDS, SETS  # noqa: E402

L = 37  # tokens of a clip: neither a multiple of a tile nor less than one
MANY = SETS + 8
CASES = {
    "one": ((7,), (0,)),
    "ragged": ((1, 5, 13), (2, 0, 1)),
    "shared clips": ((4, 3, 6, 2), (1, 1, 0, 1)),
    "empty sets": ((0, 3, 0, 0, 5, 0), (0, 1, 1, 0, 2, 2)),
    "long": ((IDS + 30, 17), (1, 0)),
    "many": ((2, 0, 3, 1) * (MANY // 4), tuple(n * 5 % 3 for n in range(MANY))),
    "far apart": ((1,) * SETS + (3, 2), (1,) * SETS + (0, 2)),  # a clip's first set is the first that is looked at next
    "nothing": ((0, 0), (0, 1)),
}


@pytest.fixture(params=CASES)
def sets(request, make_sets, device):
    lengths, clip = CASES[request.param]
    return make_sets(lengths, L, clip, duplicates=True).to(device)


def spread(tensor):
    """The same entries, not one after the other."""
    return torch.stack((tensor, tensor - 1), 1)[:, 0]


@triton.jit
def set_of_kernel(cu_ptr, out_ptr, num_tokens, num_sets, steps, R: tl.constexpr):
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    set_R = _triton_sets.set_of(cu_ptr, row_R, num_sets, steps)
    tl.device_assert((set_R >= 0) & (set_R < num_sets))
    tl.store(out_ptr + row_R, set_R, mask=row_R < num_tokens)


def test_set_of(sets, device):
    out = torch.full((sets.total,), -1, device=device)
    steps = _triton_sets.search_steps(sets.num_sets)
    set_of_kernel[triton.cdiv(sets.total + 1, 64),](sets.cu_seqlens, out, sets.total, sets.num_sets, steps, R=64)
    expected = torch.repeat_interleave(torch.arange(sets.num_sets), torch.tensor(sets.lengths))
    assert out.tolist() == expected.tolist()


@triton.jit
def last_named_kernel(
    indices_ptr, cu_ptr, clip_ptr, out_ptr, num_sets, R: tl.constexpr, K: tl.constexpr, S: tl.constexpr
):
    id_R = tl.arange(0, R)
    clip = tl.program_id(0)
    last_R = _triton_sets.last_named(clip, id_R, indices_ptr, cu_ptr, clip_ptr, num_sets, R, K, S)
    tl.store(out_ptr + clip * R + id_R, last_R)


def test_last_named(sets, device):
    out = torch.full((3, 64), -2, device=device)
    last_named_kernel[3,](sets.indices, sets.cu_seqlens, sets.clip, out, sets.num_sets, R=64, K=IDS, S=SETS)
    expected = torch.full((3, 64), -1)
    owners = torch.repeat_interleave(sets.clip.cpu(), torch.tensor(sets.lengths)).tolist()
    for i, (clip, token) in enumerate(zip(owners, sets.indices.tolist(), strict=True)):
        expected[clip, token] = i
    assert torch.equal(out.cpu(), expected)


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sum_named_adds_in_the_order_of_the_rows(sets, device, dtype):
    values = torch.randn(sets.total, 5).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = reference.flat_rows(sets.indices, sets.cu_seqlens, sets.clip, L).tolist()
    expected = torch.zeros(3 * L, 5, dtype=wide)
    for row, value in zip(rows, values.cpu().to(wide), strict=True):
        expected[row] += value
    out = _triton_sets.sum_named(values, sets.indices, (sets.cu_seqlens, sets.clip), 3, L, wide)
    assert torch.equal(out.cpu(), expected.view(3, L, 5))


def test_sum_named_rounds_once(device):
    values = torch.full((300, 3), 1.0, device=device).bfloat16()
    ids = torch.zeros(300, dtype=torch.int64, device=device)
    out = _triton_sets.sum_named(values, ids, None, 1, 2, torch.bfloat16)
    assert out[0].tolist() == [[300] * 3, [0] * 3]  # adding ones in bfloat16 stops at 256


@pytest.mark.usefixtures("used_memory")
def test_sum_named_over_all_clips(sets, device):
    values = torch.randn(sets.total, 3).to(device, torch.bfloat16)
    expected = reference.sum_rows(values.cpu(), sets.indices.cpu(), L)
    out = _triton_sets.sum_named(values, sets.indices, None, 1, L, torch.float32)
    assert torch.equal(out.cpu(), expected[None])


def test_sum_named_takes_any_strides(make_sets, device):
    sets = make_sets((9, 4), L, duplicates=True).to(device)
    values = torch.randn(13, 6).to(device)
    arguments = [sets.indices, (sets.cu_seqlens, sets.clip), 2, L, torch.float32]
    expected = _triton_sets.sum_named(values, *arguments)
    arguments[0], arguments[1] = spread(sets.indices), (spread(sets.cu_seqlens), spread(sets.clip))
    for same in (values.T.contiguous().T, torch.cat((values, values), 1)[:, :6]):
        assert torch.equal(_triton_sets.sum_named(same, *arguments), expected)


def test_tiles_leave_few_lanes_idle():
    for width, widest, expected in (
        (1024, 1024, 1024),
        (1024, 256, 256),
        (384, 1024, 128),
        (1280, 1024, 256),
        (1408, 512, 128),
        (192, 256, 64),
        (1000, 1024, 1024),
        (5, 1024, 8),
        (1, 1024, 1),
    ):
        assert _triton_sets.tile_width(width, widest) == expected


# ------------------------------------------------------------------------------------------- beyond 2^31 elements

STEP, FAR = 2**30, 5  # the last of 5 rows lies 2^32 elements from the first: 32 bits would find the first
WIDTH = 8


@pytest.fixture
def far(tmp_path, device):
    """2^32 + 128 bytes, of which few are touched: a file with a hole, or a part of the GPU's memory.

    2^31 bytes lie before them, so that a kernel which computes offsets in 32 bits fails the test and not the process.
    """
    before, size = 2 * STEP, (FAR - 1) * STEP + 128
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 2 * (before + size):
            pytest.skip(f"needs {2 * (before + size) >> 30} GB of the GPU's memory")
        return torch.zeros(before + size, dtype=torch.uint8, device=device)[before:]
    return torch.from_file(str(tmp_path / "hole"), shared=True, size=before + size, dtype=torch.uint8)[before:]


def one_each(device, clips=1):
    """Tokens 0..4 of a clip, or token 0 of five clips."""
    ids = [torch.arange(FAR)] if clips == 1 else [torch.tensor([0])] * clips
    packed = TokenIndices.from_sets(ids, device=device)
    return packed.indices, packed.cu_seqlens, packed.clip


def rows_of(far):
    rows = far.as_strided((FAR, WIDTH), (STEP, 1))
    rows.copy_((torch.arange(FAR)[:, None] + 10 * torch.arange(WIDTH)).to(torch.uint8))
    return rows, rows.clone()


@pytest.mark.parametrize("clips", [1, FAR])
def test_gather_reads_far_away(far, device, clips):
    rows, expected = rows_of(far)
    x = rows.view(clips, FAR // clips, WIDTH)
    assert torch.equal(_triton_gather.gather_tokens(x, *one_each(device, clips)), expected)


def test_features_far_away(far, device):
    rows, expected = rows_of(far)
    rows, expected, sets = rows.T[:FAR], expected.T[:FAR], one_each(device)
    assert torch.equal(_triton_gather.gather_tokens(rows[None], *sets), expected)
    assert torch.equal(_triton_scatter.scatter_tokens(rows, *sets, 1, FAR, None, 0.0)[0], expected)
    assert torch.equal(_triton_scatter.scatter_tokens_backward(rows[None], *sets, None)[0], expected)


def test_gather_writes_far_away(far, device):
    rows, expected = rows_of(far)
    x = expected.clone()
    rows.zero_()
    meta = _triton_gather._gather_meta(WIDTH, x.dtype)
    sizes = (FAR, 1, 0, WIDTH, 1, 0, WIDTH, 1, STEP)
    _triton_gather._gather_kernel[1,](x, *one_each(device), far, *sizes, **meta)
    assert torch.equal(rows, expected)


def test_sums_read_far_away(far, device):
    rows, expected = rows_of(far)
    indices, *sets = one_each(device)
    out = _triton_sets.sum_named(rows, indices, tuple(sets), 1, FAR, torch.float32)
    assert torch.equal(out[0], expected.float())


def test_sums_write_far_away(far, device):
    rows, values = rows_of(far)
    values = values.clone()
    rows.zero_()
    meta = _triton_sets._sum_named_meta(WIDTH, values.dtype, True)
    sizes = (FAR, FAR, STEP // WIDTH, WIDTH, 1, WIDTH)  # a lie about the length puts the clips far apart
    _triton_sets._sum_named_kernel[FAR, 1](values, *one_each(device, FAR), far, *sizes, **meta)
    assert torch.equal(rows, values)


def test_scatter_reads_far_away(far, device):
    rows, expected = rows_of(far)
    out = _triton_scatter.scatter_tokens(rows, *one_each(device), 1, FAR, None, 0.0)
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize("clips", [1, FAR])
def test_scatter_writes_far_away(far, device, clips):
    rows, expected = rows_of(far)
    values = expected.clone()
    rows.zero_()
    sizes = (clips, FAR // clips, WIDTH, 1, WIDTH, 1, STEP)
    meta = _triton_scatter._meta(WIDTH, values.dtype, False)
    _triton_scatter._scatter_kernel[clips,](values, values, *one_each(device, clips), far, *sizes, **meta)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("clips", [1, FAR])
def test_adjoint_of_scatter_reads_far_away(far, device, clips):
    rows, expected = rows_of(far)
    grad = rows.view(clips, FAR // clips, WIDTH)
    assert torch.equal(_triton_scatter.scatter_tokens_backward(grad, *one_each(device, clips), None)[0], expected)


def test_adjoint_of_scatter_writes_far_away(far, device):
    rows, grad = rows_of(far)
    grad = grad.clone()
    indices = torch.tensor([0, 1, 2, 4, 4], device=device)
    _, *sets = one_each(device)
    sizes = (1, FAR, WIDTH, 1, 0, WIDTH, 1, STEP)
    meta = _triton_scatter._meta(WIDTH, grad.dtype, False)
    _triton_scatter._scatter_backward_kernel[1,](grad, indices, *sets, far, grad, *sizes, **meta)
    assert torch.equal(rows[[0, 1, 2, 4]], grad[[0, 1, 2, 4]])
    assert not rows[3].any()
    rows.fill_(7)
    indices = torch.tensor([0, 1, 2, 3, 3], device=device).flip(0)
    _triton_scatter._scatter_backward_kernel[1,](grad, indices, *sets, far, grad, *sizes, **meta)
    assert torch.equal(rows[1:], grad[[3, 2, 1, 0]])
    assert not rows[0].any()
