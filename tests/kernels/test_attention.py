"""varlen_attention against softmax written out in float64, on every backend of this build.

The error allowed is twice that of PyTorch in the same dtype, the larger of two ways to compute attention with it: softmax
written out, and its own kernel, which rounds probabilities to 16 bits and computes them again in the backward pass.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vjepa.kernels import _cpu_attention, _sdpa, attention, backend, varlen_attention

WHY_NO_NATIVE = "a GPU is there" if torch.cuda.is_available() else _cpu_attention.why_not(torch.device("cpu"))
BACKENDS = (
    "reference",
    "sdpa",
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")),
    pytest.param("cpu", marks=pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))),
)
IN_DOUBLE = BACKENDS[:2]  # the kernels of this project do not compute in float64
LENGTHS = {
    "equal": (5, 5, 5),
    "ragged": (7, 1, 30, 12, 7, 3),
    "single": (9,),
    "ones": (1, 1, 1, 1),
    "empty sequences": (0, 4, 0, 6, 0),
    "no token": (0, 0),
    "no sequence": (),
}


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch):
    """Also on a processor with AMX, where the native kernels for bfloat16 leave the field to PyTorch's."""
    monkeypatch.setattr(_cpu_attention, "has_amx", lambda: False)


def offsets(lengths, device="cpu"):
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def written_out(q, k, v, lengths, kv_lengths=None, scale=None):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    out = [q.new_zeros(0, *q.shape[1:])]
    q_s, k_s, v_s = q.split(list(lengths)), k.split(list(kv_lengths)), v.split(list(kv_lengths))
    for a, b, c in zip(q_s, k_s, v_s, strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(out)


def by_sdpa(q, k, v, lengths, scale=None):
    out = [q.new_zeros(0, *q.shape[1:])]
    for a, b, c in zip(*(x.transpose(0, 1).split(list(lengths), 1) for x in (q, k, v)), strict=True):
        out.append(F.scaled_dot_product_attention(a[None], b[None], c[None], scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


def least_exact(results, exact):
    """Of several results, for each of their tensors, the one with the largest error."""
    return [
        max(tensors, key=lambda x, truth=truth: float((x - truth).abs().max()) if truth.numel() else 0)
        for *tensors, truth in zip(*results, exact, strict=True)
    ]


def tensors(total, heads=2, head_dim=8, dtype=torch.float32, device="cpu"):
    return [torch.randn(total, heads, head_dim).to(device, dtype) for _ in range(3)]


def with_gradients(function, inputs, dtype, grad):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("used_memory")
def test_values_and_gradients(check_accuracy, device, name, case, dtype):
    if name == "cpu" and dtype not in _cpu_attention.CODES:
        pytest.skip("the native kernels compute in float32 and bfloat16")
    lengths = LENGTHS[case]
    inputs = tensors(sum(lengths), dtype=dtype, device=device)
    grad = torch.randn(sum(lengths), 2, 8).to(device, dtype)

    def ours(q, k, v):
        return varlen_attention(q, k, v, offsets(lengths, device), lengths)

    def plain(function):
        return lambda q, k, v: function(q, k, v, lengths) if sum(lengths) else q * 1 + 0 * (k + v)

    with backend(name):
        results = with_gradients(ours, inputs, dtype, grad)
    exact = with_gradients(plain(written_out), inputs, torch.float64, grad)
    same = least_exact([with_gradients(plain(peer), inputs, dtype, grad) for peer in (written_out, by_sdpa)], exact)
    for our, plain_result, truth in zip(results, same, exact, strict=True):
        if truth.numel() == 0:
            assert our.shape == truth.shape
        elif float(truth.abs().max()) < 1e-12:  # sequences of one token: queries and keys have no gradient
            assert float(our.abs().max()) < 1e-2 * float(grad.abs().max())
        else:
            check_accuracy(our, plain_result, truth)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 3, 24, 32, 64, 80, 256])
def test_head_dims_and_scale(check_accuracy, device, name, head_dim):
    lengths, scale = (41, 60), 0.7 * head_dim**-0.5
    dtype = torch.float32
    if name == "triton" and device.type == "cuda" and head_dim > attention.TRITON_FLOAT32:
        dtype = torch.bfloat16
    inputs = tensors(101, 3, head_dim, dtype, device)
    grad = torch.randn(101, 3, head_dim).to(device, dtype)
    cu = offsets(lengths, device)
    with backend(name):
        results = with_gradients(
            lambda q, k, v: varlen_attention(q, k, v, cu, lengths, scale=scale), inputs, dtype, grad
        )

    def plain(function):
        return lambda q, k, v: function(q, k, v, lengths, scale=scale)

    truth = with_gradients(plain(written_out), inputs, torch.float64, grad)
    peer = least_exact([with_gradients(plain(peer), inputs, dtype, grad) for peer in (written_out, by_sdpa)], truth)
    for our, same, exact in zip(results, peer, truth, strict=True):
        check_accuracy(our, same, exact)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kv_lengths", [(3, 3, 3), (9, 1, 4)])
@pytest.mark.parametrize("lengths", [(2, 2, 2), (5, 0, 1)])
def test_cross_attention(device, name, lengths, kv_lengths):
    dtype = torch.float64 if name in IN_DOUBLE else torch.float32
    sizes = (6, sum(kv_lengths), sum(kv_lengths))
    q, k, v = (torch.randn(n, 2, 4, dtype=dtype, device=device, requires_grad=True) for n in sizes)
    kv = {"kv_cu_seqlens": offsets(kv_lengths, device), "kv_lengths": kv_lengths}
    with backend(name):
        out = varlen_attention(q, k, v, offsets(lengths, device), lengths, **kv)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = written_out(q, k, v, lengths, kv_lengths)
    torch.testing.assert_close(out, expected)
    for ours, plain in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", ["equal", "ragged"])
def test_strided_views_of_a_packed_qkv(device, name, case):
    lengths = LENGTHS[case]
    packed = torch.randn(sum(lengths), 3, 2, 8, device=device, requires_grad=True)
    cu = offsets(lengths, device)
    with backend(name):
        out = varlen_attention(*packed.unbind(1), cu, lengths)
        (grad,) = torch.autograd.grad(out.square().sum(), packed)
        leaves = [x.detach().contiguous().requires_grad_() for x in packed.unbind(1)]
        same = varlen_attention(*leaves, cu, lengths)
        grads = torch.autograd.grad(same.square().sum(), leaves)
    assert out.is_contiguous()
    torch.testing.assert_close(out, same)
    torch.testing.assert_close(grad, torch.stack(grads, 1))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", ["equal", "ragged"])
def test_any_strides_and_expanded_gradients(device, name, case):
    """Features need not be the innermost in memory, and the gradient of a sum has no memory of its own."""
    lengths = LENGTHS[case]
    turned = [torch.randn(8, 2, sum(lengths), device=device).permute(2, 1, 0).requires_grad_() for _ in range(3)]
    leaves = [x.detach().contiguous().requires_grad_() for x in turned]
    assert turned[0].stride(2) != 1
    with backend(name):
        cu = offsets(lengths, device)
        out, same = (varlen_attention(*inputs, cu, lengths) for inputs in (turned, leaves))
        grads = torch.autograd.grad(out.sum(), turned)
    torch.testing.assert_close(out, same)
    expected = torch.autograd.grad(written_out(*leaves, lengths).sum(), leaves)
    for ours, plain in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_gradcheck(name):
    inputs = [torch.randn(7, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda q, k, v: varlen_attention(q, k, v, offsets((4, 1, 2)), (4, 1, 2)), inputs, fast_mode=True
        )


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_no_number_stays_in_its_sequence(device, name):
    """Also where a block of rows ends beyond the end of a sequence."""
    lengths, cu = (30, 12, 40, 5), offsets((30, 12, 40, 5), device)
    leaves = [x.requires_grad_() for x in tensors(87, device=device)]
    grad = torch.randn(87, 2, 8, device=device)
    results = []
    with backend(name):
        for value in (1.0, float("nan")):
            for x in (*leaves, grad):
                x.detach()[30:42], x.detach()[82:] = value, value
            out = varlen_attention(*leaves, cu, lengths)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(clean[:30], other[:30])
        torch.testing.assert_close(clean[42:82], other[42:82])
        assert bool(other[30:42].isnan().all())
        assert bool(other[82:].isnan().all())


def test_sequences_do_not_see_each_other_or_padding():
    lengths = (30, 12, 5)
    q, k, v = tensors(47)
    with backend("sdpa"):
        alone = varlen_attention(q[30:42], k[30:42], v[30:42], offsets((12,)), (12,))
        k[:30], v[:30], k[42:], v[42:] = 1e4, float("inf"), -1e4, float("inf")
        together = varlen_attention(q, k, v, offsets(lengths), lengths)
    torch.testing.assert_close(together[30:42], alone)


@pytest.mark.parametrize("name", BACKENDS)
def test_lengths_as_a_tensor_and_deterministic(device, name):
    lengths = LENGTHS["ragged"]
    inputs = [x.requires_grad_() for x in tensors(sum(lengths), device=device)]
    runs = []
    with backend(name):
        for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
            out = varlen_attention(*inputs, offsets(lengths, device), given)
            runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_may_be_equal_or_huge(check_accuracy, device, name, dtype):
    """The mean of all values, and the value of the key that scores 10000 above the others."""
    keys = torch.zeros(40, 1, 8)
    keys[7], keys[:, :, 1] = 1, 1
    for query, exact in ((torch.zeros(40, 1, 8), None), (torch.full((40, 1, 8), 1e4), 7)):
        q, k, v = (x.to(device, dtype) for x in (query, keys, torch.randn(40, 1, 8)))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with backend(name):
            out = varlen_attention(*leaves, offsets((40,), device), (40,), scale=1.0)
            grads = torch.autograd.grad(out.float().square().sum(), leaves)
        expected = v.detach().double().mean(0) if exact is None else v.detach()[exact].double()
        check_accuracy(out.detach(), expected.expand(40, 1, 8).to(dtype), expected.expand(40, 1, 8))
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_equal_lengths_are_one_call_without_a_copy():
    (call,) = _sdpa.plan((16,) * 8, (16,) * 8, 64, True)
    assert (call.sequences, call.q.size, call.q.gather, call.k.gather) == (8, 16, None, None)


def test_unlike_lengths_share_a_call_while_padding_is_cheap():
    lengths = (100, 98, 20, 97, 20)
    calls = _sdpa.plan(lengths, lengths, 192, True)
    assert [(call.sequences, call.q.size) for call in calls] == [(3, 100), (2, 20)]
    assert len(_sdpa.plan(lengths, lengths, 1_000_000, True)) == 4  # wide heads: only the equal ones
    assert len(_sdpa.plan(lengths, lengths, 192, False)) == 5


def test_the_path_of_other_devices_agrees(monkeypatch):
    """Off the CPU every unlike sequence has a call of its own and backward runs the forward again under autograd."""
    lengths = (4, 7, 0, 7)
    leaves = [x.double().requires_grad_() for x in tensors(18)]
    expected = written_out(*leaves, lengths)
    plain = torch.autograd.grad(expected.square().sum(), leaves)
    monkeypatch.setattr(_sdpa, "on_cpu", lambda tensor: False)
    with backend("sdpa"):
        out = varlen_attention(*leaves, offsets(lengths), lengths)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(out, expected)
    for ours, same in zip(grads, plain, strict=True):
        torch.testing.assert_close(ours, same)


def test_the_backward_pass_of_sdpa_off_the_cpu_stays_its_own(monkeypatch, device):
    """It leaves no log-sum-exp there: whatever is asked for later, nobody else may take its place."""
    lengths = (4, 7, 0, 7)
    leaves = [x.requires_grad_() for x in tensors(18, device=device)]
    monkeypatch.setattr(_sdpa, "on_cpu", lambda tensor: False)
    results = []
    for later in ("sdpa", "triton" if find_spec("triton") else "sdpa"):
        with backend("sdpa"):
            out = varlen_attention(*leaves, offsets(lengths, device), lengths)
        with backend(later):
            results.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.isfinite(grad).all() for grad in results[1])
    assert all(map(torch.equal, *results))


def test_forward_and_backward_may_use_different_backends():
    lengths = LENGTHS["ragged"]
    leaves = [x.double().requires_grad_() for x in tensors(sum(lengths))]
    expected = torch.autograd.grad(written_out(*leaves, lengths).square().sum(), leaves)
    for first, second in (IN_DOUBLE, IN_DOUBLE[::-1]):
        with backend(first):
            loss = varlen_attention(*leaves, offsets(lengths), lengths).square().sum()
        with backend(second):
            grads = torch.autograd.grad(loss, leaves)
        for ours, plain in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 1, 5)])
