"""The native library's GELU and column sums: their accuracy, their order, what they leave alone and what they refuse."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import _cpu_mlp, _cpu_products, _native, _reference_mlp, mlp

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]
GUARD = 7.0  # what lies around a matrix and must stay
SIZES = [(0, 5), (1, 1), (1, 31), (31, 33), (32, 512), (33, 513), (97, 1537)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_accurate(ours, same_dtype, exact):
    """The rule of tests/kernels: at most twice PyTorch's own error in the same dtype, or two roundings."""
    rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, same_dtype))
    assert error <= 2 * max(allowed, rounding)


def guarded(shape, dtype, shift=1):
    """A matrix without gaps that begins `shift` elements into its storage, which is GUARD around it, and the storage."""
    count = shape[0] * shape[1]
    storage = torch.full((count + shift + 9,), GUARD, dtype=dtype)
    return storage[shift : shift + count].view(shape), storage


def untouched(matrix, storage, shift=1):
    around = torch.cat((storage[:shift], storage[shift + matrix.numel() :]))
    return torch.equal(around, torch.full_like(around, GUARD))


def slope(x):
    """gelu'(x) in float64."""
    x = x.double()
    return 0.5 * torch.erfc(-x * 0.5**0.5) + x * torch.exp(-x * x / 2) * (2 * torch.pi) ** -0.5


def exact_gelu(x):
    return x.double() * 0.5 * torch.erfc(-x.double() * 0.5**0.5)


