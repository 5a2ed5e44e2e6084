"""The released model's numbers. See `made_with` in the golden files for what was run."""

import json
from pathlib import Path

import pytest
import torch

from vjepa.config import VJEPAConfig

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}
STEPS = [name for name, golden in GOLDEN.items() if "loss" in golden]
FEATURES = [name for name, golden in GOLDEN.items() if "context_features" in golden]
# float64: the position tables are stored in float32, and one unit in their last place is 6e-8
TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-5}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


def assert_summary(got, golden, tolerance):
    assert got["shape"] == golden["shape"]
    assert got["abs_sum"] == pytest.approx(golden["abs_sum"], rel=tolerance)
    values, expected = torch.tensor(got["values"]), torch.tensor(golden["values"])
    torch.testing.assert_close(values, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def rebuild(golden, dtype, tools):
    model = tools.filled_model(VJEPAConfig(**golden["config"]), dtype)
    video = tools.formula("video", tuple(golden["video"]), dtype)
    t, h, w = model.encoder.grid_of(video)
    return model, video, tools.make_masks(t * h * w, video.shape[0], golden["sizes"])


@pytest.mark.parametrize("name", FEATURES)
def test_encoder_features(name, dtype, tools):
    golden = GOLDEN[name]
    model, video, masks = rebuild(golden, dtype, tools)
    with torch.no_grad():
        assert_summary(tools.summary(model.target_encoder(video)), golden["target_features"], TOLERANCE[dtype])
        assert_summary(tools.summary(model.encoder(video, masks.context)), golden["context_features"], TOLERANCE[dtype])


@pytest.mark.parametrize("name", STEPS)
def test_predictions_loss_and_gradients(name, dtype, tools):
    golden, tolerance = GOLDEN[name], TOLERANCE[dtype]
    model, video, masks = rebuild(golden, dtype, tools)
    outputs = model.outputs(video, masks)
    assert_summary(tools.summary(outputs.prediction), golden["prediction"], tolerance)
    assert float(outputs.loss.detach()) == pytest.approx(golden["loss"], rel=max(tolerance, 1e-6))
    outputs.loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norm"].keys()
    assert norms == pytest.approx(golden["grad_norm"], rel=10 * tolerance)
