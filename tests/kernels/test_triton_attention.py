"""What only the Triton kernels of attention have: 2^x on two units, work items, tiles of several parts, far memory."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import attention, backend, varlen_attention

pytest.importorskip("triton")

import triton
import triton.language as tl

from vjepa.kernels import _triton_attention, _triton_attention_backward, _triton_attention_parts
from vjepa.kernels._triton_attention_parts import Tile, items_for, list_items, parts_of

POLYNOMIAL = 1.02e-4  # largest relative error; rounding to bfloat16 has 2^-9, to float16 2^-12
SHARES = (0, 2, 4, 8)
FAR = 2**28  # rows of 8 features so many heads apart are 2^31 elements apart


@triton.jit
def _exp2_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr):
    place_MN = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place_MN, _triton_attention_parts.exp2(tl.load(x_ptr + place_MN), SHARE))


def exp2(x, share):
    out = torch.full_like(x, float("nan"))
    _exp2_kernel[1,](x, out, *x.shape, share)
    return out


@pytest.mark.parametrize("share", SHARES)
def test_exp2_over_the_whole_range(device, share):
    x = torch.cat(
        (torch.linspace(-130, 0.001, 16000), torch.linspace(-1, 0, 1000), torch.tensor([-0.0, -1e-30, -1e-8]))
    )
    x = x[torch.randperm(x.numel())][:16384].reshape(128, 128).to(device)  # every value may meet either unit
    found, exact = exp2(x, share).double(), torch.exp2(x.double())
    normal = x > -126
    assert float((found / exact - 1)[normal].abs().max()) <= POLYNOMIAL
    assert float((found - exact)[~normal].abs().max()) <= 2.0**-125


@pytest.mark.parametrize("share", SHARES)
def test_exp2_of_integers_and_of_what_is_none(device, share):
    for value in (0.0, -1.0, -7.0, -126.0):
        assert bool((exp2(torch.full((32, 32), value, device=device), share) == 2**value).all())
    for value in (-127.0, -150.0, -1e4, -3e38, float("-inf")):
        assert float(exp2(torch.full((32, 32), value, device=device), share).max()) <= 2**-127
    assert bool(exp2(torch.full((32, 32), float("nan"), device=device), share).isnan().all())


@pytest.mark.parametrize("share", SHARES[1:])
def test_one_of_so_many_exponentials_is_a_polynomial(device, share):
    x = torch.full((16, 64), -0.3, device=device)
    differ = exp2(x, share) != exp2(x, 0)
    assert int(differ.sum()) * share == x.numel()
    assert bool((differ == differ[0]).all())  # the same columns in each row


LENGTHS = ((70, 0, 3, 64, 130, 1), (10, 20, 130, 64, 5, 130))


@pytest.mark.parametrize("rows", [16, 64])
def test_items_cover_every_row_once_and_the_longest_come_first(rows):
    lengths, others = LENGTHS
    items = list_items(torch.tensor(lengths), torch.tensor(others), rows).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    other_starts = torch.tensor([0, *others]).cumsum(0).tolist()
    seen = []
    for first, end, other_first, other_end in items:
        sequence = starts.index(end) - 1
        while lengths[sequence] == 0:
            sequence -= 1
        assert (other_first, other_end) == (other_starts[sequence], other_starts[sequence + 1])
        assert (first - starts[sequence]) % rows == 0
        seen += range(first, min(first + rows, end))
    assert sorted(seen) == list(range(sum(lengths)))
    work = [other_end - other_first for *_, other_first, other_end in items]
    assert work == sorted(work, reverse=True)
    assert list_items(torch.tensor([0, 0]), torch.tensor([3, 0]), rows).shape == (0, 4)
    assert list_items(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), rows).shape == (0, 4)


def test_items_are_kept_for_some_lengths(device, monkeypatch):
    monkeypatch.setattr(_triton_attention_parts, "KEPT", 2)
    lengths = [torch.tensor([number, 3]) for number in range(3)]
    first = items_for(lengths[0], lengths[0], 16, device)
    assert items_for(lengths[0].int(), lengths[0].clone(), 16, device) is first
    assert items_for(lengths[0], lengths[1], 16, device) is not first
    items_for(lengths[2], lengths[2], 16, device)
    assert items_for(lengths[0], lengths[0], 16, device) is not first
    assert len(_triton_attention_parts._tables) == 2


def test_items_made_without_gradients_serve_training():
    with torch.inference_mode():
        table = items_for(torch.tensor([5, 9]), torch.tensor([5, 9]), 16, torch.device("cpu"))
    assert not table.is_inference()


def test_head_dims_are_padded_as_little_as_tiles_allow():
    widths = {
        1: 16,
        16: 16,
        24: 32,
        32: 32,
        40: 48,
        48: 48,
        64: 64,
        72: 80,
        80: 80,
        88: 96,
        128: 128,
        160: 160,
        250: 256,
    }
    assert {head_dim: sum(parts_of(head_dim)) for head_dim in widths} == widths
    assert parts_of(80) == (64, 16)
    for head_dim in range(1, 257):
        first, second = parts_of(head_dim)
        assert first + second >= head_dim
        assert all(part & (part - 1) == 0 for part in (first, second))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few tokens fill several, forward and backward."""

    def use(share=0, reload=False):
        tile = {256: Tile(32, 32, 4, 1, reload)}
        for module, names in ((_triton_attention, ["TILES"]), (_triton_attention_backward, ["QUERIES", "KEYS"])):
            for name in names:
                monkeypatch.setattr(module, name, dict.fromkeys(("shared", "registers", "float32"), tile))
            monkeypatch.setattr(module, "SHARE", share)

    return use


