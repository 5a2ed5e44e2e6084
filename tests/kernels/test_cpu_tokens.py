"""The native library's token operators: the same bits on any number of threads, and what is refused."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import (
    TokenIndices,
    _cpu_tokens,
    _dispatch,
    _native,
    backend,
    gather_tokens,
    masked_l1_loss,
    predictor_tokens,
    scatter_tokens,
)

CPU = torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPS = ("gather_tokens", "scatter_tokens", "predictor_tokens", "masked_l1_loss")

pytestmark = pytest.mark.skipif(not _native.available()[0], reason="the native library is not built")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(op, dtype):
    """Outputs and gradients of sizes that several threads share, duplicates included."""
    generator = torch.Generator().manual_seed(0)
    sets = TokenIndices.from_sets(
        [torch.randint(0, 500, (n,), generator=generator) for n in (700, 1, 333, 900)], clip=[0, 1, 1, 0]
    )
    others = TokenIndices.from_sets(
        [torch.randint(0, 500, (n,), generator=generator) for n in (5, 600, 77, 300)], clip=[0, 1, 1, 0]
    )

    def randn(*shape, kind=dtype):
        return torch.randn(shape, generator=generator).to(kind).requires_grad_()

    if op == "gather_tokens":
        inputs = [randn(2, 500, 97)]
        outputs = [gather_tokens(*inputs, sets)]
    elif op == "scatter_tokens":
        inputs = [randn(sets.total, 97), randn(97)]
        outputs = [scatter_tokens(inputs[0], sets, 500, fill=inputs[1])]
    elif op == "predictor_tokens":
        inputs = [randn(sets.total, 97), randn(3, 97, kind=FP32)]
        positions = randn(500, 97, kind=FP32).detach()
        outputs = [predictor_tokens(*inputs, positions, sets, others, torch.tensor([0, 4, 1, 2]))[0]]
    else:
        inputs = [randn(sets.total, 97)]
        outputs = [masked_l1_loss(*inputs, randn(2, 500, 97).detach(), sets)]
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_bits_on_any_number_of_threads(threads, op, dtype):
    results = []
    for number in (1, 2, 3):
        threads(number)
        with backend("cpu"):
            results.append(run(op, dtype))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("op", OPS)
def test_serves_by_itself_what_it_can_take(op, monkeypatch):
    served = []
    select = _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda *given: served.append(select(*given)) or served[-1])
    with backend("auto"):
        run(op, BF16)
        assert {row.name for row in served} == {"cpu"}
    served.clear()
    with backend("auto"):
        assert all(x.dtype in (FP64, FP32) for x in run(op, FP64))
    assert "reference" in {row.name for row in served}


def test_refuses_tokens_that_do_not_exist():
    """Whoever calls it past the operators' own checks."""
    x, offsets, clip = torch.zeros(2, 5, 3), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1])
    good = torch.tensor([0, 4])
    assert _cpu_tokens.gather_tokens(x, good, offsets, clip).shape == (2, 3)
    for indices, cu, clips in (
        (torch.tensor([0, 5]), offsets, clip),
        (torch.tensor([-1, 0]), offsets, clip),
        (good, offsets, torch.tensor([2])),
        (good, torch.tensor([0, 3], dtype=torch.int32), clip),
    ):
        for call in (
            lambda *sets: _cpu_tokens.gather_tokens(x, *sets),
            lambda *sets: _cpu_tokens.gather_tokens_backward(torch.zeros(2, 3), *sets, 2, 5),
            lambda *sets: _cpu_tokens.scatter_tokens(torch.zeros(2, 3), *sets, 2, 5, None, 0.0),
            lambda *sets: _cpu_tokens.scatter_tokens_backward(x, *sets, None),
            lambda *sets: _cpu_tokens.masked_l1_loss(torch.zeros(2, 3), x, sets, 1e-5, None),
        ):
            with pytest.raises(_native.NativeError, match="a token or a clip does not exist"):
                call(indices, cu, clips)


def test_refuses_rows_that_do_not_exist():
    """Whoever calls the operators past the public functions: nothing is read beyond the end of a tensor."""
    x, sets = torch.zeros(1, 5, 3), (torch.tensor([0, 4]), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0]))
    two, one, ops = torch.zeros(2, 3), torch.zeros(1, 3), torch.ops.vjepa
    lengths, statistics = torch.tensor([2]), torch.zeros(2, 2)
    halves = (*sets[:2], lengths, *sets[:2], lengths, torch.tensor([0]))
    grads = (*sets[:2], *sets[:2], torch.tensor([0]), 1, 5, *(FP32,) * 3, [True] * 3)
    with backend("cpu"):
        for name, call in (
            ("grad", lambda: ops.gather_tokens_backward(one, *sets, 1, 5)),
            ("values", lambda: ops.scatter_tokens(one, *sets, 1, 5, None, 0.0)),
            ("fill", lambda: ops.scatter_tokens(two, *sets, 1, 5, one[0, :2], 0.0)),
            ("prediction", lambda: ops.masked_l1_loss(two[:, :2], x, *sets, lengths, 1e-5, None)),
            ("prediction", lambda: ops.masked_l1_loss_backward(one[0, 0], one, x, *sets, statistics, None)),
            ("statistics", lambda: ops.masked_l1_loss_backward(one[0, 0], two, x, *sets, statistics[:1], None)),
            ("context", lambda: ops.predictor_tokens(one, one, x[0], *halves)),
            ("mask_tokens", lambda: ops.predictor_tokens(two, one[:, :2], x[0], *halves)),
            ("pos_embed", lambda: ops.predictor_tokens(two, one, x[0, :, :2], *halves)),
            ("grad", lambda: ops.predictor_tokens_backward(torch.zeros(3, 3), *grads)),
        ):
            with pytest.raises(ValueError, match=rf"{name} must be \[\d, \d\], got"):
                call()


def test_says_what_it_cannot_take():
    x = torch.zeros(1, 3, 2, dtype=FP64)
    sets = TokenIndices.from_sets([torch.tensor([1])])
    with backend("cpu"):
        with pytest.raises(RuntimeError, match=r"it moves floats of at most 32 bits, got \(1, 3, 2\) float64"):
            gather_tokens(x, sets)
        with pytest.raises(RuntimeError, match=r"it takes float32 and bfloat16, got \(1, 2\) float16"):
            masked_l1_loss(torch.zeros(1, 2, dtype=FP16), x.float(), sets)
        with pytest.raises(RuntimeError, match="its context has at most 32 bits"):
            predictor_tokens(x[0, :1], x[0, :1], x[0], sets, sets, torch.tensor([0]))


def test_wide_rows_and_none(threads):
    """A row is longer than what a thread is worth; and there is no row at all."""
    threads(2)
    with backend("cpu"):
        for length, width, ids in ((3, 70_001, (2, 0)), (4, 5, ()), (2, 1, (1,))):
            sets = TokenIndices.from_sets([torch.tensor(ids, dtype=torch.int64)])
            x = torch.randn(1, length, width, requires_grad=True)
            out = gather_tokens(x, sets)
            assert torch.equal(out, x[0, list(ids)])
            (grad,) = torch.autograd.grad(out, x, out.detach())
            assert torch.equal(grad[0, list(ids)], out)
            assert torch.equal(scatter_tokens(out, sets, length), grad)
