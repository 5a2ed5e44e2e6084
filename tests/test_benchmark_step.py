"""The contenders of bench_step take the same step, and their check would notice if one did not."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vjepa import VJEPA, VJEPAConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"image_size": 64, "num_frames": 8, "depth": 2, "predictor_depth": 2, "predictor_embed_dim": 48}
STEPS = 3
RELEASED = {  # a stand-in of the released code: its names and calls around the straight networks
    "models/vision_transformer": """
import torch
from benchmarks.straight import Encoder
from vjepa import VJEPAConfig

class VisionTransformer(Encoder):
    def __init__(self, img_size, norm_layer, qkv_bias, use_sdpa, **sizes):
        super().__init__(VJEPAConfig(image_size=img_size, **sizes))
        assert (qkv_bias, use_sdpa, norm_layer(4).eps) == (True, True, 1e-6)
        self.pos_embed = torch.nn.Parameter(self.positions.clone(), requires_grad=False)

    def forward(self, x, masks=None):
        return super().forward(x, masks)
""",
    "models/predictor": """
import torch
from benchmarks.straight import Predictor
from vjepa import VJEPAConfig

class VisionTransformerPredictor(Predictor):
    def __init__(self, img_size, depth, num_heads, mlp_ratio, norm_layer, qkv_bias, use_sdpa, use_mask_tokens,
                 zero_init_mask_tokens, **sizes):
        heads = {"num_heads": num_heads, "predictor_num_heads": num_heads}
        super().__init__(VJEPAConfig(image_size=img_size, predictor_depth=depth, **heads, **sizes))
        rows = [torch.nn.Parameter(torch.zeros(1, 1, sizes["predictor_embed_dim"])) for _ in self.mask_tokens]
        del self.mask_tokens
        self.mask_tokens = torch.nn.ParameterList(rows)

    def forward(self, context, targets, seen, hidden, mask_index):
        return super().forward(context, seen, hidden, mask_index)
""",
    "models/utils/multimask": """
import torch

class MultiMaskWrapper(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks=None):
        return self.backbone(x) if masks is None else [self.backbone(x, ids) for ids in masks]

class PredictorMultiMaskWrapper(MultiMaskWrapper):
    def forward(self, *lists):
        return [self.backbone(*of_kind, mask_index=kind) for kind, of_kind in enumerate(zip(*lists, strict=True))]
""",
    "masks/utils": """
from vjepa.kernels import apply_masks
import src.models.predictor
""",
}


@pytest.fixture
def bench(monkeypatch):
    """Modules of the benchmarks, imported as the package that they are."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("assembled", "bench_step", "bench_step_largest", "contenders", "harness", "memory", "ours", "released")
    names += ("steps", "straight")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


@pytest.fixture
def checkout(tmp_path):
    """A stand-in of the released code."""
    for name, text in RELEASED.items():
        path = tmp_path / "src" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def work(bench):
    return bench.steps.workload("vit_tiny", 2, torch.float32, torch.device("cpu"), **SMALL)


def makers(bench, work, checkout):
    return {
        "straight": lambda: bench.straight.Straight(work),
        "assembled": lambda: bench.assembled.Assembled(work),
        "ours": lambda: bench.ours.Ours(work),
        "released": lambda: bench.released.Released(work, checkout),
    }


def test_all_contenders_take_the_same_steps(bench, work, checkout):
    """Losses of three steps, so that gradients, clipping, AdamW and average count: within what the library promises."""
    losses = {
        name: [bench.steps.loss_of(step.step()) for _ in range(STEPS)]
        for name, step in ((name, make()) for name, make in makers(bench, work, checkout).items())
    }
    for name, found in losses.items():
        assert found == pytest.approx(losses["straight"], abs=bench.contenders.FLOAT32), name
    assert abs(losses["straight"][0] - losses["straight"][2]) > 1000 * bench.contenders.FLOAT32


def test_parts_of_all_contenders_give_the_same(bench, work, checkout):
    parts = {name: make().parts() for name, make in makers(bench, work, checkout).items()}
    for part in set(bench.steps.PARTS) - {bench.steps.UPDATE}:
        plain = bench.bench_step.mean_magnitude(parts["straight"][part]())
        for name, calls in parts.items():
            found = bench.bench_step.mean_magnitude(calls[part]())
            assert found == pytest.approx(plain, rel=bench.bench_step.PART_ERROR[torch.float32]), (name, part)
    assert all(list(calls) == list(bench.steps.PARTS) for calls in parts.values())


def test_the_update_alone_moves_everybody_alike(bench, work, checkout, monkeypatch):
    """From gradients that are all the same: weights and averages afterwards differ by roundings of one update."""

    def ones(*modules):
        for module in modules:
            for p in bench.steps.with_gradients(module):
                p.grad = torch.full_like(p, 0.5)

    for name in ("straight", "ours"):
        monkeypatch.setattr(getattr(bench, name), "draw_gradients", ones)
    sums = {}
    for name, make in makers(bench, work, checkout).items():
        step = make()
        step.parts()[bench.steps.UPDATE]()
        networks = (step.model.encoder, step.model.target_encoder) if name == "ours" else (step.encoder, step.target)
        sums[name] = [float(n.state_dict()[key].double().sum()) for n in networks for key in keys(n)]
    start = work.model().encoder
    before = [float(start.state_dict()[key].double().sum()) for key in keys(start)] * 2
    numel = max(p.numel() for p in start.parameters())
    for name, found in sums.items():
        assert found == pytest.approx(sums["straight"], abs=numel * 1e-8), name  # a rounding of a weight below 0.25
        assert found != pytest.approx(before, abs=numel * 1e-8), name