def every(dtype):
    """All finite numbers of 16 bits, or many of float32."""
    if dtype == FP32:
        return torch.cat(
            (torch.linspace(-15, 15, 200_001), torch.logspace(-30, 38, 5001), -torch.logspace(-30, 38, 5001))
        )
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_every_number(dtype):
    """Relative: the polynomial's error, 1.3e-4 for 16 bits, and a rounding; far below 0, where it ends, an absolute one."""
    x = every(dtype)
    true, found = exact_gelu(x), _cpu_mlp.gelu(x.clone()[None])[0].double()
    info = torch.finfo(dtype)
    # float32: x^2 log2(e) / 2 of at most 120 is rounded twice, to 2^-18 each, and its exponential by that times log(2);
    # above 0, where at least half of x is left, by an eighth of x^2 2^-24, by the polynomials and by three operations
    relative = info.eps / 2 + (1.3e-4 if dtype != FP32 else torch.where(x < 0, 64.0, 2.0) * info.eps)
    error = (found - true).abs()
    assert (error <= relative * true.abs() + max(2e-18, info.tiny * info.eps)).all()
    plain = (F.gelu(x).double() - true).abs()
    near = x.abs() < 20
    assert error[near].max() <= 2 * plain[near].max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slope_of_every_number(dtype):
    """Absolute: the polynomial's error of 3.2e-5 for 16 bits, and a rounding of what is at most 1.13."""
    x = every(dtype)[None]
    found = _cpu_mlp.gelu_backward(torch.ones_like(x), x, torch.empty_like(x), None, None)
    error = (found.double() - slope(x)).abs().max()
    assert error <= torch.finfo(dtype).eps + (5e-5 if dtype != FP32 else 2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, -0.0] * 21], dtype=dtype)
    grad = torch.ones_like(x)
    found = _cpu_mlp.gelu(x.clone())[0, :5].tolist()
    assert found[0] != found[0]
    assert found[1] == torch.inf and abs(found[2]) <= 2e-18 and found[4] == 0.0
    active = torch.empty_like(x)
    slopes = _cpu_mlp.gelu_backward(grad, x, torch.empty_like(x), active, None)[0, :5].tolist()
    assert slopes[0] != slopes[0] and slopes[4] == 0.5
    assert slopes[1] == 1.0 and abs(slopes[2]) <= 1e-17
    assert torch.equal(active.view(torch.uint8), _cpu_mlp.gelu(x.clone()).view(torch.uint8))
    for bad in (torch.nan, torch.inf):
        grad[0, 3] = bad
        sums = torch.empty(1, x.shape[1])
        slopes = _cpu_mlp.gelu_backward(grad, x, torch.empty_like(x), None, sums)
        assert not slopes[0, 3].isfinite() and not sums[0, 3].isfinite()
        assert slopes[0, 8].isfinite() and sums[0, 8].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes_write_what_they_should_and_nothing_else(dtype, size):
    hidden, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    (active, a), (kept, k), (dhidden, d), (again, e) = (guarded(size, dtype) for _ in range(4))
    active.copy_(hidden)
    _cpu_mlp.gelu(active, kept)
    assert torch.equal(kept, hidden)
    sums, s = guarded((-(-size[0] // 32), size[1]), FP32)
    _cpu_mlp.gelu_backward(grad, hidden, dhidden, again, sums)
    assert torch.equal(again, active)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(dhidden.double(), grad.double() * slope(hidden), rtol=rounding, atol=rounding + 2e-4)
    for block, its in enumerate(dhidden.split(32) if size[0] else ()):
        torch.testing.assert_close(sums[block].double(), its.double().sum(0), rtol=0, atol=32**2 * 2.0**-22)
    for matrix, storage in ((active, a), (kept, k), (dhidden, d), (again, e), (sums, s)):
        assert untouched(matrix, storage)
    in_place = grad.clone()
    assert torch.equal(_cpu_mlp.gelu_backward(in_place, hidden, in_place, None, None), dhidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_does_not_depend_on_where_it_lies(dtype):
    """Nor on the threads that share a matrix, nor on strides."""
    hidden, grad = torch.randn(70, 601).to(dtype), torch.randn(70, 601).to(dtype)
    whole = _cpu_mlp.gelu_backward(grad, hidden, torch.empty_like(grad), active := torch.empty_like(grad), None)
    for column in (0, 1, 15, 33, 511, 512, 600):
        own = [x[:, column:].clone(memory_format=torch.contiguous_format) for x in (grad, hidden)]
        others = torch.empty_like(own[0])
        assert torch.equal(_cpu_mlp.gelu_backward(*own, torch.empty_like(own[0]), others, None), whole[:, column:])
        assert torch.equal(others, active[:, column:])
        assert torch.equal(_cpu_mlp.gelu(own[1]), active[:, column:])
    wide = torch.cat((hidden, hidden), 1)[:, :601]
    assert torch.equal(_cpu_mlp.gelu_backward(grad, wide, torch.empty_like(grad), None, None), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(threads, dtype):
    hidden, grad = torch.randn(1500, 301).to(dtype), torch.randn(1500, 301).to(dtype)
    found = []
    for number in (1, 2, 5):
        threads(number)
        slopes, active, sums = torch.empty_like(grad), torch.empty_like(grad), torch.empty(47, 301)
        _cpu_mlp.gelu_backward(grad, hidden, slopes, active, sums)
        found.append(
            [
                slopes,
                active,
                sums,
                _cpu_mlp.column_sums(sums),
                _cpu_mlp.column_sums(grad),
                _cpu_mlp.gelu(hidden.clone()),
            ]
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 1024, 1025, 40_000])
def test_column_sums(dtype, rows):
    matrix = torch.randn(rows, 37).to(dtype)
    found = _cpu_mlp.column_sums(matrix)
    # each element is added at most 31 times in each of the three levels that 40000 rows have, to sums of absolute values
    bound = 4 * 31 * 2.0**-24 * matrix.double().abs().sum(0)
    assert ((found.double() - matrix.double().sum(0)).abs() <= bound).all()
    wide = torch.cat((matrix, matrix), 1)[:, 5:42]
    assert torch.equal(_cpu_mlp.column_sums(wide), torch.cat((found[5:], found[:5])))
    assert torch.equal(_cpu_mlp.column_sums(matrix[:1].expand(rows, 37))[:0], found[:0])


def test_column_sums_of_any_strides():
    matrix = torch.randn(70, 9)
    expected = _cpu_mlp.column_sums(matrix)
    for other in (matrix.T.contiguous().T, matrix.repeat_interleave(3, 1)[:, ::3], matrix.repeat_interleave(2, 0)[::2]):
        assert torch.equal(_cpu_mlp.column_sums(other), expected)
    assert torch.equal(_cpu_mlp.column_sums(torch.ones(1, 1).expand(70, 9)), torch.full((9,), 70.0))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunks_change_nothing_that_is_theirs(monkeypatch, dtype):
    """Hidden features and bias gradients have the bits of one chunk; all else is as accurate."""
    shapes = ((700, 40), (72, 40), (72,), (24, 72), (24,))
    inputs = [(torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for shape in shapes]
    x, weight1, _, weight2, _ = inputs
    grad = torch.randn(700, 24).to(dtype)
    found = []
    for fewest, size in ((256, 4 << 20), (32, 1)):
        monkeypatch.setattr(_cpu_mlp, "FEWEST_ROWS", fewest)
        monkeypatch.setattr(_cpu_mlp, "CHUNK_BYTES", size)
        chunks = [(chunk.start, chunk.stop) for chunk in _cpu_mlp._chunks(700, 144)]
        assert len(chunks) == (1 if fewest == 256 and size > 1 else 22)
        assert chunks[0][0] == 0 and chunks[-1][1] == 700
        out, hidden = _cpu_mlp.mlp(*inputs, True)
        assert torch.equal(_cpu_mlp.mlp(*inputs, False)[0], out)
        found.append(
            [
                out,
                hidden,
                *_cpu_mlp.mlp_backward(grad, x, found[0][1] if found else hidden, weight1, weight2, [True] * 5),
            ]
        )
    doubles = [tensor.double() for tensor in inputs]
    out, hidden = _reference_mlp.mlp(*doubles, True)
    exact = [
        out,
        hidden,
        *_reference_mlp.mlp_backward(grad.double(), doubles[0], hidden, doubles[1], doubles[3], [True] * 5),
    ]
    out, hidden = _reference_mlp.mlp(*inputs, True)
    plain = [out, hidden, *_reference_mlp.mlp_backward(grad, x, hidden, weight1, weight2, [True] * 5)]
    for results in found:
        for ours, same_dtype, true in zip(results, plain, exact, strict=True):
            assert_accurate(ours, same_dtype, true)
    assert torch.equal(found[0][6], found[1][6])


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_layout(monkeypatch, dtype, amd):
    """Whichever library serves: rows, columns, gaps, an expanded gradient, no rows at all."""
    monkeypatch.setattr(_cpu_products, "made_by_amd", lambda: amd)
    _cpu_products._onednn.cache_clear()
    x, weight, bias = torch.randn(9, 12).to(dtype), torch.randn(5, 12).to(dtype), torch.randn(5).to(dtype)
    grad = torch.randn(9, 1).to(dtype).expand(9, 5)
    for change in (
        lambda m: m,
        lambda m: m.mT.contiguous().mT,
        lambda m: m.repeat_interleave(3, -1)[..., ::3],
        lambda m: m.repeat_interleave(2, 0)[::2],
    ):
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
        for b in (None, bias.repeat_interleave(2)[::2]):
            torch.testing.assert_close(
                _cpu_products.linear(change(x), change(weight), b), F.linear(x, weight, b), **close
            )
        torch.testing.assert_close(_cpu_products.times(grad, change(weight)), grad @ weight, **close)
    assert _cpu_products.linear(x[:0], weight, bias).shape == (0, 5)
    assert _cpu_products.times(grad[:0], weight).shape == (0, 12)
    monkeypatch.undo()
    _cpu_products._onednn.cache_clear()


def test_the_library_checks_all_before_it_writes():
    matrix, sums = torch.full((33, 4), 2.0), torch.full((2, 4), GUARD)
    at, to, library = matrix.data_ptr(), sums.data_ptr(), _native.library()
    many, null = 2**62, None
    refused = [
        (library.vjepa_gelu_cpu(at, 132, 0, at, null, 0), "the number of threads is less than 1"),
        (library.vjepa_gelu_cpu(at, -1, 0, at, null, 1), "a size is negative"),
        (library.vjepa_gelu_cpu(at, many, 0, at, null, 1), "a size is negative, too large"),
        (library.vjepa_gelu_cpu(at, 132, 3, at, null, 1), "a dtype is none of those"),
        (library.vjepa_gelu_cpu(at, 132, -1, at, null, 1), "a dtype is none of those"),
        (library.vjepa_gelu_cpu(null, 132, 0, at, null, 1), "is null"),
        (library.vjepa_gelu_cpu(at, 132, 0, null, null, 1), "is null"),
        (library.vjepa_gelu_cpu(at, 132, 0, at, at + 2, 1), "is not aligned"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, 4, 0, at, null, to, 0), "the number of threads is less than 1"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, -1, 4, 0, at, null, to, 1), "a size is negative"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, -4, 0, at, null, to, 1), "a size is negative"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, many, 4, 0, at, null, to, 1), "a size is negative, too large"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, 4, 7, at, null, to, 1), "a dtype is none of those"),
        (library.vjepa_gelu_backward_cpu(null, at, 4, 33, 4, 0, at, null, to, 1), "is null"),
        (library.vjepa_gelu_backward_cpu(at, null, 4, 33, 4, 0, at, null, to, 1), "is null"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, 4, 0, null, null, to, 1), "is null"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, 4, 0, at, at + 1, to, 1), "is not aligned"),
        (library.vjepa_gelu_backward_cpu(at, at, 4, 33, 4, 0, at, null, to + 2, 1), "is not aligned"),
        (library.vjepa_column_sums_cpu(at, 4, 33, 4, 0, to, 0), "the number of threads is less than 1"),
        (library.vjepa_column_sums_cpu(at, 4, -1, 4, 0, to, 1), "a size is negative"),
        (library.vjepa_column_sums_cpu(at, 4, 33, many, 0, to, 1), "a size is negative, too large"),
        (library.vjepa_column_sums_cpu(at, 4, 33, 4, 9, to, 1), "a dtype is none of those"),
        (library.vjepa_column_sums_cpu(null, 4, 33, 4, 0, to, 1), "is null"),
        (library.vjepa_column_sums_cpu(at, 4, 33, 4, 0, null, 1), "is null"),
        (library.vjepa_column_sums_cpu(at + 1, 4, 33, 4, 0, to, 1), "is not aligned"),
        (library.vjepa_column_sums_cpu(at, 4, 33, 4, 0, to + 1, 1), "is not aligned"),
    ]
    for status, sentence in refused:
        with pytest.raises(_native.NativeError, match=sentence):
            _native.check(status)
    assert torch.equal(matrix, torch.full((33, 4), 2.0)) and torch.equal(sums, torch.full((2, 4), GUARD))
    empty = ctypes.c_void_p(None)
    for status in (
        library.vjepa_gelu_cpu(empty, 0, 0, empty, empty, 1),
        library.vjepa_gelu_backward_cpu(empty, empty, 4, 0, 4, 0, empty, empty, empty, 1),
        library.vjepa_column_sums_cpu(empty, 0, 0, 0, 0, empty, 1),
    ):
        _native.check(status)


def test_refuses_rows_that_do_not_exist():
    """Whoever calls the operator past the public function: nothing is read beyond the end of a tensor."""
    x, weight1, weight2 = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(5, 8)
    grad, hidden, needs = torch.zeros(3, 5), torch.zeros(3, 8), [True] * 5
    for name, given in (
        ("hidden", (grad, x, hidden[:2], weight1, weight2, needs)),
        ("hidden", (grad, x, hidden[:, :7], weight1, weight2, needs)),
        ("grad", (grad[:2], x, hidden, weight1, weight2, needs)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be \[3, \d\], got"):
            _cpu_mlp.mlp_backward(*given)


def test_says_what_it_cannot_take():
    assert "floats of at most 32 bits, got (2, 3) float64" in (_cpu_mlp.unfit(torch.zeros(2, 3).double()) or "")
    assert mlp(*(torch.ones(1, 1).double(),) * 2, None, torch.ones(1, 1).double(), None).dtype == torch.float64
