"""predictor_tokens against a loop over the sets."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, predictor_tokens

L, P, KINDS = 9, 5, 2
CONTEXT, TARGET, CLIP, KIND = (3, 1, 4, 2), (2, 5, 1, 6), (0, 1, 0, 1), torch.tensor([0, 0, 1, 3])


def cases(make_sets, **options):
    context, target = make_sets(CONTEXT, L, CLIP, **options), make_sets(TARGET, L, CLIP, seed=1, **options)
    return torch.randn(sum(CONTEXT), P), torch.randn(KINDS, P), torch.randn(L, P), context, target


def loop(context, mask_tokens, pos, context_idx, target_idx, kind):
    rows, ids, c, t = [], [], 0, 0
    for s, (n, m) in enumerate(zip(context_idx.lengths, target_idx.lengths, strict=True)):
        ids_c, ids_t = context_idx.indices[c : c + n], target_idx.indices[t : t + m]
        rows += [context[c : c + n] + pos[ids_c], mask_tokens[kind[s] % len(mask_tokens)] + pos[ids_t]]
        ids += [ids_c, ids_t]
        c, t = c + n, t + m
    return torch.cat(rows), torch.cat(ids)


@pytest.mark.parametrize("duplicates", [False, True])
def test_values_order_and_gradients(make_sets, duplicates):
    *floats, context, target = cases(make_sets, duplicates=duplicates)
    leaves = [x.requires_grad_() for x in floats]
    tokens, packed = predictor_tokens(*leaves, context, target, KIND)
    expected, ids = loop(*leaves, context, target, KIND)
    assert torch.equal(tokens, expected)
    assert torch.equal(packed.indices, ids)
    assert packed.lengths == tuple(n + m for n, m in zip(CONTEXT, TARGET, strict=True))
    assert packed.cu_seqlens.tolist() == [0, 5, 11, 16, 24]
    assert packed.clip.tolist() == list(CLIP)
    assert packed.num_clips == 2
    grad = torch.randn(expected.shape)
    ours, plain = torch.autograd.grad(tokens, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for our, same in zip(ours, plain, strict=True):
        torch.testing.assert_close(our, same)


def test_lengths_are_a_tensor_if_either_input_has_a_tensor(make_sets):
    *floats, context, _ = cases(make_sets)
    tensors = make_sets(TARGET, L, CLIP, seed=1, tensor_lengths=True)
    _, packed = predictor_tokens(*floats, context, tensors, KIND)
    assert isinstance(packed.lengths, torch.Tensor)
    assert packed.lengths.tolist() == [5, 6, 5, 8]


def test_one_context_and_one_target_token():
    one = TokenIndices.from_sets([torch.tensor([4])])
    tokens, packed = predictor_tokens(torch.ones(1, P), torch.full((1, P), 2.0), torch.zeros(L, P), one, one, KIND[:1])
    assert tokens[:, 0].tolist() == [1.0, 2.0]
    assert packed.indices.tolist() == [4, 4]


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_dtypes_promote_and_gradients_keep_their_own(make_sets, wide):
    *floats, context, target = cases(make_sets)
    leaves = [x.to(torch.float32 if n == wide else torch.bfloat16).requires_grad_() for n, x in enumerate(floats)]
    tokens, _ = predictor_tokens(*leaves, context, target, KIND)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, loop(*(leaf.float() for leaf in leaves), context, target, KIND)[0])
    tokens.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


def test_gradcheck(make_sets):
    *floats, context, target = cases(make_sets, duplicates=True)
    leaves = [x.double().requires_grad_() for x in floats]
    assert torch.autograd.gradcheck(lambda *x: predictor_tokens(*x, context, target, KIND)[0], leaves, fast_mode=True)


def test_mask_token_gradient_adds_in_float32():
    ids = torch.zeros(400, dtype=torch.int64)
    target, context = TokenIndices.from_sets([ids]), TokenIndices.from_sets([ids[:1]])
    mask = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    narrow = torch.zeros(1, 1, dtype=torch.bfloat16)
    predictor_tokens(narrow, mask, narrow.expand(L, 1), context, target, KIND[:1])[0].sum().backward()
    assert mask.grad.item() == 400  # adding ones in bfloat16 stops at 256


def test_deterministic(make_sets):
    *floats, context, target = cases(make_sets, duplicates=True)
    leaves = [x.requires_grad_() for x in floats]
    first, second = (
        torch.autograd.grad(predictor_tokens(*leaves, context, target, KIND)[0].square().sum(), leaves)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_opcheck(make_sets):
    *floats, context, target = cases(make_sets)
    leaves = [x.requires_grad_() for x in floats]
    halves = [(s.indices, s.cu_seqlens) for s in (context, target)]
    lengths = [torch.tensor(s.lengths) for s in (context, target)]
    arguments = (*leaves, *halves[0], lengths[0], *halves[1], lengths[1], KIND)
    opcheck(torch.ops.vjepa.predictor_tokens.default, arguments)
    grad = torch.randn(sum(CONTEXT) + sum(TARGET), P)
    for needs in ([True] * 3, [True, True, False]):
        dtypes = (torch.float32, torch.bfloat16, torch.float32)
        arguments = (grad, *halves[0], *halves[1], KIND, KINDS, L, *dtypes, needs)
        opcheck(torch.ops.vjepa.predictor_tokens_backward.default, arguments)


def sets_of(*lengths, clip=None, first=0):
    return TokenIndices.from_sets([torch.arange(first, first + n) for n in lengths], clip=clip)


GOOD = {
    "context": torch.zeros(3, P),
    "mask_tokens": torch.zeros(KINDS, P),
    "pos_embed": torch.zeros(L, P),
    "context_idx": sets_of(1, 2),
    "target_idx": sets_of(2, 1),
    "kind": torch.tensor([0, 1]),
}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"context": torch.zeros(4, P)}, ValueError, "context must have one row for each of the 3 context_idx"),
        ({"context": torch.zeros(3)}, ValueError, r"context must have the shape \[Nc, P\]"),
        ({"mask_tokens": torch.zeros(2, 4)}, ValueError, "mask_tokens must have 5 features like context"),
        ({"mask_tokens": torch.zeros(0, P)}, ValueError, "mask_tokens must have at least one row"),
        ({"pos_embed": torch.zeros(L, P).long()}, TypeError, "pos_embed must be one of float32"),
        ({"context_idx": sets_of(0, 3)}, ValueError, "context_idx must have no empty set, got 0 tokens in set 0"),
        ({"target_idx": sets_of(3, 0)}, ValueError, "target_idx must have no empty set, got 0 tokens in set 1"),
        ({"target_idx": sets_of(3)}, ValueError, "target_idx must have 2 sets like context_idx, got 1"),
        ({"target_idx": sets_of(1, 2, clip=[1, 0])}, ValueError, "target_idx.clip must equal context_idx.clip"),
        (
            {"target_idx": sets_of(2, 1, first=L - 1)},
            ValueError,
            "target_idx.indices must be between 0 and 8 .*, got 9",
        ),
        ({"target_idx": [0, 1]}, TypeError, "target_idx must be a TokenIndices, got list"),
        ({"kind": torch.tensor([0])}, ValueError, "kind must have one entry for each of the 2 sets"),
        ({"kind": torch.tensor([0.0, 1.0])}, TypeError, "kind must be one of int64"),
        ({"kind": torch.tensor([0, -1])}, ValueError, "kind must not be negative, got -1"),
    ],
)
def test_refuses(change, error, sentence):
    with pytest.raises(error, match=sentence):
        predictor_tokens(**{**GOOD, **change})
