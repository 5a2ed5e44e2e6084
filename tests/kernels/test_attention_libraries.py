"""The backends of varlen_attention that call other libraries: what they are given, and what is made of what they return.

Where a library is installed and the device is one that it serves, it runs here. Elsewhere a stand-in takes its place, with
the arguments of the library's own functions, that computes in plain PyTorch; that of PyTorch's flash attention is called
through the operator itself.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vjepa.kernels import _dispatch, _flash, _xformers, attention, backend, reference, varlen_attention

FLASH = ("flash_attn_4", "flash_attn_3", "flash_attn_2")
LENGTHS, KV_LENGTHS = (7, 1, 0, 12), (5, 9, 3, 14)
BF16 = torch.bfloat16


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def lengths_in(cu_seqlens, longest):
    """The lengths, checked as a kernel would take them."""
    assert cu_seqlens.dtype == torch.int32
    lengths = cu_seqlens.diff()
    assert int(lengths.max()) == longest
    return lengths


def check_rows(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert not any(stride * x.element_size() % 16 for stride in x.stride()[:-1])


def flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    check_rows(q, k, v)
    own, others = lengths_in(cu_seqlens_q, max_seqlen_q), lengths_in(cu_seqlens_k, max_seqlen_k)
    out, lse = reference.varlen_attention(q, k, v, cu_seqlens_q, own, softmax_scale, cu_seqlens_k, others)
    # laid out as nobody promises not to
    return out.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((lse, lse), 1)[:, : lse.shape[1]]


def flash_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    """From the log-sum-exp that it is given, as the libraries' kernels do."""
    check_rows(dout, q, k, v, out)
    assert lse.shape == (q.shape[1], q.shape[0])
    own, others = lengths_in(cu_seqlens_q, max_seqlen_q).tolist(), lengths_in(cu_seqlens_k, max_seqlen_k).tolist()
    wide = [x.float().transpose(0, 1) for x in (dout, q, k, v, out)]
    parts = [x.split(n, 1) for x, n in zip((*wide, lse), (own, own, others, others, own, own), strict=True)]
    grads = [[], [], []]
    for g, a, b, c, o, sums in zip(*parts, strict=True):
        p = (a @ b.mT * softmax_scale - sums[..., None]).exp()
        ds = p * (g @ c.mT - (g * o).sum(-1, keepdim=True)) * softmax_scale
        for found, own_grad in zip(grads, (ds @ b, ds.mT @ a, p.mT @ g), strict=True):
            found.append(own_grad)
    return [torch.cat(found, 1).transpose(0, 1).to(q.dtype) for found in grads]


def stand_in_2(calls):
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal) == (0.0, False)
        calls.append("forward")
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        calls.append(f"backward, deterministic {deterministic}")
        sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        for target, grad in zip((dq, dk, dv), flash_backward(dout, q, k, v, out, softmax_lse, *sides), strict=True):
            target.copy_(grad)
        return softmax_lse

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


def stand_in_3(calls):
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        calls.append("forward")
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return out, lse, torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        calls.append(f"backward, deterministic {deterministic}")
        sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        for target, grad in zip((dq, dk, dv), flash_backward(dout, q, k, v, out, softmax_lse, *sides), strict=True):
            target.copy_(grad)
        return softmax_lse

    return _flash_attn_forward, _flash_attn_backward


def stand_in_4(calls):
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        calls.append("forward")
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return out, lse if return_lse else None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        calls.append(f"backward, deterministic {deterministic}")
        sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        for target, grad in zip((dq, dk, dv), flash_backward(dout, q, k, v, out, lse, *sides), strict=True):
            target.copy_(grad)
        return dq, dk, dv

    return _flash_attn_fwd, _flash_attn_bwd


STAND_INS = {"flash_attn_2": stand_in_2, "flash_attn_3": stand_in_3, "flash_attn_4": stand_in_4}


class BlockDiagonalMask(SimpleNamespace):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(own=q_seqlen, others=kv_seqlen, device=device)


