"""gather_tokens, scatter_tokens and apply_masks against indexing written out."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, apply_masks, gather_tokens, scatter_tokens

B, L, D = 3, 11, 5
CASES = {
    "ragged": ((4, 1, 7), (2, 0, 1)),
    "shared clip": ((5, 6), (1, 1)),
    "empty set": ((0, 3), (2, 0)),
    "nothing": ((0,), (0,)),
}


def owners(sets):
    return torch.repeat_interleave(sets.clip, torch.tensor(sets.lengths)).tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_values_and_adjoint(make_sets, case, dtype):
    sets = make_sets(CASES[case][0], L, CASES[case][1], duplicates=True)
    x = torch.randn(B, L, D).to(dtype).requires_grad_()
    out = gather_tokens(x, sets)
    where = list(zip(owners(sets), sets.indices.tolist(), strict=True))
    expected = torch.stack([x.detach()[b, i] for b, i in where]) if where else torch.empty(0, D, dtype=dtype)
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    total = torch.zeros(B, L, D)  # adds in float32, in the order of the packed tokens, rounds once
    for row, (b, i) in zip(grad.float(), where, strict=True):
        total[b, i] += row
    assert torch.equal(x.grad, total.to(dtype))


def test_gather_adjoint_adds_in_float32():
    ids = torch.zeros(300, dtype=torch.int64)
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_tokens(x, TokenIndices.from_sets([ids])).sum().backward()
    assert x.grad[0, 0].item() == 300  # adding ones in bfloat16 stops at 256


def test_gather_takes_any_strides(make_sets):
    sets = make_sets((4, 2), L)
    x = torch.randn(L, D, B).permute(2, 0, 1)
    assert torch.equal(gather_tokens(x, sets), gather_tokens(x.contiguous(), sets))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fill", [0, -2.5, "vector"])
def test_scatter_values_and_adjoint(make_sets, case, fill):
    sets = make_sets(CASES[case][0], L, CASES[case][1], duplicates=True)
    values = torch.randn(sets.total, D, requires_grad=True)
    vector = torch.randn(D, requires_grad=True) if fill == "vector" else None
    out = scatter_tokens(values, sets, L, fill if vector is None else vector)
    where = list(zip(owners(sets), sets.indices.tolist(), strict=True))
    background = torch.full((D,), float(fill)) if vector is None else vector
    expected = background.expand(sets.num_clips, L, D) + 0 * values.sum()
    for n, (b, i) in enumerate(where):  # the last of duplicates wins
        expected[b, i] = values[n]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    leaves = [values] if vector is None else [values, vector]
    grad = torch.randn(out.shape)
    ours = torch.autograd.grad(out, leaves, grad)
    for our, same in zip(ours, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(our, same)


def test_gather_after_scatter_is_the_identity(make_sets):
    sets = make_sets((6, 1, 11), L)
    values = torch.randn(sets.total, D)
    assert torch.equal(gather_tokens(scatter_tokens(values, sets, L), sets), values)


def test_scatter_keeps_the_dtype_of_values(make_sets):
    sets = make_sets((2,), L)
    out = scatter_tokens(torch.randn(2, D).bfloat16(), sets, L, torch.randn(D))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("duplicates", [False, True])
def test_gradcheck(make_sets, duplicates):
    sets = make_sets((3, 4, 0, 2), 6, (0, 1, 0, 0), duplicates=duplicates)
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, sets), (x,))
    values = torch.randn(sets.total, 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, f: scatter_tokens(v, sets, 6, f), (values, fill))


def test_deterministic():
    sets = TokenIndices.from_sets([torch.randint(4, (5000,)), torch.randint(4, (3000,))], clip=[0, 0])
    grad = torch.randn(8000, 3)
    grads = []
    for _ in range(2):
        x = torch.zeros(1, 4, 3, requires_grad=True)
        gather_tokens(x, sets).backward(grad)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_opcheck(make_sets):
    ops = torch.ops.vjepa
    sets = make_sets((4, 1, 7), L, (2, 0, 1), duplicates=True)
    packed = (sets.indices, sets.cu_seqlens, sets.clip)
    x, values = torch.randn(B, L, D, requires_grad=True), torch.randn(sets.total, D, requires_grad=True)
    fill = torch.randn(D, requires_grad=True)
    opcheck(ops.gather_tokens.default, (x, *packed))
    opcheck(ops.gather_tokens_backward.default, (values.detach(), *packed, B, L))
    opcheck(ops.scatter_tokens.default, (values, *packed, B, L, fill, 0.0))
    opcheck(ops.scatter_tokens.default, (values, *packed, B, L, None, 1.0))
    opcheck(ops.scatter_tokens_backward.default, (x.detach(), *packed, torch.float32))
    opcheck(ops.scatter_tokens_backward.default, (x.detach(), *packed, None))


def test_apply_masks():
    x = torch.randn(B, L, D, requires_grad=True)
    masks = [torch.randint(L, (B, 4)), torch.randint(L, (B, 4), dtype=torch.int32)]
    expected = [torch.stack([x[b, mask[b].long()] for b in range(B)]) for mask in masks]
    assert torch.equal(apply_masks(x, masks), torch.cat(expected))
    assert all(map(torch.equal, apply_masks(x, masks, concat=False), expected))
    assert torch.equal(apply_masks(x, masks[0]), expected[0])
    (grad,) = torch.autograd.grad(apply_masks(x, masks).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(torch.cat(expected).square().sum(), x)[0])
    uneven = [masks[0], masks[1][:, :2]]
    assert [kept.shape[1] for kept in apply_masks(x, uneven, concat=False)] == [4, 2]
    with pytest.raises(ValueError, match=r"masks\[1\] must have 4 columns to concatenate"):
        apply_masks(x, uneven)


X, FEW = torch.zeros(B, L, D), TokenIndices.from_sets([torch.tensor([0, 1])])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: gather_tokens(X[0], FEW), ValueError, r"x must have the shape \[B, L, D\], got \(11, 5\) float32"),
        (lambda: gather_tokens(X.long(), FEW), TypeError, "x must be one of float32"),
        (lambda: gather_tokens(X, [0, 1]), TypeError, "indices must be a TokenIndices, got list"),
        (lambda: gather_tokens(X, FEW.to("meta")), ValueError, "indices must be on cpu like the tokens, got meta"),
        (
            lambda: gather_tokens(X, TokenIndices.from_sets([torch.tensor([L])])),
            ValueError,
            r"indices.indices must be between 0 and 10 \(tokens of a clip\), got 11",
        ),
        (
            lambda: gather_tokens(X, TokenIndices.from_sets([torch.tensor([0])], clip=[3])),
            ValueError,
            r"indices.clip must be between 0 and 2 \(clips\), got 3",
        ),
        (lambda: scatter_tokens(X[0], FEW, L), ValueError, "values must have one row for each of the 2 indices"),
        (lambda: scatter_tokens(X[0, :2], FEW, 1), ValueError, "between 0 and 0"),
        (lambda: scatter_tokens(X[0, :2], FEW, L, torch.zeros(4)), ValueError, "fill must have 5 entries"),
        (lambda: scatter_tokens(X[0, :2], FEW, L, "0"), TypeError, "fill must be a number or a tensor"),
        (lambda: scatter_tokens(X[0, :2], FEW, 11.0), TypeError, r"length must be an int, got float 11\.0"),
        (lambda: scatter_tokens(X[0, :2], FEW, 0), ValueError, "length must be at least 1, got 0"),
        (lambda: apply_masks(X, None), TypeError, r"masks must be a tensor \[B, K\] or a list of them, got NoneType"),
        (lambda: apply_masks(X, []), ValueError, "masks must have at least one tensor"),
        (lambda: apply_masks(X, [torch.zeros(2, 1).long()]), ValueError, "one row for each of the 3 clips"),
        (lambda: apply_masks(X, [torch.zeros(B, 1)]), TypeError, r"masks\[0\] must be one of int64"),
        (lambda: apply_masks(X, [torch.full((B, 1), L)]), ValueError, "between 0 and 10"),
    ],
)
def test_refuses(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_operators_refuse_bad_ids_themselves():
    """Compiled code reaches the operators without the public functions' checks of values."""
    offsets, clip = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0])
    with pytest.raises(ValueError, match="indices must be between 0 and 10"):
        torch.ops.vjepa.gather_tokens(X, torch.tensor([-1]), offsets, clip)
    with pytest.raises(ValueError, match="clip must be between 0 and 2"):
        torch.ops.vjepa.gather_tokens(X, torch.tensor([0]), offsets, clip + 3)


def test_scatter_needs_the_number_of_clips_on_the_host():
    meta = TokenIndices(
        torch.zeros(2, dtype=torch.int64, device="meta"),
        torch.zeros(2, dtype=torch.int32, device="meta"),
        torch.zeros(1, dtype=torch.int64, device="meta"),
        (2,),
    )
    values = torch.zeros(2, D, device="meta")
    with pytest.raises(ValueError, match="indices must know its number of clips"):
        scatter_tokens(values, meta, L)
