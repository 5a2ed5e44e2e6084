"""predictor_tokens against a loop over the sets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, gather_tokens, predictor_tokens, reference
from vjepa.kernels._dispatch import select

pytestmark = pytest.mark.usefixtures("used_memory")

L, P, KINDS = 9, 5, 2
CONTEXT, TARGET, CLIP, KIND = (3, 1, 4, 2), (2, 5, 1, 6), (0, 1, 0, 1), torch.tensor([0, 0, 1, 3])
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def cases(make_sets, device, context=CONTEXT, target=TARGET, kinds=KINDS, width=P, **options):
    clip = [n % 2 for n in range(len(context))]
    sets = make_sets(context, L, clip, **options), make_sets(target, L, clip, seed=1, **options)
    floats = torch.randn(sum(context), width), torch.randn(kinds, width), torch.randn(L, width)
    return *(x.to(device) for x in floats), *(s.to(device) for s in sets)


def loop(context, mask_tokens, pos, context_idx, target_idx, kind):
    rows, ids, c, t = [], [], 0, 0
    for s, (n, m) in enumerate(zip(context_idx.lengths, target_idx.lengths, strict=True)):
        ids_c, ids_t = context_idx.indices[c : c + n], target_idx.indices[t : t + m]
        rows += [context[c : c + n] + pos[ids_c], mask_tokens[kind[s] % len(mask_tokens)] + pos[ids_t]]
        ids += [ids_c, ids_t]
        c, t = c + n, t + m
    return torch.cat(rows), torch.cat(ids)


def whole(x):
    """Small whole numbers, the sums of which are exact in every dtype."""
    return torch.randint_like(x, -3, 4)


def check(floats, context, target, kind):
    """Tokens, ids and gradients are the loop's; the gradients are of whole numbers."""
    leaves = [x.detach().requires_grad_() for x in floats]
    tokens, packed = predictor_tokens(*leaves, context, target, kind)
    expected, ids = loop(*leaves, context, target, kind.long())
    assert torch.equal(tokens, expected)
    assert torch.equal(packed.indices, ids)
    assert torch.equal(packed.cu_seqlens, context.cu_seqlens + target.cu_seqlens)
    grad = whole(expected.detach())
    for needed in ([0, 1, 2], [0, 1], [1], [2], [0]):
        some = [leaves[n] for n in needed]
        ours, plain = (torch.autograd.grad(x, some, grad, retain_graph=True) for x in (tokens, expected))
        assert all(map(torch.equal, ours, plain))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("duplicates", [False, True])
def test_values_order_and_gradients(make_sets, device, duplicates):
    *floats, context, target = cases(make_sets, device, duplicates=duplicates)
    check(floats, context, target, KIND.to(device))
    _, packed = predictor_tokens(*floats, context, target, KIND.to(device))
    assert packed.lengths == tuple(n + m for n, m in zip(CONTEXT, TARGET, strict=True))
    assert packed.cu_seqlens.tolist() == [0, 5, 11, 16, 24]
    assert packed.clip.tolist() == list(CLIP)
    assert packed.num_clips == 2


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(
    ("context", "target"), [((1,), (1,)), ((1,) * 7, (1,) * 7), ((131, 7), (1, 53)), ((1, 2, 40), (127, 3, 1))]
)
@pytest.mark.parametrize("kinds", [1, 2, 3, 5])
def test_any_sets_and_kinds(make_sets, device, context, target, kinds):
    *floats, context, target = cases(make_sets, device, context, target, kinds, duplicates=True)
    check(floats, context, target, torch.randint(0, 9, (context.num_sets,)).to(device))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("width", [1, 64, 130, 384, 1000])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_any_width(make_sets, device, width, dtype):
    *floats, context, target = cases(make_sets, device, width=width)
    check([whole(x).to(dtype) for x in floats], context, target, KIND.to(device))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integers_as_kinds(make_sets, device, dtype):
    *floats, context, target = cases(make_sets, device)
    check(floats, context, target, KIND.to(device, dtype))


@pytest.mark.usefixtures("serving")
def test_any_strides(make_sets, device):
    *floats, context, target = cases(make_sets, device)
    layouts = {
        "transposed": lambda x: x.T.contiguous().T,
        "part of wider rows": lambda x: torch.cat((x, x), 1)[:, 1 : 1 + P],
        "every other": lambda x: torch.stack((x, x), -1)[..., 0],
        "one for all": lambda x: x[:, :1].expand(x.shape),
    }

    def apart(sets):
        fields = {name: getattr(sets, name) for name in ("indices", "cu_seqlens", "clip")}
        return dataclasses.replace(sets, **{name: torch.stack((x, x), 1)[:, 0] for name, x in fields.items()})

    for layout in layouts.values():
        rows, kind = [layout(x) for x in floats], KIND.to(device).repeat_interleave(2)[::2]
        check(rows, apart(context), apart(target), kind)
        out = predictor_tokens(*(x.requires_grad_() for x in rows), context, target, kind)[0]
        grad = layout(torch.randn(out.shape, device=device))
        ours, same = (torch.autograd.grad(out, rows, g, retain_graph=True) for g in (grad, grad.contiguous()))
        assert all(map(torch.equal, ours, same))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("lengths", [((0, 3, 0), (2, 0, 0)), ((0, 0), (0, 0)), ((0,) * 300, (0,) * 299 + (1,))])