def stand_in_xformers(calls):
    """Packed sums for 16-bit floats, padded ones for float32, which it wants back in the same form."""

    def sides(mask):
        own, others = list(mask.own), list(mask.others)
        return offsets(own), offsets(others), max(own), max(others)

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        calls.append("forward")
        out, lse = flash_forward(query[0], key[0], value[0], *sides(attn_bias), scale)
        if query.dtype == torch.float32:
            padded = lse.new_full((len(attn_bias.own), lse.shape[0], 32), float("inf"))
            for row, own in zip(padded, lse.split(list(attn_bias.own), 1), strict=True):
                row[:, : own.shape[1]] = own
            return out[None], padded
        return out[None], torch.cat((lse, lse), 1)[None]  # longer than need be

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        calls.append("backward, deterministic False")
        if query.dtype == torch.float32:
            assert lse.shape == (len(attn_bias.own), query.shape[2], max(attn_bias.own))
            lse = torch.cat([row[:, :length] for row, length in zip(lse, attn_bias.own, strict=True)], 1)
        else:
            (lse,) = lse
        given = (grad[0], query[0], key[0], value[0], output[0], lse, *sides(attn_bias), scale)
        grads = flash_backward(*given)
        if query.shape == key.shape:  # one buffer, as where q, k and v are parts of one
            grads = torch.stack(grads, 1).unbind(1)
        return tuple(x[None] for x in grads)

    return SimpleNamespace(
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
        memory_efficient_attention_backward=memory_efficient_attention_backward,
        BlockDiagonalMask=BlockDiagonalMask,
    )


def module_of(name, functions):
    module = ModuleType(name)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@pytest.fixture
def calls():
    return []


@pytest.fixture(params=[*FLASH, "torch_varlen", "xformers"])
def library(request, monkeypatch, device, calls):
    """A backend in force, or its stand-in; `calls` are those of the stand-in."""
    name = request.param
    row = _dispatch._TABLE["varlen_attention"][name]
    if device.type == "cuda":
        if why := row.why_not(device):
            pytest.skip(why)
    else:
        operators = install(name, monkeypatch, calls)
        for module in (_flash, _xformers):
            monkeypatch.setattr(module, "capability", lambda device: (9, 0))
        open_row = _dispatch.Row("varlen_attention", name, row.forward, row.backward, unfit=row.unfit)
        monkeypatch.setitem(_dispatch._TABLE["varlen_attention"], name, open_row)
    with backend(name):
        yield name
    if device.type == "cpu" and operators is not None:
        operators._destroy()
    _flash.library.cache_clear()
    _xformers._library.cache_clear()
    _xformers._mask.cache_clear()


def install(name, monkeypatch, calls):
    _flash.library.cache_clear()
    _xformers._library.cache_clear()
    _xformers._mask.cache_clear()
    if name == "torch_varlen":
        operators = torch.library.Library("aten", "IMPL")
        operators.impl("_flash_attention_forward", torch_forward(calls), "CPU")
        operators.impl("_flash_attention_backward", torch_backward(calls), "CPU")
        return operators  # gone once nobody holds it
    if name == "xformers":
        monkeypatch.setattr(_xformers, "find_spec", lambda name: True)
        monkeypatch.setattr(_xformers, "import_module", lambda module: stand_in_xformers(calls))
        return None
    path = _flash.PACKAGES[name].module
    for parent in range(1, path.count(".") + 1):
        parent_name = ".".join(path.split(".")[:parent])
        monkeypatch.setitem(sys.modules, parent_name, ModuleType(parent_name))
    monkeypatch.setitem(sys.modules, path, module_of(path, STAND_INS[name](calls)))
    return None


def torch_forward(calls):
    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        **rest,
    ):  # fmt: skip
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
        calls.append("forward")
        out, lse = flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale)
        return out, lse, *(torch.empty(0) for _ in range(3))

    return forward


def torch_backward(calls):
    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, **rest,
    ):  # fmt: skip
        assert (dropout_p, is_causal) == (0.0, False)
        calls.append("backward, deterministic False")
        sides = (cum_seq_q, cum_seq_k, max_q, max_k, scale)
        return tuple(flash_backward(grad_out, query, key, value, out, logsumexp, *sides))

    return backward


