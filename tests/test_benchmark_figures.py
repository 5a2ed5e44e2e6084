"""FLOP, floors, profiles and reports of a training step."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vjepa import VJEPA, VJEPAConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"image_size": 64, "num_frames": 8, "depth": 2, "predictor_depth": 2, "predictor_embed_dim": 48}


@pytest.fixture
def bench(monkeypatch):
    """Modules of the benchmarks, imported as the package that they are."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = (
        "contenders",
        "floor",
        "flops",
        "harness",
        "machine",
        "plots",
        "profile_step",
        "steps",
        "straight",
        "words",
    )
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def test_the_flop_are_those_that_pytorch_counts(bench):
    """Of the straight step, whose attention keeps its weights here: 8 FLOP backward instead of flash attention's 10."""
    work = bench.steps.workload("vit_tiny", 2, torch.float32, torch.device("cpu"), **SMALL)
    sets = work.masks.context.lengths, work.masks.target.lengths
    step = bench.straight.Straight(work)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        step.step()
    ops = bench.flops.step_ops(work.config, work.clips, *sets)
    recomputed = sum(op.flop for op in ops if op.name == "attention, backward") * 2 // 10
    assert counted.get_total_flops() == bench.flops.straight_flop(work.config, work.clips, *sets) - recomputed


def test_the_flop_of_vit_l_are_those_of_the_design(bench):
    """GFLOP of a clip by part, with the embedding (below 1 %), which the design left out; and TFLOP in all."""
    config, flops = VJEPAConfig.from_preset("vit_large"), bench.flops
    sets = (364, 100), (758, 1110)  # tokens of the two kinds of masks, cut to the shortest of a batch of 24
    ops = flops.step_ops(config, 1, *sets)
    expected = {("target", "product"): 947, ("target", "attention"): 242, ("context", "product"): 841}
    expected |= {("context", "attention"): 49, ("predictor", "product"): 301, ("predictor", "attention"): 174}
    for (part, kind), gflop in expected.items():
        assert sum(op.flop for op in ops if (op.part, op.kind) == (part, kind)) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert flops.model_flop(config, 1, *sets) / 1e12 == pytest.approx(2.56, abs=0.005)
    assert flops.model_flop(config, 1, (583, 292), (985, 1276)) / 1e12 == pytest.approx(3.66, abs=0.01)  # exact
    assert sum(flops.model_flop(config, 1, *sets, part=part) for part in bench.steps.PARTS) == sum(
        op.flop for op in ops
    )


@pytest.mark.parametrize("preset", ["vit_tiny", "vit_small"])
def test_the_weights_are_counted(bench, preset):
    model = VJEPA.from_preset(preset, num_frames=2, image_size=32, depth=2, predictor_depth=3)
    counted = tuple(sum(p.numel() for p in network.parameters()) for network in (model.encoder, model.predictor))
    assert bench.flops.parameters(model.config) == counted


def test_an_operation_takes_the_longest_of_its_limits(bench):
    limits = bench.floor.Limits("", flop=10.0, moved=5.0, exps=2.0)
    for flop, moved, exps, seconds, bound in ((20, 5, 2, 2, "FLOP"), (20, 15, 2, 3, "bytes"), (20, 15, 8, 4, "exp")):
        op = bench.flops.Op("", "", "", flop, moved, exps)
        assert (limits.seconds(op), limits.bound(op)) == (seconds, bound)
    assert bench.floor.Limits("", 10.0, 5.0, None).seconds(bench.flops.Op("", "", "", 20, 5, 99)) == 2


def test_the_page_of_floors_is_up_to_date(bench):
    assert bench.floor.PAGE.read_text() == bench.floor.page(), "python -m benchmarks.floor writes it"


