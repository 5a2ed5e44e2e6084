"""Which backend of varlen_attention `auto` takes: the fastest of the nearest measurement that can run."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import _attention_order, _cpu_attention, _dispatch, backend, varlen_attention

TABLE = {
    "cpu": [
        ("float32", 24, 1500, False, ("reference", "sdpa")),
        ("float32", 24, 100, False, ("sdpa", "reference")),
        ("float32", 64, 1568, True, ("flash_attn_3", "sdpa", "reference")),
    ],
    "cpu_amx": [("float32", 24, 1500, False, ("cpu", "sdpa"))],
    "sm_90": [
        ("bfloat16", 24, 1500, False, ("triton", "torch_varlen")),
        ("bfloat16", 64, 1500, False, ("flash_attn_3", "triton")),
        ("bfloat16", 24, 2040, False, ("torch_varlen", "triton")),
    ],
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(_attention_order, "MEASURED", TABLE)
    monkeypatch.setattr(_cpu_attention, "tiles", lambda: False)
    _attention_order.nearest.cache_clear()
    yield
    _attention_order.nearest.cache_clear()


def order(lengths, head_dim=24, dtype=torch.float32, kv_lengths=None, device="cpu"):
    q = torch.empty(sum(lengths), 1, head_dim, dtype=dtype)
    lengths, kv_lengths = torch.tensor(lengths), torch.tensor(lengths if kv_lengths is None else kv_lengths)
    return _attention_order.order(torch.device(device), q, 1.0, lengths, kv_lengths)


@pytest.mark.usefixtures("table")
def test_the_nearest_measurement():
    assert order((1400, 1300)) == ("reference", "sdpa")
    assert order((90, 80)) == order((1, 2)) == ("sdpa", "reference")
    assert order((3000, *(1,) * 29)) == ("sdpa", "reference")  # by the mean, not the longest
    assert order((1568, 1568), head_dim=24) == ("flash_attn_3", "sdpa", "reference")
    assert order((1568, 1568), head_dim=24, kv_lengths=(5, 6)) == ("reference", "sdpa")
    assert order((1400, 1300), dtype=torch.bfloat16) == ()  # not measured
    assert order(()) == order((0, 0)) == ()
    assert order((3, 4), device="meta") == ()


@pytest.mark.usefixtures("table")
def test_processors_with_tiles_have_their_own(monkeypatch):
    monkeypatch.setattr(_cpu_attention, "tiles", lambda: True)
    assert order((90, 80)) == ("cpu", "sdpa")


@pytest.mark.usefixtures("table")
def test_each_kind_of_gpu_has_its_own(monkeypatch):
    monkeypatch.setattr(_attention_order, "capability", lambda device: (9, 0))
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    assert order((1400, 1300), **bf16) == order((1569, 1560), **bf16) == ("triton", "torch_varlen")
    assert order((2050, 2020), **bf16) == ("torch_varlen", "triton")
    assert order((1400, 1300), 80, **bf16) == ("flash_attn_3", "triton")
    assert order((1400, 1300), dtype=torch.float16, device="cuda") == ("triton", "torch_varlen")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert order((1400, 1300), **bf16) == ()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_attention_order, "capability", lambda device: (8, 0))
    assert order((1400, 1300), dtype=torch.bfloat16, device="cuda") == ()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("lengths", "name"), [((9, 8), "sdpa"), ((1200, 1300), "reference"), ((7, 7), "sdpa")])
def test_auto_takes_the_first_that_can_run(monkeypatch, lengths, name):
    """Forward and backward alike, although flash_attn_3 was the fastest where lengths are equal."""
    served = []
    select = _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda *given: served.append(select(*given)) or served[-1])
    x = torch.randn(sum(lengths), 1, 24, requires_grad=True)
    with backend("auto"):
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        varlen_attention(x, x, x, cu, lengths).sum().backward()
    assert [row.name for row in served] == [name, name]


def test_the_committed_table_names_backends():
    rows = _dispatch._TABLE["varlen_attention"]
    for entries in _attention_order.MEASURED.values():
        for dtype, head_dim, tokens, alike, names in entries:
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert 1 <= head_dim <= 256
            assert tokens > 0
            assert isinstance(alike, bool)
            assert set(names) <= set(rows)