def with_gradients(q, k, v, grad, lengths, kv_lengths=None):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    cu, further = offsets(lengths, q.device), {}
    if kv_lengths is not None:
        further = {"kv_cu_seqlens": offsets(kv_lengths, q.device), "kv_lengths": kv_lengths}
    out = varlen_attention(*leaves, cu, lengths, scale=0.3, **further)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(check_accuracy, q, k, v, grad, lengths, kv_lengths=None):
    results = with_gradients(q, k, v, grad, lengths, kv_lengths)
    with backend("reference"):
        plain = with_gradients(q, k, v, grad, lengths, kv_lengths)
        exact = with_gradients(*(x.double() for x in (q, k, v, grad)), lengths, kv_lengths)
    for ours, same_dtype, truth in zip(results, plain, exact, strict=True):
        assert ours.is_contiguous()
        check_accuracy(ours, same_dtype, truth)


@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_packed_qkv(check_accuracy, device, library, calls, head_dim):
    qkv = torch.randn(20, 3, 2, head_dim, device=device).to(BF16)
    grad = torch.randn(20, 2, head_dim, device=device).to(BF16)
    check(check_accuracy, *qkv.unbind(1), grad, (7, 1, 0, 12))
    if device.type == "cpu":
        assert calls == ["forward", "backward, deterministic False"]


def test_keys_of_other_lengths(check_accuracy, device, library):
    """Also keys that no query asks for, whose gradients are zero."""
    q = torch.randn(20, 2, 16, device=device).to(BF16)
    k, v = torch.randn(2, 31, 2, 16, device=device).to(BF16)
    check(check_accuracy, q, k, v, torch.randn_like(q), LENGTHS, KV_LENGTHS)


def test_rows_that_begin_anywhere(check_accuracy, device, library):
    """Rows of odd strides, at odd addresses, or whose features lie apart are copied first."""
    memory = torch.randn(4, 20 * 2 * 17 + 1, device=device).to(BF16)
    q, k, v, grad = (row[1:].view(20, 2, 17)[..., :16] for row in memory)
    check(check_accuracy, q, k, v, grad, LENGTHS)
    check(check_accuracy, *(row[1:641].view(20, 2, 16) for row in memory), LENGTHS)
    check(check_accuracy, *(x[:, :1].expand(20, 2, 16) for x in (q, k, v, grad)), LENGTHS)
    check(check_accuracy, *(x.mT.contiguous().mT for x in (q, k, v, grad)), LENGTHS)
    check(check_accuracy, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, grad)), LENGTHS)


def test_nothing_to_attend(device, library, calls):
    none, keys = torch.randn(0, 2, 8, device=device).to(BF16), torch.randn(5, 2, 8, device=device).to(BF16)
    out, *grads = with_gradients(none, keys, keys, none, (0, 0), (2, 3))
    assert out.shape == grads[0].shape == (0, 2, 8)
    assert not any(grad.any() for grad in grads)
    assert calls == []