# --------------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def content(bench):
    """Results of a step, of one part, and of growth, at ceilings of which each is a nice number."""
    work = bench.steps.workload("vit_tiny", 2, torch.bfloat16, torch.device("cpu"), **SMALL)

    def outcome(entry):
        harness = bench.harness
        ours = harness.Contender("vjepa (auto)", int, "auto", memory=lambda: 3_000_000_000)
        names = ("straight PyTorch", "released code")
        peers = [harness.Contender(name, int, memory=lambda: 6_000_000_000) for name in names]
        found = harness.Outcome(entry, left_out={"torch.compile of straight PyTorch": "RuntimeError: no compiler"})
        for contender, seconds in zip([ours, *peers], (2.0, 5.0, 3.0), strict=True):
            peak = contender.memory()
            found.results.append(harness.Result(contender.name, contender.backend, None, seconds, 0.1, 3, peak))
        harness.set_rates(found)
        bench.machine.Ceilings(20.0, {"bfloat16": 0.02}).set_shares(found)
        return found.as_dict()

    whole, part = (
        outcome(bench.contenders.work_of(work, name, 3, part=part))
        for name, part in (("ViT-Ti, 2 clips", None), ("ViT-Ti, 2 clips: loss", "loss"))
    )
    grown = []
    for axis, values in (("clips", (1, 2, 4)), ("tokens", (128, 288)), ("model", (27e6, 43e6))):
        for value in values:
            entry = bench.contenders.work_of(work, f"{axis} {value}", 2, op="step_growth", axis=axis, at={axis: value})
            grown.append(outcome(entry))
    about = {"kind": "cpu", "device": "Some CPU", "driver": None, "torch": "2.11", "triton": None, "cuda": None}
    about |= {"python": "3.12", "commit": None, "date": "2026-01-02"}
    ceilings = {"copy_gb_s": 20.0, "gemm_tflop_s": {"bfloat16": 0.02}, "exp_s": None}
    files = {"step-cpu": [whole, part], "step_growth-cpu": grown}
    return {name: {"machine": about, "ceilings": ceilings, "works": works} for name, works in files.items()}


def test_measured_steps_are_held_against_their_floor(bench, content):
    lines = bench.floor.compared(content["step-cpu"])
    whole = content["step-cpu"]["works"][0]
    assert lines[0] == "Some CPU"
    assert lines[1].startswith("ViT-Ti, 2 clips, bfloat16, truncate: floor ")
    config, shapes = VJEPAConfig.from_dict(whole["about"]["config"]), whole["shapes"]
    ops = bench.flops.step_ops(config, 2, shapes["context"], shapes["target"])
    floor = sum(max(op.flop / 0.02e12, op.moved / 20e9) for op in ops)
    assert lines[2] == f"    vjepa (auto): 2000 ms, {2 / floor:.2f} floors, {bench.words.duration(2 - floor)} above it"
    assert [line.split(":")[0].strip() for line in lines[2:5]] == ["vjepa (auto)", "released code", "straight PyTorch"]
    assert lines[5].startswith("ViT-Ti, 2 clips: loss")
    assert "product 0.00" in lines[5]  # the loss has none


def test_the_tables_show_clips_utilisation_and_memory(bench, content, tmp_path):
    for name, one in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    script = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(tmp_path)]
    printed = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True).stdout
    work = content["step-cpu"]["works"][0]
    rate, share = work["flop"] / 2 / 1e12, work["flop"] / 2 / 0.02e12
    reached = f"{bench.words.digits(rate)} TFLOP/s ({share:.0%} MFU)"
    line = f"step: ViT-Ti, 2 clips, bf16, truncate: auto 1.50x | 2000 ms 1 clips/s 3.00 GB {reached}"
    assert f"{line} | released code 3000 ms 0.667 clips/s 6.00 GB\n" in printed
    subprocess.run([*script, "--readme", str(readme)], timeout=60, check=True)
    text = readme.read_text()
    row = f"| step | ViT-Ti, 2 clips, bf16, truncate | 2000 ms (auto), 1 clips/s, 3.00 GB | {reached} "
    row += "| released code, 3000 ms, 0.667 clips/s, 6.00 GB | **1.50x** | straight PyTorch 2.50x, "
    assert f"{row}torch.compile of straight PyTorch: left out |  |" in text
    assert "| step_growth" not in text
    assert "![Some CPU: time of a training step](cpu-growth.svg)" in text
    root = ET.parse(tmp_path / "cpu-growth.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("polyline") == 3 * 3  # panels, contenders
    assert tags.count("circle") == 3 * (3 + 2 + 2)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"clips", "tokens of a clip", "parameters", "27 M", "43 M", "vjepa (auto)"} <= set(texts)


