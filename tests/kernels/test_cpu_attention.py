"""When the native attention serves, and who serves where it cannot."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import _attention_order, _cpu_attention, _dispatch, backend, varlen_attention

CPU = torch.device("cpu")
LENGTHS, OFFSETS = (3, 4), torch.tensor([0, 3, 7], dtype=torch.int32)


def attend(dtype=torch.float32, **options):
    x = torch.randn(7, 2, 8, dtype=dtype, requires_grad=True)
    return varlen_attention(x, x, x, OFFSETS, LENGTHS, **options)


@pytest.fixture
def served(monkeypatch):
    """Who serves; the native kernels were the fastest in both dtypes."""
    table = [(name, 8, 4, False, ("cpu", "sdpa", "reference")) for name in ("bfloat16", "float32")]
    monkeypatch.setattr(_attention_order, "MEASURED", {"cpu": table, "cpu_amx": table})
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    _attention_order.nearest.cache_clear()
    names = []
    select = _dispatch.select

    def noted(*given):
        row = select(*given)
        names.append(row.name)
        return row

    monkeypatch.setattr(_dispatch, "select", noted)
    yield names
    _attention_order.nearest.cache_clear()


@pytest.fixture
def as_if_capable(monkeypatch):
    monkeypatch.setattr(_cpu_attention, "_why_no_library", lambda device: None)
    monkeypatch.setattr(_cpu_attention, "instructions", lambda: _cpu_attention.AVX512 | _cpu_attention.AVX512_BF16)
    monkeypatch.setattr(_cpu_attention, "has_amx", lambda: False)


@pytest.mark.usefixtures("as_if_capable")
def test_what_it_cannot_take_and_why(monkeypatch):
    assert _cpu_attention.why_not(CPU) is None
    for dtype, scale, why in [
        (torch.float32, 0.5, None),
        (torch.bfloat16, 0.5, None),
        (torch.float16, 0.5, r"its kernels compute in float32 and bfloat16, got (1, 1, 1) float16 on cpu"),
        (torch.float64, 0.5, r"its kernels compute in float32 and bfloat16, got (1, 1, 1) float64 on cpu"),
        (torch.float32, -0.5, "its kernels need a positive, finite scale, got -0.5"),
        (torch.float32, 0.0, "its kernels need a positive, finite scale, got 0.0"),
        (torch.float32, float("inf"), "its kernels need a positive, finite scale, got inf"),
        (torch.float32, float("nan"), "its kernels need a positive, finite scale, got nan"),
    ]:
        assert _cpu_attention.unfit(torch.zeros(1, 1, 1, dtype=dtype), scale) == why
    monkeypatch.setattr(_cpu_attention, "has_amx", lambda: True)
    assert "AMX" in str(_cpu_attention.unfit(torch.zeros(1, 1, 1, dtype=torch.bfloat16), 0.5))
    assert _cpu_attention.unfit(torch.zeros(1, 1, 1), 0.5) is None
    monkeypatch.setattr(_cpu_attention, "instructions", lambda: 7)  # the library has it too
    assert _cpu_attention.unfit(torch.zeros(1, 1, 1, dtype=torch.bfloat16), 0.5) is None


@pytest.mark.parametrize("found", [0, _cpu_attention.AVX512_BF16])
def test_without_its_instructions_the_next_of_the_order_serves(monkeypatch, served, found):
    monkeypatch.setattr(_cpu_attention, "_why_no_library", lambda device: None)
    monkeypatch.setattr(_cpu_attention, "instructions", lambda: found)
    attend().sum().backward()
    assert served == ["sdpa", "sdpa"]
    with (
        backend("cpu"),
        pytest.raises(RuntimeError, match=r"cannot serve varlen_attention on cpu: its kernels need AVX-512"),
    ):
        attend()


@pytest.mark.usefixtures("as_if_capable")
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float16, {}), (torch.float64, {}), (torch.float32, {"scale": -1.0})], ids=str
)
def test_the_next_of_the_order_serves_what_it_cannot_take(served, dtype, options):
    attend(dtype, **options).sum().backward()
    assert "cpu" not in served
    assert len(served) == 2


@pytest.mark.skipif(_cpu_attention.why_not(CPU) is not None, reason=str(_cpu_attention.why_not(CPU)))
def test_where_it_is_fastest_and_can_run_it_serves(monkeypatch, served):
    monkeypatch.setattr(_cpu_attention, "has_amx", lambda: False)
    attend().sum().backward()
    attend(torch.bfloat16).sum().backward()
    assert served == ["cpu"] * 4
    monkeypatch.setattr(_cpu_attention, "has_amx", lambda: True)
    found = _cpu_attention.instructions() & ~_cpu_attention.AMX_BF16
    monkeypatch.setattr(_cpu_attention, "instructions", lambda: found)
    served.clear()
    attend(torch.bfloat16).sum().backward()
    assert served == ["sdpa", "sdpa"]


def test_unlike_the_others_it_waits_for_a_measurement(monkeypatch):
    """On processors that nobody measured PyTorch's own kernel serves."""
    monkeypatch.setattr(_cpu_attention, "why_not", lambda device: None)
    assert not _dispatch._TABLE["varlen_attention"]["cpu"].unasked(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 3.3e4, 1e15])
def test_huge_scores_are_numbers(dtype, size):
    """Of activations that have diverged: the maximum is subtracted, and what rounding leaves above it is 0."""
    reason = _cpu_attention.why_not(CPU)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    q, k = (((torch.rand(7, 2, 8) + 0.5) * size).to(dtype).requires_grad_() for _ in range(2))
    v = torch.randn(7, 2, 8).to(dtype).requires_grad_()
    results = []
    for name in ("cpu", "reference"):
        with backend(name):
            out = varlen_attention(q, k, v, OFFSETS, LENGTHS)
            grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert all(bool(tensor.isfinite().all()) for tensor in (out, grads[2])), name
        results.append(out.float())
    assert results[0].abs().max() <= v.float().abs().max()  # means of values


def test_the_operator_refuses_what_its_kernel_would_read_beyond():
    reason = _cpu_attention.why_not(CPU)
    if reason is not None:
        pytest.skip(reason)
    x, lengths = torch.randn(7, 2, 8), torch.tensor(LENGTHS)
    sets = (OFFSETS, lengths, 1.0, OFFSETS, lengths)
    with backend("cpu"):
        out, lse = torch.ops.vjepa.varlen_attention(x, x, x, *sets)
        with pytest.raises(ValueError, match=r"v must be .7, 2, 8. float32 on cpu, got .5, 2, 8."):
            torch.ops.vjepa.varlen_attention(x, x, x[:5], *sets)
        back = torch.ops.vjepa.varlen_attention_backward
        with pytest.raises(ValueError, match=r"grad must be .* float32 .*, got .* float64"):
            back(x.double(), x, x, x, out, lse, *sets)
        with pytest.raises(ValueError, match=r"lse must be .2, 7. float32, got .2, 6."):
            back(x, x, x, x, out, lse[:, :6], *sets)