def test_another_backend_may_do_the_backward_pass(check_accuracy, device, library):
    """Their log-sum-exp is ours: what one leaves serves the other."""
    q, k, v, grad = (torch.randn(20, 2, 16, device=device).to(BF16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for first, second in ((library, "sdpa"), ("sdpa", library)):
        if device.type == "cuda":
            continue  # sdpa tells no log-sum-exp there
        with backend(first):
            out = varlen_attention(*leaves, offsets((20,), device), (20,), scale=0.3)
        with backend(second):
            mixed = torch.autograd.grad(out, leaves, grad)
        with backend("reference"):
            _, *plain = with_gradients(q, k, v, grad, (20,))
            _, *exact = with_gradients(*(x.detach().double() for x in (q, k, v, grad)), (20,))
        for ours, same_dtype, truth in zip(mixed, plain, exact, strict=True):
            check_accuracy(ours, same_dtype, truth)


def test_float32(check_accuracy, device, library):
    q, k, v, grad = (torch.randn(20, 2, 16, device=device) for _ in range(4))
    if library == "xformers":
        check(check_accuracy, q, k, v, grad, LENGTHS)
        check(check_accuracy, q, k, v, grad, (20,))
    else:
        sentence = f"the backend {library} cannot serve .*: its kernels take bfloat16 and float16, not float32"
        with pytest.raises(RuntimeError, match=sentence):
            with_gradients(q, k, v, grad, LENGTHS)


def test_heads_that_they_do_not_take(device, library):
    x = torch.randn(4, 1, 20, device=device).to(BF16)
    with pytest.raises(RuntimeError, match="need a head_dim that is a multiple of 8, got 20"):
        varlen_attention(x, x, x, offsets((4,), device), (4,))
    x = torch.randn(4, 1, 8, device=device).double()
    with pytest.raises(RuntimeError, match="float64"):
        varlen_attention(x, x, x, offsets((4,), device), (4,))
    x = x.to(BF16)
    with pytest.raises(RuntimeError, match=r"its kernels need a positive scale, got -1\.0"):
        varlen_attention(x, x, x, offsets((4,), device), (4,), scale=-1.0)


@pytest.mark.parametrize("name", FLASH)
def test_deterministic_where_pytorch_is_told_so(monkeypatch, device, calls, name):
    if device.type == "cuda":
        pytest.skip("the stand-in tells what it was asked for")
    install(name, monkeypatch, calls)
    x = torch.randn(4, 1, 8).to(BF16)
    out, lse = _flash.forward(name, x, x, x, offsets((4,)), torch.tensor([4]), 1.0, offsets((4,)), torch.tensor([4]))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    given = (x, x, x, x, out, lse, offsets((4,)), torch.tensor([4]), 1.0, offsets((4,)), torch.tensor([4]))
    _flash.backward(name, *given)
    assert calls == ["forward", "backward, deterministic True"]
    _flash.library.cache_clear()


def test_why_a_library_cannot_be_used(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_flash, "capability", lambda device: (9, 0))
    assert _flash.why_not("flash_attn_2", torch.device("cpu")) == "it serves CUDA devices, not cpu"

    def broken(module):
        raise ImportError("undefined symbol: _ZN3c10")

    def missing(module):
        raise ModuleNotFoundError("No module named 'flash_attn_2_cuda'")

    def other(module):
        return module_of(module, (_flash_attn_fwd, _flash_attn_bwd))

    def _flash_attn_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, return_lse): ...

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, deterministic, dq, dk, dv
    ): ...

    def older(module):
        return module_of(module, (_flash_attn_forward, _flash_attn_fwd))

    def _flash_attn_forward(
        q, k, v, k_new, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ): ...

    def confused(module):
        raise AttributeError("module 'cutlass' has no attribute 'cute'")

    lacks = "this version of flash-attn-4 has a _flash_attn_bwd that does not take max_seqlen_k, max_seqlen_q"
    wants = "this version of flash-attn-3 has a _flash_attn_forward that wants causal, k_new, out too"
    reasons = [
        ("flash_attn_2", missing, "flash-attn is not installed (No module named 'flash_attn_2_cuda')"),
        ("flash_attn_3", broken, "flash-attn-3 does not import: ImportError: undefined symbol: _ZN3c10"),
        ("flash_attn_3", older, wants),
        (
            "flash_attn_4",
            confused,
            "flash-attn-4 does not import: AttributeError: module 'cutlass' has no attribute 'cute'",
        ),
        ("flash_attn_3", other, "this version of flash-attn-3 has no _flash_attn_forward"),
        ("flash_attn_4", other, lacks),
    ]
    for name, importing, why in reasons:
        _flash.library.cache_clear()
        monkeypatch.setattr(_flash, "import_module", importing)
        assert _flash.why_not(name, gpu) == why
    _flash.library.cache_clear()
    assert _xformers.why_not(gpu) == "xformers is not installed"
    monkeypatch.setattr(_xformers, "find_spec", lambda name: True)
    for importing, why in (
        (missing, "xformers does not import: ModuleNotFoundError: No module named"),
        (broken, "xformers does not import: ImportError: undefined symbol"),
        (other, "this version of xformers has no memory_efficient_attention_forward_requires_grad"),
    ):
        _xformers._library.cache_clear()
        monkeypatch.setattr(_xformers, "import_module", importing)
        assert _xformers.why_not(gpu).startswith(why)
    _xformers._library.cache_clear()
    monkeypatch.setattr(_flash, "capability", lambda device: (7, 5))
    assert _flash.why_not("flash_attn_2", gpu).startswith("cuda:0 has compute capability 7.5; its kernels are for 8, 9")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert _flash.why_not("torch_varlen", gpu) == "this PyTorch was built without flash attention"