def keys(network):
    """The largest weight and a bias, which has no decay, of any of the encoders."""
    names = network.state_dict()
    return [
        next(name for name in names if name.endswith(end))
        for end in ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.bias")
    ]


def test_a_contender_that_trains_otherwise_is_not_timed(bench, work):
    class Stuck(bench.straight.Straight):
        def average(self, momentum):
            pass

    contenders, harness = bench.contenders, bench.harness
    verify = contenders.verifier(work, steps=2)
    runner = contenders.Runner(lambda: Stuck(work))
    with pytest.raises(harness.Wrong, match="loss of step 1 is"):
        verify(runner, 1.0)
    verify(contenders.Runner(lambda: bench.straight.Straight(work)), 1.0)
    contenders.verifier(work)(runner, 1.0)  # the first loss does not depend on it


def test_in_bfloat16_a_loss_may_be_a_bfloat16_number(bench, work):
    low = replace(work, dtype=torch.bfloat16)
    verify = bench.contenders.verifier(low)
    (exact,) = bench.contenders.expected_losses(low, 1)
    for loss, passes in ((torch.tensor(exact).bfloat16(), True), (exact * 1.01, False), (float("nan"), False)):
        runner = bench.contenders.Runner(lambda loss=loss: SimpleNamespace(step=lambda: loss, parts=dict, state=list))
        if passes:
            verify(runner, 1.0)
        else:
            with pytest.raises(bench.harness.Wrong):
                verify(runner, 1.0)


def test_memory_is_what_a_step_adds_and_what_stays(bench, work):
    runner = bench.contenders.Runner(lambda: bench.straight.Straight(work))
    bench.contenders.verifier(work)(runner, 1.0)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (work.model().encoder, work.model().predictor)]
    kept = bench.steps.nbytes(runner.made.state())
    counters = 4 * len(runner.made.optimizer.state)  # the number of steps of each parameter
    assert kept == 4 * (4 * sizes[0] + 3 * sizes[1]) + counters  # weight, two moments, and the average of the encoder
    if runner.grown is not None:  # Linux
        assert runner.memory() == kept + runner.grown
        large = 64 << 20
        grown = bench.memory.host_peak(lambda: torch.ones(large // 4).sum())
        assert 0.9 * large < grown < 2 * large


@pytest.mark.parametrize("fits", [0, 24, 47, 48, 100, 1000])
def test_the_largest_batch_is_found(bench, fits):
    module, tried = bench.bench_step_largest, []

    def attempt(clips):
        tried.append(clips)
        return 10 * clips if clips <= fits else None

    clips, peak = module.largest(attempt)
    assert peak == 10 * clips
    assert len(tried) == len(set(tried))
    best = min(fits, module.MOST) if fits >= module.FIRST else 0
    assert best - module.FINEST < clips <= best


def test_who_does_not_fit_into_memory_is_left_out(bench):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    harness = bench.harness
    everybody = [harness.Contender("large", full), harness.Contender("small", lambda: None)]
    outcome = harness.compete(
        harness.Work("step", "", "float32", {}, clips=3, fewest_rounds=2),
        everybody, lambda call, factor: call(), lambda call: 0.5, torch.device("cpu"), 2,
    )  # fmt: skip
    assert outcome.left_out == {"large": "OutOfMemoryError: CUDA out of memory"}
    (row,) = outcome.results
    assert (row.contender, row.rounds, row.clips_s) == ("small", 2, 6.0)


def test_the_released_code_leaves_no_trace(bench, checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "src", SimpleNamespace(mine=True))
    path = list(sys.path)
    code = bench.released.released_code(checkout)
    assert code.encoders.VisionTransformer.__module__ == "src.models.vision_transformer"
    assert sys.path == path
    assert [name for name in sys.modules if name == "src" or name.startswith("src.")] == ["src"]
    assert sys.modules["src"].mine


def test_released_code_with_other_weights_is_refused(bench, work, checkout):
    path = checkout / "src" / "models" / "predictor.py"
    path.write_text(path.read_text().replace("del self.mask_tokens", "self.more = torch.nn.Parameter(torch.zeros(1))"))
    with pytest.raises((ValueError, TypeError), match=r"other weights|mask_tokens"):
        bench.released.Released(work, checkout)


def test_a_path_that_is_no_checkout_is_refused_before_anything_runs(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--reference-repo", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4  # of a wrong option
    sentence = f"--reference-repo must be a checkout of the released V-JEPA code; {tmp_path} has no src/models/"
    assert sentence in done.stderr


def test_a_model_of_the_benchmark_predicts_as_large_as_its_targets(bench, work):
    """Else the loss would hardly depend on what is predicted."""
    model = work.model()
    assert isinstance(model, VJEPA)
    assert isinstance(work.config, VJEPAConfig)
    with torch.no_grad():
        prediction = model.outputs(work.video, work.masks).prediction
    assert 0.3 < float(prediction.abs().mean()) < 3