def run(name, inputs, grad, lengths, kv_lengths):
    cu, kv_cu = (
        torch.tensor([0, *torch.tensor(given).cumsum(0)], dtype=torch.int32, device=grad.device)
        for given in (lengths, kv_lengths)
    )
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend(name):
        out = varlen_attention(*leaves, cu, lengths, kv_cu_seqlens=kv_cu, kv_lengths=kv_lengths)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize(
    ("head_dim", "share", "reload"), [(20, 0, False), (40, 2, True), (80, 4, False), (24, 8, True)]
)
def test_many_tiles_and_both_parts(small_tiles, device, head_dim, share, reload):
    """Lengths below, at and above the multiples of a tile; both units of exponentials."""
    small_tiles(share, reload)
    lengths, kv_lengths = (33, 1, 0, 32), (64, 33, 7, 31)
    q, k, v = (torch.randn(sum(n), 1, head_dim, device=device) for n in (lengths, kv_lengths, kv_lengths))
    grad = torch.randn_like(q)
    ours = run("triton", (q, k, v), grad, lengths, kv_lengths)
    double = [x.double() for x in (q, k, v)]
    for found, exact in zip(ours, run("reference", double, grad.double(), lengths, kv_lengths), strict=True):
        error = float((found - exact).abs().max() / exact.abs().max())
        assert error <= (2e-4 if share else 2e-6)


@pytest.fixture
def far(tmp_path, device):
    """Memory of 2^32 elements, of which few are touched: a file with a hole, or a part of the GPU's memory."""

    def zeros(name, dtype=torch.float16):
        if device.type == "cuda":
            if torch.cuda.mem_get_info(device)[0] < 2**33 * dtype.itemsize:
                pytest.skip(f"needs {2**33 * dtype.itemsize >> 30} GB of the GPU's memory")
            return torch.zeros(2**32 + 64, dtype=dtype, device=device)
        return torch.from_file(str(tmp_path / name), shared=True, size=2**32 + 64, dtype=dtype)

    return zeros


@pytest.mark.parametrize("shape", [((2, 1, 8), (2**31, 8, 1)), ((3, 2, 8), (8, 2**31, 1))], ids=["rows", "heads"])
@pytest.mark.parametrize("place", range(4))
def test_rows_and_heads_far_away(far, device, shape, place):
    """Rows, or heads, of q, k, v or the gradient lie 2^31 elements apart."""
    sizes, strides = shape
    inputs = [torch.randn(sizes).half().to(device) for _ in range(4)]
    apart = list(inputs)
    apart[place] = far("far").as_strided(sizes, strides)
    apart[place].copy_(inputs[place])
    lengths = (sizes[0],)
    near = run("triton", inputs[:3], inputs[3], lengths, lengths)
    for ours, expected in zip(run("triton", apart[:3], apart[3], lengths, lengths), near, strict=True):
        assert torch.equal(ours, expected)


def test_results_far_away(far, device):
    """A lie about the number of heads, of which the only program makes the first, puts rows 2^31 elements apart."""
    q, k, v, grad = (torch.randn(2, 1, 8).half().to(device) for _ in range(4))
    near, *grads = run("triton", (q, k, v), grad, (2,), (2,))
    items = torch.tensor([[0, 2, 0, 2]], dtype=torch.int32, device=device)
    sizes, lse = (FAR, *(8, 8) * 3, 8**-0.5), torch.zeros(FAR + 1, device=device)
    made_by = _triton_attention.meta(_triton_attention.TILES, "shared", 8, 0, 1, _triton_attention.precision(q.dtype))
    out = far("out")
    _triton_attention._attention_kernel[1,](q, k, v, out, lse, items, *sizes, **made_by)
    assert torch.equal(out.as_strided((2, 1, 8), (2**31, 8, 1)), near)

    module, d, sizes = _triton_attention_backward, torch.zeros(FAR + 1, device=device), (FAR, *(8, 8) * 4, 8**-0.5)
    results = [far(name) for name in ("q", "k", "v")]
    made_by = module.meta(module.QUERIES, "shared", 8, 0, 1, module.precision(q.dtype))
    module._grad_q_kernel[1,](q, k, v, grad, out, lse, d, results[0], items, *sizes, **made_by)
    made_by = module.meta(module.KEYS, "shared", 8, 0, 1, module.precision(q.dtype))
    module._grad_kv_kernel[1,](q, k, v, grad, lse, d, *results[1:], items, *sizes, **made_by)
    for found, expected in zip(results, grads, strict=True):
        assert torch.equal(found.as_strided((2, 1, 8), (2**31, 8, 1)), expected)


def test_refuses_what_its_kernels_do_not_compute(device):
    q, cu = torch.zeros(2, 1, 8, device=device), torch.tensor([0, 2], dtype=torch.int32, device=device)
    with backend("triton"):
        with pytest.raises(RuntimeError, match="its kernels do not compute in float64"):
            varlen_attention(*(q.double(),) * 3, cu, (2,))
        with pytest.raises(RuntimeError, match=r"its kernels need a positive scale, got -1\.0"):
            varlen_attention(q, q, q, cu, (2,), scale=-1.0)
        wide = torch.zeros(2, 1, 80, device=device)
        if device.type == "cuda":
            with pytest.raises(RuntimeError, match="heads of up to 64 in float32, got 80"):
                varlen_attention(wide, wide, wide, cu, (2,))
    assert attention.TRITON_FLOAT32 == 64