def test_opcheck(device, name, lengths):
    q, k, v = (x.requires_grad_() for x in tensors(9, 2, 4, device=device))
    cu, host = offsets(lengths, device), torch.tensor(lengths)
    with backend(name):
        opcheck(torch.ops.vjepa.varlen_attention.default, (q, k, v, cu, host, 0.5, cu, host))
        out, lse = torch.ops.vjepa.varlen_attention(q.detach(), k.detach(), v.detach(), cu, host, 0.5, cu, host)
        arguments = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, lse, cu, host, 0.5, cu, host)
        opcheck(torch.ops.vjepa.varlen_attention_backward.default, arguments)


Q, CU = torch.zeros(3, 2, 4), offsets((1, 2))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "sentence"),
    [
        ((Q[0], Q, Q, CU, (1, 2)), {}, ValueError, r"q must have the shape \[N, heads, head_dim\]"),
        ((Q, Q.double(), Q, CU, (1, 2)), {}, TypeError, r"k must have the dtype of q \(torch.float32\)"),
        ((Q, Q, Q[:, :1], CU, (1, 2)), {}, ValueError, r"v must have the heads and head_dim of q, \(2, 4\)"),
        ((Q, Q[:2], Q[:2], CU, (1, 2)), {}, ValueError, "k must have the 3 tokens of q without kv_lengths"),
        ((Q, Q, Q[:2], CU, (1, 2)), {}, ValueError, "v must have the 3 tokens of k"),
        ((Q, Q, Q.to("meta"), CU, (1, 2)), {}, ValueError, "v must be on the device of q"),
        ((Q, Q, Q, CU.long(), (1, 2)), {}, TypeError, "cu_seqlens must be one of int32"),
        ((Q, Q, Q, CU, 3), {}, TypeError, "lengths must be a tuple of ints or a 1-D int tensor on the CPU"),
        ((Q, Q, Q, CU, (1.5, 2.5)), {}, TypeError, r"lengths must be ints, got float 1\.5 in entry 0"),
        ((Q, Q, Q, CU, (1, 2)), {"scale": "1"}, TypeError, "scale must be a number, got str"),
        ((Q, Q, Q, CU, (1, 1)), {}, ValueError, "lengths must sum to the 3 tokens given, got a sum of 2"),
        ((Q, Q, Q, CU, (2, 1)), {}, ValueError, "cu_seqlens must be the running sum of lengths"),
        ((Q, Q, Q, CU, (3,)), {}, ValueError, "cu_seqlens must have 2 entries"),
        ((*(torch.zeros(3, 1, 257),) * 3, CU, (1, 2)), {}, ValueError, "q must have a head_dim of 1 to 256"),
        (
            (Q, Q, Q, CU, (1, 2)),
            {"kv_lengths": (1, 2)},
            ValueError,
            "kv_cu_seqlens and kv_lengths must be given together",
        ),
        (
            (Q, Q, Q, CU, (1, 2)),
            {"kv_lengths": (3, 0), "kv_cu_seqlens": offsets((3, 0))},
            ValueError,
            "kv_lengths must be positive where there are queries, got 0 in sequence 1",
        ),
        (
            (Q, Q, Q, CU, (1, 2)),
            {"kv_lengths": (3,), "kv_cu_seqlens": offsets((3,))},
            ValueError,
            "kv_lengths must have 2 entries like lengths, got 1",
        ),
    ],
)
def test_refuses(arguments, keywords, error, sentence):
    with pytest.raises(error, match=sentence):
        varlen_attention(*arguments, **keywords)
