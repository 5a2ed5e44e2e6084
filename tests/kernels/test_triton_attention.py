"""What only the Triton kernels of attention have: 2^x on two units, work items, tiles of several parts, far memory."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

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
    with torch.device("meta"):  # whatever the default device is
        assert list_items(torch.tensor([3], device="cpu"), torch.tensor([4], device="cpu"), 2).device.type == "cpu"
    assert list_items(torch.tensor([0, 0]), torch.tensor([3, 0]), rows).shape == (0, 4)
    assert list_items(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), rows).shape == (0, 4)


def test_items_are_kept_for_some_lengths(device, monkeypatch):
    monkeypatch.setattr(_triton_attention_parts, "KEPT", 2)
    lengths = [torch.tensor([number, 3]) for number in range(3)]
    first = items_for(lengths[0], lengths[0], 16, device)
    assert items_for(lengths[0].int(), lengths[0].clone(), 16, device) is first
    assert items_for(lengths[0], lengths[1], 16, device) is not first
    assert items_for(lengths[0], lengths[0], 16, device) is first
    items_for(lengths[2], lengths[2], 16, device)
    assert items_for(lengths[0], lengths[0], 16, device) is first  # used later than the one that went
    for other in lengths[1:]:
        items_for(other, other, 16, device)
    assert items_for(lengths[0], lengths[0], 16, device) is not first
    assert len(_triton_attention_parts._tables) == 2


def test_items_made_without_gradients_serve_training():
    with torch.inference_mode():
        table = items_for(torch.tensor([5, 9]), torch.tensor([5, 9]), 16, torch.device("cpu"))
    assert not table.is_inference()


def test_a_cuda_graph_takes_the_table_of_the_runs_before_it(monkeypatch):
    """A graph is captured on a stream of its own, where a copy from host memory would be made again by each replay."""
    parts, stream = _triton_attention_parts, SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(parts, "KEPT", 1)
    monkeypatch.setattr(parts, "_tables", OrderedDict())
    monkeypatch.setattr(parts, "_captured", set())
    monkeypatch.setattr(parts, "list_items", lambda *lengths: SimpleNamespace(to=lambda *where, **how: torch.zeros(4)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.cuda_stream == 2)
    known, other, device = torch.tensor([5, 9]), torch.tensor([6, 9]), torch.device("cuda", 0)
    table = items_for(known, known, 16, device)
    stream.cuda_stream = 2
    assert items_for(known, known, 16, device) is table
    for lengths, rows in ((other, 16), (known, 32)):
        with pytest.raises(RuntimeError, match="must run once with the same lengths before a CUDA graph captures it"):
            items_for(lengths, lengths, rows, device)
    stream.cuda_stream = 3
    assert items_for(known, known, 16, device) is not table  # whose copy may be under way on another stream
    assert all(kept is not table for kept in parts._tables.values())
    assert parts._captured == {table}  # though no longer at hand


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_a_cuda_graph_replays_attention():
    device, lengths = torch.device("cuda", 0), (33, 70)
    inputs = [torch.randn(103, 2, 24, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad, cu = torch.randn_like(inputs[0]), torch.tensor([0, 33, 103], dtype=torch.int32, device=device)

    def step():
        with backend("triton"):
            out = varlen_attention(*inputs, cu, lengths)
            return out, *torch.autograd.grad(out, inputs, grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(2)
    _triton_attention_parts._tables.clear()
    expected = step()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


def test_float32_has_no_polynomial():
    tiles = {name: {256: Tile(32, 32, 4, 1, share=8)} for name in ("float32", "shared")}
    assert [_triton_attention_parts.meta(tiles, name, 24, 8, "ieee")["SHARE"] for name in tiles] == [0, 8]


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
        136: 192,
        160: 192,
        192: 192,
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
        tile = {256: Tile(32, 32, 4, 1, reload, share)}
        for module, names in ((_triton_attention, ["TILES"]), (_triton_attention_backward, ["QUERIES", "KEYS"])):
            for name in names:
                monkeypatch.setattr(module, name, dict.fromkeys(("shared", "registers", "float32"), tile))

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
    lengths, kv_lengths = (97, 1, 0, 64), (64, 33, 7, 31)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # which no GPU computes with all of these
    q, k, v = (torch.randn(sum(n), 1, head_dim).to(device, dtype) for n in (lengths, kv_lengths, kv_lengths))
    grad = torch.randn_like(q)
    ours = run("triton", (q, k, v), grad, lengths, kv_lengths)
    double = [x.double() for x in (q, k, v)]
    for found, exact in zip(ours, run("reference", double, grad.double(), lengths, kv_lengths), strict=True):
        error = float((found - exact).abs().max() / exact.abs().max())
        assert error <= (2e-2 if dtype == torch.bfloat16 else 2e-4 if share else 2e-6)


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
    sizes, lse, d = (FAR, 2, *(8, 8) * 3, 8**-0.5), *torch.zeros(2, 1, 2, device=device)
    out, *results = (far(name) for name in ("out", "q", "k", "v"))
    launch((q, k, v, grad), out, lse, d, results, items, sizes, 1)
    for found, expected in zip((out, *results), (near, *grads), strict=True):
        assert torch.equal(found.as_strided((2, 1, 8), (2**31, 8, 1)), expected)


def test_sums_far_away(far, device):
    """A lie about the number of tokens puts the sums of the third head 2^32 elements behind those of the first."""
    q, k, v, grad = (torch.randn(2, 3, 8).half().to(device) for _ in range(4))
    near, *grads = run("triton", (q, k, v), grad, (2,), (2,))
    items = torch.tensor([[0, 2, 0, 2]], dtype=torch.int32, device=device)
    lse, d = (far(name, torch.float32).as_strided((3, 2), (2**31 - 8, 1)) for name in ("lse", "d"))
    out, *results = (torch.zeros_like(q) for _ in range(4))
    launch((q, k, v, grad), out, lse, d, results, items, (3, 2**31 - 8, *(24, 8) * 3, 8**-0.5), 3)
    for found, expected in zip((out, *results), (near, *grads), strict=True):
        assert torch.equal(found, expected)
    assert lse.count_nonzero() == 6


def launch(inputs, out, lse, d, results, items, sizes, programs):
    """Forward and backward with sizes (heads, tokens, strides of q, k and v, scale) that need not be true."""
    q, k, v, grad = inputs
    *forward, scale = sizes
    sizes_backward = (*forward, *forward[-2:], scale)
    module, rounding = _triton_attention_backward, _triton_attention.precision(q.dtype)
    made_by = _triton_attention.meta(_triton_attention.TILES, "shared", 8, 1, rounding)
    _triton_attention._attention_kernel[programs,](q, k, v, out, lse, items, *sizes, **made_by)
    made_by = module.meta(module.QUERIES, "shared", 8, 1, rounding)
    module._grad_q_kernel[programs,](q, k, v, grad, out, lse, d, results[0], items, *sizes_backward, **made_by)
    made_by = module.meta(module.KEYS, "shared", 8, 1, rounding)
    module._grad_kv_kernel[programs,](q, k, v, grad, lse, d, *results[1:], items, *sizes_backward, **made_by)


def test_results_of_the_forward_pass_may_be_strided(device):
    q, k, v, grad = (torch.randn(9, 2, 8, device=device) for _ in range(4))
    lengths, cu = torch.tensor([4, 5]), torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    sets, backward = (cu, lengths, 0.3, cu, lengths), torch.ops.vjepa.varlen_attention_backward
    with backend("triton"):
        out, lse = torch.ops.vjepa.varlen_attention(q, k, v, *sets)
        near = backward(grad, q, k, v, out, lse, *sets)
        out, lse = (torch.stack((x, -x), -1)[..., 0] for x in (out, lse))
        assert all(map(torch.equal, near, backward(grad, q, k, v, out, lse, *sets)))


def test_refuses_what_its_kernels_do_not_compute(device):
    q, cu = torch.zeros(2, 1, 8, device=device), torch.tensor([0, 2], dtype=torch.int32, device=device)
    with backend("triton"):
        with pytest.raises(RuntimeError, match="its kernels do not compute in float64"):
            varlen_attention(*(q.double(),) * 3, cu, (2,))
        for scale in (-1.0, 0.0):
            with pytest.raises(RuntimeError, match=f"its kernels need a positive scale, got {scale}"):
                varlen_attention(q, q, q, cu, (2,), scale=scale)
        wide = torch.zeros(2, 1, 80, device=device)
        if device.type == "cuda":
            with pytest.raises(RuntimeError, match="heads of up to 64 in float32, got 80"):
                varlen_attention(wide, wide, wide, cu, (2,))
    assert attention.TRITON_FLOAT32 == 64