def test_backends_take_empty_sets(make_sets, device, lengths):
    """The operator refuses them, but no kernel relies on that."""
    *floats, context, target = cases(make_sets, device, *lengths)
    kind = torch.arange(context.num_sets, device=device)
    row = select("predictor_tokens", device)
    halves = (context.indices, context.cu_seqlens, target.indices, target.cu_seqlens)
    ours = row.forward(*floats, *halves, kind)
    plain = reference.predictor_tokens(*floats, *halves, kind)
    assert all(map(torch.equal, ours, plain))
    rest = (*halves, kind, KINDS, L, (FP32,) * 3, [True] * 3)
    grads = row.backward(whole(plain[0]), *rest)
    assert [x.shape for x in grads] == [x.shape for x in floats]
    assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.usefixtures("serving")
def test_backends_wrap_negative_kinds(make_sets, device):
    """The operator refuses them where it can read them, which is not on a device: there they count from the last."""
    *floats, context, target = cases(make_sets, device)
    row, kind = select("predictor_tokens", device), KIND.to(device)
    halves = (context.indices, context.cu_seqlens, target.indices, target.cu_seqlens)
    ours, plain = (row.forward(*floats, *halves, k) for k in (kind - 2 * KINDS, kind))
    assert all(map(torch.equal, ours, plain))
    rest = (KINDS, L, (FP32,) * 3, [True] * 3)
    grad = whole(plain[0])
    ours, plain = (row.backward(grad, *halves, k, *rest) for k in (kind - 2 * KINDS, kind))
    assert all(map(torch.equal, ours, plain))


def test_lengths_are_a_tensor_if_either_input_has_a_tensor(make_sets):
    *floats, context, _ = cases(make_sets, "cpu")
    tensors = make_sets(TARGET, L, CLIP, seed=1, tensor_lengths=True)
    _, packed = predictor_tokens(*floats, context, tensors, KIND)
    assert isinstance(packed.lengths, torch.Tensor)
    assert packed.lengths.tolist() == [5, 6, 5, 8]


def test_no_gradient_is_computed_for_frozen_inputs(make_sets, monkeypatch):
    *floats, context, target = cases(make_sets, "cpu")
    plain, asked = torch.ops.vjepa.predictor_tokens_backward, []
    monkeypatch.setattr(
        torch.ops.vjepa, "predictor_tokens_backward", lambda *args: asked.append(args[-1]) or plain(*args)
    )
    predictor_tokens(floats[0], floats[1].requires_grad_(), floats[2], context, target, KIND)[0].sum().backward()
    assert asked == [[False, True, False]]


def test_what_the_host_knows_of_the_ids_outlives_it(make_sets):
    *floats, context, target = cases(make_sets, "meta")
    packed = predictor_tokens(*floats, context, target, KIND.to("meta"))[1]
    assert packed.max_index == max(context.max_index, target.max_index)
    with pytest.raises(ValueError, match=f"indices must be between 0 and {packed.max_index - 1} .*"):
        gather_tokens(torch.zeros(2, packed.max_index, P, device="meta"), packed)


def test_the_operator_refuses_bad_offsets_and_ids_itself(make_sets):
    """Sets built in compiled code are checked there."""
    *floats, context, target = cases(make_sets, "cpu")
    halves = [[s.indices, s.cu_seqlens, torch.tensor(s.lengths)] for s in (context, target)]
    for half, name in ((0, "context_idx"), (1, "target_idx")):
        wrong = [list(h) for h in halves]
        wrong[half][1] = halves[half][1] + 1
        with pytest.raises(ValueError, match=f"{name}.cu_seqlens must be the running sum of {name}.lengths"):
            torch.ops.vjepa.predictor_tokens(*floats, *wrong[0], *wrong[1], KIND)
        wrong = [list(h) for h in halves]
        wrong[half][0] = torch.full_like(halves[half][0], L)
        with pytest.raises(ValueError, match=f"{name}.indices must be between 0 and 8"):
            torch.ops.vjepa.predictor_tokens(*floats, *wrong[0], *wrong[1], KIND)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(
    "dtypes",
    [
        *([FP32 if n == wide else BF16 for n in range(3)] for wide in range(3)),
        [FP16, BF16, FP16],
        [FP64, FP32, BF16],
        [FP16] * 3,
    ],
)
def test_dtypes_promote_and_gradients_keep_their_own(make_sets, device, dtypes):
    *floats, context, target = cases(make_sets, device)
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(floats, dtypes, strict=True)]
    wide = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    tokens, _ = predictor_tokens(*leaves, context, target, KIND.to(device))
    assert tokens.dtype == wide
    assert torch.equal(tokens, loop(*(leaf.to(wide) for leaf in leaves), context, target, KIND)[0])
    tokens.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == dtypes
    counts = torch.bincount(torch.cat((context.indices, target.indices)), minlength=L)
    assert torch.equal(leaves[2].grad, counts[:, None].expand(L, P).to(dtypes[2]))


