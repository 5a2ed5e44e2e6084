"""The table of backends: what is forced, what auto takes, what is refused and why, what is logged."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from vjepa.kernels import _dispatch, _native, backend, ema_update_, varlen_attention

CPU = torch.device("cpu")
LENGTHS, OFFSETS = (2, 3), torch.tensor([0, 2, 5], dtype=torch.int32)
OPS = [
    "adamw_ema_",
    "add_layer_norm",
    "ema_update_",
    "gather_tokens",
    "gradient_norms",
    "masked_l1_loss",
    "mlp",
    "predictor_tokens",
    "scatter_tokens",
    "tubelet_embed",
    "varlen_attention",
]


def attend():
    x = torch.ones(5, 1, 4)
    return varlen_attention(x, x, x, OFFSETS, LENGTHS)


def selected(op):
    return _dispatch.select(op, CPU).name


def test_every_op_is_in_the_table_with_a_reference():
    assert _dispatch.operators() == OPS
    for op in OPS:
        assert _dispatch.explain(op, CPU)["reference"] == "can run"


def test_auto_and_forced_choices(monkeypatch):
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    assert selected("varlen_attention") == "sdpa"
    with backend("reference"):
        assert [selected(op) for op in OPS] == ["reference"] * len(OPS)
        with backend("sdpa"):  # forced on the op that has it, the others on auto
            assert selected("varlen_attention") == "sdpa"
            assert selected("gather_tokens") == "cpu"
        assert selected("varlen_attention") == "reference"
        with backend("auto"):
            assert selected("varlen_attention") == "sdpa"
    assert selected("varlen_attention") == "sdpa"


def test_the_choice_ends_with_the_block_even_on_an_error():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert _dispatch.requested() == "auto"


def test_blocks_of_two_threads_may_overlap():
    first, second = backend("reference"), backend("sdpa")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _dispatch.requested() == "sdpa"
    second.__exit__(None, None, None)
    assert _dispatch.requested() == "auto"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv(_dispatch.VARIABLE, "reference")
    assert selected("varlen_attention") == "reference"
    with backend("sdpa"):
        assert selected("varlen_attention") == "sdpa"
    monkeypatch.setenv(_dispatch.VARIABLE, "")
    assert _dispatch.requested() == "auto"
    monkeypatch.setenv(_dispatch.VARIABLE, "fastest")
    with pytest.raises(
        ValueError, match=r"the environment variable VJEPA_KERNELS must be one of auto, .*got 'fastest'"
    ):
        attend()


@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_2", "torch_varlen", "xformers"])
def test_backends_of_other_devices_raise_with_the_reason(monkeypatch, name):
    sentence = f"the backend {name} cannot serve varlen_attention on cpu: it serves CUDA devices, not cpu"
    with backend(name), pytest.raises(RuntimeError, match=sentence):
        attend()
    monkeypatch.setenv(_dispatch.VARIABLE, name)
    with pytest.raises(RuntimeError, match=sentence):
        attend()


def test_a_group_is_its_first_backend_that_can_run(monkeypatch):
    table: dict[str, dict[str, _dispatch.Row]] = {}
    monkeypatch.setattr(_dispatch, "_TABLE", table)
    reasons = {"flash_attn_4": "too new", "flash_attn_3": None, "flash_attn_2": None}
    for name in reasons:
        _dispatch.register(_dispatch.Row("op", name, lambda: None, why_not=lambda device, name=name: reasons[name]))
    with backend("flash_attn"):
        assert selected("op") == "flash_attn_3"
        reasons |= {"flash_attn_3": "not installed", "flash_attn_2": "not installed"}
        sentence = r"cannot serve op on cpu: too new \(flash_attn_4\); not installed \(flash_attn_3, flash_attn_2\)"
        with pytest.raises(RuntimeError, match=sentence):
            selected("op")


def test_what_was_measured_comes_before_the_order_of_preference(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TABLE", {})
    monkeypatch.setattr(_dispatch, "_measured", {})
    for name in ("cpu", "sdpa", "reference"):
        _dispatch.register(_dispatch.Row("op", name, lambda: None, automatic=name != "sdpa"))
    _dispatch.prefer("op", lambda device, size: ("gone", "sdpa", "cpu") if size > 9 else ())
    assert _dispatch.select("op", CPU, 10).name == "sdpa"
    assert [_dispatch.select("op", CPU, 9).name, selected("op")] == ["cpu", "cpu"]
    with backend("reference"):
        assert _dispatch.select("op", CPU, 10).name == "reference"
    full = dataclasses.replace(_dispatch._TABLE["op"]["sdpa"], unfit=lambda size: "too long" if size > 99 else None)
    _dispatch.register(full)
    assert _dispatch.select("op", CPU, 100).name == "cpu"


def test_rows_in_order_of_preference_whatever_the_order_of_registration(monkeypatch):
    table: dict[str, dict[str, _dispatch.Row]] = {}
    monkeypatch.setattr(_dispatch, "_TABLE", table)
    rows = {name: _dispatch.Row("op", name, lambda: None) for name in ("reference", "sdpa", "cpu")}
    for row in rows.values():
        _dispatch.register(row)
    assert list(_dispatch.explain("op", CPU)) == ["cpu", "sdpa", "reference"]
    assert selected("op") == "cpu"
    _dispatch.register(dataclasses.replace(rows["cpu"], automatic=False))
    assert selected("op") == "sdpa"
    _dispatch.register(dataclasses.replace(rows["sdpa"], automatic=lambda device: device.type == "cuda"))
    assert selected("op") == "reference"
    assert _dispatch.explain("op", CPU)["sdpa"] == "runs if asked for"
    with backend("cpu"):
        assert selected("op") == "cpu"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"backend name must be one of auto, .*got 'cudnn'"), backend("cudnn"):
        pytest.fail("entered")


def test_a_forced_backend_that_cannot_serve_the_tensors_raises():
    target, source = torch.zeros(2), torch.ones(2)
    sentence = "backend cuda cannot serve ema_update_ on cpu: it serves tensors on a CUDA"
    with backend("cuda"):
        with pytest.raises(RuntimeError, match=sentence):
            ema_update_([target], [source], 0.5)
        attend()  # has no such backend, so it stays on auto
    assert not target.any()


def test_a_backend_without_its_library_says_so(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: (False, "the native library was not built: no compiler"))
    assert selected("ema_update_") == "reference"
    sentence = "cannot serve ema_update_ on cpu: the native library was not built: no compiler"
    with backend("cpu"), pytest.raises(RuntimeError, match=sentence):
        ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)


def test_arguments_a_backend_cannot_take_go_to_the_next_one(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: (True, ""))
    target = torch.zeros(2, dtype=torch.float64)
    ema_update_([target], [torch.ones(2)], 0.5)
    assert target.tolist() == [0.5, 0.5]
    sentence = r"it needs tensors of at most 32 bits in targets, got \(2,\) float64"
    with backend("cpu"), pytest.raises(RuntimeError, match=sentence):
        ema_update_([target], [torch.ones(2)], 0.5)


def test_one_log_line_for_each_choice(monkeypatch, caplog):
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(_dispatch, "_logged", set())
    monkeypatch.setattr(_dispatch, "_measured", {})
    with caplog.at_level(logging.INFO, logger="vjepa.kernels"):
        attend()
        attend()
        with backend("reference"):
            attend()
            attend()
    lines = [record.getMessage() for record in caplog.records if record.name == "vjepa.kernels"]
    assert lines == [
        "varlen_attention on cpu: sdpa (VJEPA_KERNELS=auto)",
        "varlen_attention on cpu: reference (VJEPA_KERNELS=reference)",
    ]
