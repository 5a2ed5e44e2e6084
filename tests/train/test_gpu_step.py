"""A training step on a GPU: nobody waits for it, a graph of the target encoder changes nothing, refusals come later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vjepa import VJEPA, VJEPAConfig
from vjepa.train import NonFiniteError, TrainConfig, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]


def trainer_of(model: VJEPA, precision: str, **changes: object) -> Trainer:
    copy = VJEPA(VJEPAConfig(**model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    config = {"total_steps": 12, "warmup_steps": 0, "batch_size": 4, "precision": precision, "device": "cuda"}
    return Trainer(copy, TrainConfig(**{**config, "clip_grad": 0.05, **changes}))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(model, batch, precision):
    trainer = trainer_of(model, precision)
    for seed in range(2):
        trainer.step(*batch(seed))
    video, masks = (part.pin_memory() for part in batch(2))
    with waiting_is_an_error():
        numbers = trainer.step(video, masks)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(torch.ones(1, device="cuda").sum())
    assert math.isfinite(numbers["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_those_of_the_cpu(model, batch, precision):
    rounding = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    on_gpu, on_cpu = trainer_of(model, precision), trainer_of(model, precision, device="cpu")
    for seed in range(4):
        assert on_gpu.step(*batch(seed))["loss"] == pytest.approx(on_cpu.step(*batch(seed))["loss"], rel=rounding)


def test_a_graph_of_the_target_encoder_changes_nothing(model, batch):
    eager, graphed = trainer_of(model, "bf16"), trainer_of(model, "bf16", target_graph=True)
    for seed in range(4):
        expected, found = eager.step(*batch(seed)), graphed.step(*batch(seed))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, weight in eager.model.state_dict().items():
        torch.testing.assert_close(graphed.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_a_refused_step_and_what_follows_it_change_nothing(model, batch):
    trainer = trainer_of(model, "bf16")
    trainer.step(*batch(0))
    trainer.settle()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    video, masks = batch(1)
    video = video.float() / 255
    video[2, 0, 1, 3, 4] = math.inf
    trainer.step(video, masks)
    with pytest.raises(NonFiniteError, match="Step 1 is not finite"):
        trainer.step(*batch(2))
    assert trainer.steps_done == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert math.isfinite(trainer.step(*batch(3))["loss"])