@pytest.mark.usefixtures("serving")
def test_gradcheck(make_sets, device):
    *floats, context, target = cases(make_sets, device, duplicates=True)
    leaves, kind = [x.double().requires_grad_() for x in floats], KIND.to(device)
    assert torch.autograd.gradcheck(lambda *x: predictor_tokens(*x, context, target, kind)[0], leaves, fast_mode=True)


@pytest.mark.usefixtures("serving")
def test_mask_token_gradient_adds_in_float32(device):
    ids = torch.zeros(400, dtype=torch.int64)
    target, context = (TokenIndices.from_sets([x], device=device) for x in (ids, ids[:1]))
    mask = torch.zeros(1, 1, dtype=BF16, device=device, requires_grad=True)
    narrow = torch.zeros(1, 1, dtype=BF16, device=device)
    tokens, _ = predictor_tokens(narrow, mask, narrow.expand(L, 1), context, target, KIND[:1].to(device))
    tokens.sum().backward()
    assert mask.grad.item() == 400  # adding ones in bfloat16 stops at 256


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_gradients_are_accurate(make_sets, device, check_accuracy, dtype):
    *floats, context, target = cases(make_sets, device, (90, 1), (160, 60), duplicates=True)
    kind, grad = KIND[1:3].to(device), torch.randn(311, P, device=device).to(dtype)

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in floats]
        return torch.autograd.grad(function(*leaves, context, target, kind)[0], leaves, grad.to(dtype))

    plain, exact = (gradients(loop, kind_of) for kind_of in (dtype, FP64))
    for triple in zip(gradients(predictor_tokens, dtype), plain, exact, strict=True):
        check_accuracy(*triple)


@pytest.mark.usefixtures("serving")
def test_deterministic(make_sets, device):
    *floats, context, target = cases(make_sets, device, duplicates=True)
    leaves, kind = [x.requires_grad_() for x in floats], KIND.to(device)
    first, second = (
        torch.autograd.grad(predictor_tokens(*leaves, context, target, kind)[0].square().sum(), leaves)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.usefixtures("serving")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_offsets_beyond_32_bits(make_sets, device):
    *floats, context, target = cases(make_sets, device, (2, 1), (1, 1), width=64)
    far = 2**30 + 8
    rows = torch.zeros(5 * far, dtype=BF16, device=device)
    spread = rows.as_strided((3, 64), (far, 1)).copy_(floats[0])
    near = [x.bfloat16() for x in floats]
    tokens = [
        predictor_tokens(x.requires_grad_(), *near[1:], context, target, KIND[:2].to(device))[0]
        for x in (spread, near[0])
    ]
    assert torch.equal(*tokens)
    grad = rows.as_strided((5, 64), (far, 1), 128).copy_(torch.randn(5, 64))
    ours, plain = (
        torch.autograd.grad(t, x, g)[0] for t, x, g in zip(tokens, (spread, near[0]), (grad, grad.clone()), strict=True)
    )
    assert torch.equal(ours, plain)


@pytest.mark.usefixtures("serving")
def test_opcheck(make_sets, device):
    *floats, context, target = cases(make_sets, device)
    leaves, kind = [x.requires_grad_() for x in floats], KIND.to(device)
    halves = [(s.indices, s.cu_seqlens) for s in (context, target)]
    lengths = [torch.tensor(s.lengths) for s in (context, target)]
    arguments = (*leaves, *halves[0], lengths[0], *halves[1], lengths[1], kind)
    opcheck(torch.ops.vjepa.predictor_tokens.default, arguments)
    grad = torch.randn(sum(CONTEXT) + sum(TARGET), P, device=device)
    for needs in ([True] * 3, [True, True, False]):
        arguments = (grad, *halves[0], *halves[1], kind, KINDS, L, FP32, BF16, FP32, needs)
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