def test_arguments_of_functions_that_are_operators():
    @torch.library.custom_op("vjepa_test::attend", mutates_args=())
    def attend(q: torch.Tensor, softmax_scale: float = 1.0) -> torch.Tensor:
        return q * softmax_scale

    assert _flash._names(attend) == {"q": True, "softmax_scale": False}


def test_the_arguments_of_pytorchs_own():
    """The operators take what they are given, in the version that is installed."""
    forward = torch.ops.aten._flash_attention_forward.default._schema.arguments
    backward = torch.ops.aten._flash_attention_backward.default._schema.arguments
    assert [argument.name for argument in forward[:10]] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert [argument.name for argument in backward[:12]] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal"),
    ]
    assert {"scale"} <= {a.name for a in forward if a.kwarg_only} & {a.name for a in backward if a.kwarg_only}


def test_only_pytorchs_own_needs_no_measurement():
    rows = _dispatch._TABLE["varlen_attention"]
    gpu = torch.device("cuda", 0)
    assert {name for name in (*FLASH, "torch_varlen", "xformers", "triton") if rows[name].unasked(gpu)} == {
        "torch_varlen"
    }
    assert attention.order is _dispatch._measured["varlen_attention"]


@pytest.mark.parametrize(
    ("name", "found", "dtype", "head_dim", "why"),
    [
        ("torch_varlen", (8, 0), BF16, 256, None),
        ("torch_varlen", (8, 6), BF16, 192, None),
        ("torch_varlen", (8, 9), BF16, 200, "heads of up to 192 on compute capability 8.9, got 200"),
        ("torch_varlen", (12, 0), BF16, 256, "heads of up to 192 on compute capability 12.0, got 256"),
        ("flash_attn_4", (9, 0), BF16, 256, None),
        ("flash_attn_4", (10, 0), BF16, 136, "heads of up to 128 here, got 136"),
        ("flash_attn_2", (8, 9), BF16, 256, None),
        ("xformers", (9, 0), torch.float32, 64, None),
        ("xformers", (10, 0), torch.float32, 64, "kernels of float32 are not for compute capability 10.0"),
        ("xformers", (10, 0), BF16, 64, None),
        ("xformers", (7, 5), torch.float16, 64, "kernels of float16 are not for compute capability 7.5"),
    ],
)
def test_heads_that_an_architecture_does_not_take(monkeypatch, name, found, dtype, head_dim, why):
    for module in (_flash, _xformers):
        monkeypatch.setattr(module, "capability", lambda device: found)
    says = _dispatch._TABLE["varlen_attention"][name].unfit(torch.empty(1, 1, head_dim, dtype=dtype), 1.0)
    assert says is None if why is None else why in says


@pytest.mark.parametrize(
    ("name", "found", "serves"),
    [
        *(("torch_varlen", (major, 0), major >= 8) for major in (7, 8, 9, 10, 12)),
        *(("flash_attn_2", (major, 0), major >= 8) for major in (7, 8, 9, 10, 12)),
        *(("flash_attn_3", (major, 0), major == 9) for major in (8, 9, 10, 12)),
        *(("flash_attn_4", (major, 0), major >= 9) for major in (8, 9, 10, 12)),
    ],
)
def test_architectures_and_rocm(monkeypatch, name, found, serves):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_flash, "capability", lambda device: found)
    monkeypatch.setattr(_flash, "library", lambda name: _flash.TORCH)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert (_flash.why_not(name, gpu) is None) == serves
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _flash.why_not(name, gpu) == "it serves NVIDIA GPUs"


def test_flash_attn_4_is_not_deterministic_everywhere(monkeypatch):
    x = torch.empty(1, 1, 64, dtype=BF16)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for major, why in ((9, None), (12, "its backward pass is not deterministic on compute capability 12")):
        monkeypatch.setattr(_flash, "capability", lambda device, major=major: (major, 0))
        assert _dispatch._TABLE["varlen_attention"]["flash_attn_4"].unfit(x, 1.0) == why


def test_masks_made_in_inference_serve_training(device, library):
    q, k, v, grad = (torch.randn(20, 2, 16, device=device).to(BF16) for _ in range(4))
    with torch.inference_mode():
        varlen_attention(q, k, v, offsets(LENGTHS, device), LENGTHS)
    assert with_gradients(q, k, v, grad, LENGTHS)[0].shape == q.shape
