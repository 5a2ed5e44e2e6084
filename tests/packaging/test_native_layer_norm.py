"""The native library's residual addition and layer norm: their order, what they leave alone and what they refuse."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import _cpu_norm, _native, _reference_norm

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [FP32, BF16, FP16]
GUARD = 7.0
EPS = 1e-6


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


def make(rows, width, residual=FP32, branch=BF16, normed=BF16):
    """residual, branch, weight, bias; gradients of the sum and of the normalised rows."""
    x, y, g, h = (torch.randn(rows, width) for _ in range(4))
    given = ((x * 2 + 1).to(residual), y.to(branch), torch.randn(width) + 1, torch.randn(width))
    return given, (g.to(residual), h.to(normed))


def both(given, grads, dtype, needs=(True, True, True, True), row=_cpu_norm):
    """Everything that the forward and the backward pass give."""
    added, normed, statistics = row.add_layer_norm(*given, EPS, dtype)
    there = added if given[1] is not None else given[0]
    branch = there.dtype if given[1] is None else given[1].dtype
    backward = row.add_layer_norm_backward(*grads, there, statistics, given[2], branch, FP32, list(needs))
    return added, normed, statistics, *backward


@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("branch", DTYPES, ids=str)
@pytest.mark.parametrize("normed", DTYPES, ids=str)
def test_every_combination_of_dtypes(residual, branch, normed):
    given, grads = make(70, 45, residual, branch, normed)
    found, plain = (both(given, grads, normed, row=row) for row in (_cpu_norm, _reference_norm))
    wide = [given[0].double(), given[1].double(), *(x.double() for x in given[2:])]
    wide[0], wide[1] = found[0].double(), torch.zeros(70, 45, dtype=FP64)  # the sum as it was rounded
    exact = both(wide, [grad.double() for grad in grads], FP64, row=_reference_norm)
    assert torch.equal(found[0], plain[0])
    for ours, same_dtype, true in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert_accurate(ours, same_dtype, true)


@pytest.mark.parametrize("width", [1, 15, 31, 33, 100, 1027])
def test_the_same_bits_on_any_number_of_threads(threads, width):
    for dtypes in ((FP32, BF16, BF16), (BF16, BF16, FP32), (FP32, FP32, FP32)):
        given, grads = make(700, width, *dtypes)
        results = []
        for number in (1, 2, 5):
            threads(number)
            results.append(both(given, grads, dtypes[2]))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (33, 5), (3, 47)])
def test_writes_what_it_should_and_nothing_else(monkeypatch, dtype, size):
    """Every tensor that it makes is one element behind a guard and before others."""
    kept = []

    def guarded(shape, dtype):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = torch.Size(shape).numel()
        storage = torch.full((count + 10,), GUARD, dtype=dtype)
        kept.append((storage, count))
        return storage[1 : 1 + count].view(shape)

    given, grads = make(*size, dtype, FP32, dtype)
    expected = both(given, grads, dtype)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype=FP32: guarded(shape, dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape, dtype=None: guarded(shape, dtype or self.dtype))
    found = both(given, grads, dtype)
    monkeypatch.undo()
    assert len(kept) >= 7
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)
    for storage, count in kept:
        around = torch.cat((storage[:1], storage[1 + count :]))
        assert torch.equal(around, torch.full_like(around, GUARD))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(6))
def test_what_is_not_finite_goes_where_it_goes_in_the_reference(bad, place):
    given, grads = make(40, 33, FP32, FP32, FP32)
    tensors = [*given, *grads]
    tensors[place].view(-1)[tensors[place].numel() // 2] = bad
    ours, plain = (both(tensors[:4], tensors[4:], FP32, row=row) for row in (_cpu_norm, _reference_norm))
    for found, expected in zip(ours, plain, strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())


def test_only_what_is_needed():
    given, grads = make(40, 33)
    everything = both(given, grads, BF16)[3:]
    for number in range(16):
        needs = [bool(number >> k & 1) for k in range(4)]
        for need, found, expected in zip(needs, both(given, grads, BF16, needs)[3:], everything, strict=True):
            assert torch.equal(found, expected) if need else found.numel() == 0


def test_without_rows():
    given, grads = make(0, 5)
    *rows, of_weight, of_bias = both(given, grads, BF16)
    assert all(x.shape[0] == 0 for x in rows)
    assert torch.equal(of_weight, torch.zeros(5)) and torch.equal(of_bias, torch.zeros(5))


def test_says_what_it_cannot_take():
    x = torch.zeros(2, 3)
    assert _cpu_norm.unfit(x, x, None, None, EPS, BF16) is None
    assert _cpu_norm.unfit(x) is None
    assert "got (2, 3) float64" in (_cpu_norm.unfit(x, x.double(), None, None, EPS, BF16) or "")
    assert "got (2, 3) float64" in (_cpu_norm.unfit(x.double()) or "")
    assert "not to float64" in (_cpu_norm.unfit(x, None, None, None, EPS, FP64) or "")


def test_refuses_rows_that_do_not_exist():
    """Whoever calls the operators past the public function: nothing is read beyond the end of a tensor."""
    x, vector, statistics, needs = torch.zeros(3, 4), torch.zeros(4), torch.zeros(3, 2), [True] * 4
    for name, call in (
        ("branch", lambda: _cpu_norm.add_layer_norm(x, x[:2], vector, vector, EPS, FP32)),
        ("weight", lambda: _cpu_norm.add_layer_norm(x, x, vector[:3], vector, EPS, FP32)),
        ("bias", lambda: _cpu_norm.add_layer_norm(x, x, vector, vector[:3], EPS, FP32)),
        ("grad_sum", lambda: _cpu_norm.add_layer_norm_backward(x[:2], x, x, statistics, vector, FP32, FP32, needs)),
        (
            "grad_normed",
            lambda: _cpu_norm.add_layer_norm_backward(x, x[:, :3], x, statistics, vector, FP32, FP32, needs),
        ),
        ("statistics", lambda: _cpu_norm.add_layer_norm_backward(x, x, x, statistics[:2], vector, FP32, FP32, needs)),
        ("weight", lambda: _cpu_norm.add_layer_norm_backward(x, x, x, statistics, vector[:3], FP32, FP32, needs)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be \[\d, \d\], got"):
            call()


def test_the_library_checks_all_before_it_writes():
    x, out = torch.ones(3, 4), torch.full((4, 16), GUARD)
    at, library = x.data_ptr(), _native.library()
    added, normed, statistics, rest = (row.data_ptr() for row in out)

    def matrix(data=at, stride=4, dtype=0):
        return _native.Matrix(data, stride, dtype)

    def forward(
        *, residual=None, branch=None, weight=at, rows=3, width=4, to=(added, normed), dtype=0, threads=1, of=statistics
    ):
        given = (residual or matrix(), branch or matrix(), weight, at, rows, width, EPS, *to, dtype, of, threads)
        return library.vjepa_layer_norm_cpu(*given)

    def backward(
        *, sums=None, grad=None, own=None, of=at, rows=3, width=4, to=(added, normed), dtype=0, threads=1, affine=rest
    ):
        given = (sums or matrix(), grad or matrix(), own or matrix(), of, at, rows, width)
        return library.vjepa_layer_norm_backward_cpu(*given, *to, dtype, affine, affine, threads)

    for call, changes, sentence in (
        (forward, {"threads": 0}, "the number of threads is less than 1"),
        (forward, {"dtype": 3}, "a dtype is none of those"),
        (forward, {"residual": matrix(dtype=-1)}, "a dtype is none of those"),
        (forward, {"branch": matrix(dtype=5)}, "a dtype is none of those"),
        (forward, {"rows": -1}, "a size is negative"),
        (forward, {"rows": 2**62}, "a size is negative, too large"),
        (forward, {"width": 0}, "a size is negative"),
        (forward, {"residual": matrix(None)}, "is null"),
        (forward, {"to": (None, normed)}, "is null"),
        (forward, {"branch": matrix(None)}, "is null"),  # a sum without a branch
        (forward, {"to": (added, None)}, "is null"),
        (forward, {"of": None}, "is null"),
        (forward, {"residual": matrix(at + 2)}, "is not aligned"),
        (forward, {"branch": matrix(at + 1, dtype=1)}, "is not aligned"),
        (forward, {"weight": at + 1}, "is not aligned"),
        (forward, {"to": (added + 2, normed)}, "is not aligned"),
        (forward, {"to": (added, normed + 2)}, "is not aligned"),
        (backward, {"threads": 0}, "the number of threads is less than 1"),
        (backward, {"dtype": -1}, "a dtype is none of those"),
        (backward, {"sums": matrix(dtype=1)}, "a dtype is none of those"),  # another than that of the sum
        (backward, {"grad": matrix(dtype=4)}, "a dtype is none of those"),
        (backward, {"rows": -1}, "a size is negative"),
        (backward, {"width": 2**62}, "a size is negative, too large"),
        (backward, {"width": 0}, "a size is negative"),
        (backward, {"grad": matrix(None)}, "is null"),
        (backward, {"own": matrix(None)}, "is null"),
        (backward, {"of": None}, "is null"),
        (backward, {"sums": matrix(at + 1)}, "is not aligned"),
        (backward, {"to": (added + 1, normed)}, "is not aligned"),
        (backward, {"to": (added, normed + 2)}, "is not aligned"),
        (backward, {"affine": rest + 2}, "is not aligned"),
    ):
        with pytest.raises(_native.NativeError, match=sentence):
            _native.check(call(**changes))
    assert torch.equal(out, torch.full((4, 16), GUARD))
    _native.check(forward())
    _native.check(backward())
    assert (out[:, 12:] == GUARD).all()