def test_an_exact_step_has_no_peer_and_is_shown(bench, content):
    report = importlib.import_module("benchmarks.report")
    work = content["step-cpu"]["works"][0]
    alone = {
        **work,
        "packing": "exact",
        "results": [{**work["results"][0], "ratio": None, "peers": {}}],
        "left_out": {},
    }
    row = report._markdown_row(alone)
    assert row.startswith("| step | ViT-Ti, 2 clips, bf16, exact | 2000 ms (auto), 1 clips/s, 3.00 GB |")
    assert row.endswith("MFU) |  |  |  |  |")


def test_growth_is_drawn_on_logarithmic_axes(bench):
    """Equal factors are equal distances, in both directions."""
    picture = bench.plots.growth("A", {"clips": {"ours": [(4, 4.0), (1, 1.0), (2, 2.0)]}})
    circles = [element.attrib for element in ET.fromstring(picture).iter() if element.tag.endswith("circle")]
    across, up = ([float(circle[key]) for circle in circles] for key in ("cx", "cy"))
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert up[0] - up[1] == pytest.approx(up[1] - up[2], abs=0.2)
    assert across == sorted(across) and up == sorted(up, reverse=True)


# --------------------------------------------------------------------------------------------------------------- profile


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::addmm", "aten::linear"], "matrix products"),
        (["aten::mkldnn_convolution"], "matrix products"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["vjepa::add_layer_norm"], "norms + GELU + adds"),
        (["aten::gelu_backward"], "norms + GELU + adds"),
        (["aten::empty_strided", "aten::_to_copy", "aten::to"], "casts + copies"),
        (["aten::mul_", "Optimizer.step#AdamW.step"], "optimizer + EMA"),
        (["aten::mul_", "update"], "optimizer + EMA"),
        (["aten::unknown", "aten::addmm"], "matrix products"),
        (["aten::unknown"], None),
    ],
)
def test_operations_are_told_apart(bench, names, group):
    assert bench.profile_step.group_of(names) == group


def test_a_profile_accounts_for_the_whole_step(bench):
    module = bench.profile_step
    work = bench.steps.workload("vit_tiny", 1, torch.float32, torch.device("cpu"), **SMALL)
    found = module.measure(bench.straight.Straight(work))
    assert sum(found.groups.values()) == pytest.approx(found.wall)
    assert min(found.groups[name] for name in ("attention", "matrix products", "optimizer + EMA")) > 0
    table = module.table({"straight": found}, work, 1e11, "A machine").splitlines()
    assert (
        table[0] == "A machine. A large matrix product reaches 0.100 TFLOP/s in the same run; floor: FLOP at that rate."
    )
    assert [row.split("|")[1].strip() for row in table[4:]] == [*module.GROUPS, "rest", "**step**"]
    assert table[-1].startswith(f"| **step** | {bench.words.duration(found.wall)} |")


def test_the_page_of_profiles_takes_both_precisions(bench):
    module = bench.profile_step
    text = module.PAGE.read_text()
    for precision in module.DTYPES:
        text = module.insert(text, precision, f"table of {precision}")
    assert "<!-- bf16 -->\ntable of bf16\n<!-- /bf16 -->" in text
    assert "<!-- fp32 -->\ntable of fp32\n<!-- /fp32 -->" in text
    with pytest.raises(ValueError, match="one <!-- fp32 --> with one"):
        module.insert("no markers", "fp32", "")
