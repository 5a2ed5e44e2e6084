"""gather_tokens, scatter_tokens and apply_masks against indexing written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, apply_masks, backend, gather_tokens, reference, scatter_tokens

B, L, D = 3, 19, 5  # a clip is neither a multiple of a kernel's tile of tokens nor less than one
CASES = {
    "ragged": ((4, 1, 7), (2, 0, 1)),
    "shared clip": ((5, 6, 13), (1, 1, 2)),
    "empty sets": ((0, 3, 0, 2, 0), (2, 0, 0, 2, 1)),
    "long": ((260, 5), (1, 2)),
    "nothing": ((0,), (0,)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=CASES)
def sets(request, make_sets, device):
    lengths, clip = CASES[request.param]
    return make_sets(lengths, L, clip, duplicates=True).to(device)


def rows_of(sets):
    """Clip and token of each packed row."""
    owners = torch.repeat_interleave(sets.clip.cpu(), torch.tensor(sets.lengths))
    return list(zip(owners.tolist(), sets.indices.tolist(), strict=True))


def whole(*shape):
    """Small whole numbers, the sums of which are exact in every dtype."""
    return torch.randint(-3, 4, shape).float()


def spread(sets):
    """The same sets in index tensors whose entries do not lie one after the other."""
    fields = ("indices", "cu_seqlens", "clip")
    apart = {name: torch.stack((value := getattr(sets, name), value), 1)[:, 0] for name in fields}
    return dataclasses.replace(sets, **apart)


@pytest.mark.usefixtures("serving", "used_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_values_and_adjoint(sets, device, dtype):
    x = torch.randn(B, L, D).to(device, dtype).requires_grad_()
    out = gather_tokens(x, sets)
    expected = torch.stack([x.detach()[row] for row in rows_of(sets)]) if sets.total else x.detach()[0, :0]
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape) if dtype in (torch.float32, torch.float64) else whole(*out.shape)
    out.backward(grad.to(device, dtype))
    total = torch.zeros(B, L, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for value, row in zip(grad, rows_of(sets), strict=True):
        total[row] += value  # in the order of the packed tokens
    assert torch.equal(x.grad.cpu(), total.to(dtype))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_gather_adjoint_is_accurate(make_sets, device, check_accuracy, dtype):
    sets = make_sets((60, 40), 7, (0, 0), duplicates=True).to(device)
    grad = torch.randn(100, 16).to(device, dtype)

    def adjoint(x, copies):
        return torch.autograd.grad(copies(x), x, grad.to(x.dtype))[0]

    zeros = torch.zeros(1, 7, 16, device=device)
    ours = adjoint(zeros.to(dtype).requires_grad_(), lambda x: gather_tokens(x, sets))
    plain, exact = (
        adjoint(zeros.to(kind).requires_grad_(), lambda x: x[0].index_select(0, sets.indices))
        for kind in (dtype, torch.float64)
    )
    check_accuracy(ours, plain, exact)


@pytest.mark.usefixtures("serving")
def test_gather_adjoint_adds_in_float32(device):
    ids = torch.zeros(300, dtype=torch.int64)
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    gather_tokens(x, TokenIndices.from_sets([ids], device=device)).sum().backward()
    assert x.grad[0, 0].item() == 300  # adding ones in bfloat16 stops at 256


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("width", [1, 64, 130, 384])
def test_any_width(make_sets, device, width):
    sets = make_sets((9, 1, 17), L, duplicates=True).to(device)
    x = whole(B, L, width).to(device).requires_grad_()
    out = gather_tokens(x, sets)
    assert torch.equal(out, x[tuple(torch.tensor(rows_of(sets)).T)])
    grad = whole(*out.shape).to(device)
    expected = reference.gather_tokens_backward(grad, sets.indices, sets.cu_seqlens, sets.clip, B, L)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], expected)
    values, fill = grad.requires_grad_(), whole(width).to(device).requires_grad_()
    out = scatter_tokens(values, sets, L, fill)
    assert torch.equal(out, reference.scatter_tokens(values, *packed(sets), B, L, fill, 0.0))
    grad = whole(B, L, width).to(device)
    expected = reference.scatter_tokens_backward(grad, *packed(sets), torch.float32)
    assert all(map(torch.equal, torch.autograd.grad(out, (values, fill), grad), expected))


def packed(sets):
    return sets.indices, sets.cu_seqlens, sets.clip


@pytest.mark.usefixtures("serving", "used_memory")
def test_any_strides(make_sets, device):
    sets = make_sets((4, 9, 20), L, duplicates=True).to(device)
    layouts = {
        "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        "transposed": lambda t: t.mT.contiguous().mT,
        "part of wider rows": lambda t: torch.cat((t, t), -1)[..., 1 : 1 + D],
        "every other": lambda t: torch.stack((t, t), -1)[..., 0],
        "one for all": lambda t: t[..., :1].expand(t.shape),
    }
    for layout in layouts.values():
        x = layout(torch.randn(B, L, D, device=device)).detach()
        values = layout(torch.randn(sets.total, D, device=device)).detach()
        fill = torch.randn(2 * D, device=device)[::2]
        plain = (x.contiguous(), values.contiguous())
        for where in (sets, spread(sets)):
            x.requires_grad_()
            values.requires_grad_()
            gathered, scattered = gather_tokens(x, where), scatter_tokens(values, where, L, fill)
            assert torch.equal(gathered, reference.gather_tokens(plain[0], *packed(sets)))
            assert torch.equal(scattered, reference.scatter_tokens(plain[1], *packed(sets), B, L, fill, 0.0))
            grads = torch.autograd.grad((gathered, scattered), (x, values), (values.detach(), x.detach()))
            assert torch.equal(grads[0], reference.gather_tokens_backward(plain[1], *packed(sets), B, L))
            assert torch.equal(grads[1], reference.scatter_tokens_backward(plain[0], *packed(sets), None)[0])


@pytest.mark.usefixtures("serving", "used_memory")
@pytest.mark.parametrize(
    ("fill", "dtype"),
    [(0, torch.float32), (0, torch.bfloat16), (-2.5, torch.float16), *(("vector", d) for d in DTYPES)],
)
def test_scatter_values_and_adjoint(sets, device, fill, dtype):
    values = torch.randn(sets.total, D).to(device, dtype).requires_grad_()
    vector = torch.randn(D).to(device, dtype).requires_grad_() if fill == "vector" else None
    out = scatter_tokens(values, sets, L, fill if vector is None else vector)
    background = torch.full((D,), float(fill)) if vector is None else vector
    expected = background.to(device, dtype).expand(sets.num_clips, L, D).clone()
    winners = {row: n for n, row in enumerate(rows_of(sets))}  # the last of duplicates wins
    for row, n in winners.items():
        expected[row] = values[n].detach()
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    leaves = [values] if vector is None else [values, vector]
    grad = torch.randn(out.shape, dtype=torch.float64) if dtype == torch.float64 else whole(*out.shape)
    grad_values, *grad_fill = torch.autograd.grad(out, leaves, grad.to(device, dtype))
    expected = torch.zeros(sets.total, D, dtype=grad.dtype)
    for row, n in winners.items():
        expected[n] = grad[row]
        grad[row] = 0
    assert torch.equal(grad_values.cpu(), expected.to(dtype))
    for ours in grad_fill:
        torch.testing.assert_close(ours.cpu(), grad.sum((0, 1)).to(dtype), atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("serving")
def test_gradient_of_the_fill_is_accurate(make_sets, device, check_accuracy):
    sets = make_sets((20, 9), 100).to(device)
    grad = torch.randn(2, 100, 16).to(device, torch.bfloat16)

    def gradient(kind):
        return reference.scatter_tokens_backward(grad.to(kind), *packed(sets), kind)[1]

    fill = torch.zeros(16, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = scatter_tokens(torch.zeros(29, 16, device=device).bfloat16(), sets, 100, fill)
    check_accuracy(torch.autograd.grad(out, fill, grad)[0], gradient(torch.bfloat16), gradient(torch.float64))


@pytest.mark.usefixtures("serving")
def test_overwritten_rows_get_no_gradient(device):
    """Many rows for one token, beyond what a kernel compares at a time, in sets of one clip and of another."""
    sets = TokenIndices.from_sets([torch.full((260,), 3), torch.tensor([3, 17, 3]), torch.tensor([3])], clip=[0, 0, 1])
    values = torch.randn(264, D).to(device).requires_grad_()
    out = scatter_tokens(values, sets.to(device), L)
    assert torch.equal(out[[0, 0, 1], [3, 17, 3]], values[[262, 261, 263]])
    (grad,) = torch.autograd.grad(out, values, torch.ones_like(out))
    assert grad.sum(1).nonzero()[:, 0].tolist() == [261, 262, 263]


@pytest.mark.usefixtures("serving")
def test_gather_after_scatter_is_the_identity(make_sets, device):
    sets = make_sets((6, 1, 11), L).to(device)
    values = torch.randn(sets.total, D).to(device)
    assert torch.equal(gather_tokens(scatter_tokens(values, sets, L), sets), values)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_keeps_the_dtype_of_values(make_sets, device, dtype):
    sets = make_sets((2,), L).to(device)
    fill = torch.randn(D, device=device, requires_grad=True)
    out = scatter_tokens(torch.randn(2, D).to(device, dtype), sets, L, fill)
    rest = sorted(set(range(L)) - set(sets.indices.tolist()))
    assert out.dtype == dtype
    assert torch.equal(out[0, rest], fill.to(dtype).expand(L - 2, D))
    (grad,) = torch.autograd.grad(out, fill, torch.ones_like(out))
    assert grad.tolist() == [L - 2] * D
    assert grad.dtype == torch.float32


@pytest.mark.usefixtures("serving")
def test_a_number_fills_as_exactly_as_the_dtype_allows(make_sets, device):
    sets = make_sets((2,), L).to(device)
    for dtype in DTYPES:
        out = scatter_tokens(torch.zeros(2, D, dtype=dtype, device=device), sets, L, 0.1)
        assert out.max().item() == torch.tensor(0.1, dtype=dtype).item()


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("duplicates", [False, True])
def test_gradcheck(make_sets, device, duplicates):
    sets = make_sets((2, 3, 0, 1), 3, (0, 1, 0, 0), duplicates=duplicates).to(device)
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, sets), (x,))
    values = torch.randn(sets.total, 2, dtype=torch.float64, device=device, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, f: scatter_tokens(v, sets, 3, f), (values, fill))


@pytest.mark.usefixtures("serving")
def test_deterministic(device):
    sets = TokenIndices.from_sets([torch.randint(40, (150,)), torch.randint(40, (50,))], clip=[0, 0], device=device)
    grad, spread = torch.randn(200, 3).to(device), torch.randn(1, 40, 3).to(device)
    grads = []
    for _ in range(2):
        x, values, fill = (
            torch.zeros(*shape, device=device, requires_grad=True) for shape in ((1, 40, 3), (200, 3), (3,))
        )
        gather_tokens(x, sets).backward(grad)
        scatter_tokens(values, sets, 40, fill).backward(spread)
        grads.append((x.grad, values.grad, fill.grad))
    assert all(map(torch.equal, *grads))


@pytest.mark.usefixtures("serving")
def test_opcheck(make_sets, device):
    ops = torch.ops.vjepa
    sets = make_sets((4, 1, 7), L, (2, 0, 1), duplicates=True).to(device)
    x = torch.randn(B, L, D, device=device, requires_grad=True)
    values = torch.randn(sets.total, D, device=device, requires_grad=True)
    fill = torch.randn(D, device=device, requires_grad=True)
    opcheck(ops.gather_tokens.default, (x, *packed(sets)))
    opcheck(ops.gather_tokens_backward.default, (values.detach(), *packed(sets), B, L))
    opcheck(ops.scatter_tokens.default, (values, *packed(sets), B, L, fill, 0.0))
    opcheck(ops.scatter_tokens.default, (values, *packed(sets), B, L, None, 1.0))
    opcheck(ops.scatter_tokens_backward.default, (x.detach(), *packed(sets), torch.float32))
    opcheck(ops.scatter_tokens_backward.default, (x.detach(), *packed(sets), None))


@pytest.mark.usefixtures("serving")
def test_apply_masks(device):
    x = torch.randn(B, L, D, device=device, requires_grad=True)
    masks = [torch.randint(L, (B, 4), device=device), torch.randint(L, (B, 4), dtype=torch.int32, device=device)]
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


@pytest.mark.usefixtures("serving")
def test_apply_masks_rounds_the_sum_over_all_masks_once(device):
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    masks = [torch.zeros(1, 3, dtype=torch.int64, device=device)] * 100
    apply_masks(x, masks).sum().backward()
    assert x.grad[0, 0].item() == 300  # adding threes in bfloat16 goes astray beyond 256


X, FEW = torch.zeros(B, L, D), TokenIndices.from_sets([torch.tensor([0, 1])])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: gather_tokens(X[0], FEW), ValueError, r"x must have the shape \[B, L, D\], got \(19, 5\) float32"),
        (lambda: gather_tokens(X.long(), FEW), TypeError, "x must be one of float32"),
        (lambda: gather_tokens(X, [0, 1]), TypeError, "indices must be a TokenIndices, got list"),
        (lambda: gather_tokens(X, FEW.to("meta")), ValueError, "indices must be on cpu like the tokens, got meta"),
        (
            lambda: gather_tokens(X, TokenIndices.from_sets([torch.tensor([L])])),
            ValueError,
            r"indices.indices must be between 0 and 18 \(tokens of a clip\), got 19",
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
        (lambda: apply_masks(X, [torch.full((B, 1), L)]), ValueError, "between 0 and 18"),
    ],
)
def test_refuses(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_operators_refuse_bad_ids_themselves():
    """Compiled code reaches the operators without the public functions' checks of values."""
    offsets, clip = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0])
    with pytest.raises(ValueError, match="indices must be between 0 and 18"):
        torch.ops.vjepa.gather_tokens(X, torch.tensor([-1]), offsets, clip)
    with pytest.raises(ValueError, match="clip must be between 0 and 2"):
        torch.ops.vjepa.gather_tokens(X, torch.tensor([0]), offsets, clip + 3)
    rest = (B, L, None, 0.0)
    with pytest.raises(ValueError, match="indices must be between 0 and 18"):
        torch.ops.vjepa.scatter_tokens(X[0, :1], torch.tensor([L]), offsets, clip, *rest)
    with pytest.raises(ValueError, match="clip must be between 0 and 2"):
        torch.ops.vjepa.scatter_tokens(X[0, :1], torch.tensor([0]), offsets, clip + 3, *rest)


@pytest.mark.parametrize("offsets", [[0, 3], [0, 1], [1, 2], [0, 3, 2], [0]])
def test_operators_refuse_bad_offsets_themselves(offsets):
    """A kernel would read or write where they point to."""
    ids, clip = torch.tensor([0, 1]), torch.zeros(2 if len(offsets) == 3 else 1, dtype=torch.int64)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    for name in ("reference", "triton"):
        if name == "triton":
            pytest.importorskip("triton")
        with backend(name), pytest.raises(ValueError, match=r"cu_seqlens must (rise from 0 to the 2|have 2 entries)"):
            torch.ops.vjepa.gather_tokens(X, ids, offsets, clip)
        with backend(name), pytest.raises(ValueError, match=r"cu_seqlens must (rise from 0 to the 2|have 2 entries)"):
            torch.ops.vjepa.scatter_tokens(X[0, :2], ids, offsets, clip, B, L, None, 0.0)


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
