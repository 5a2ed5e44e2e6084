"""bf16 steps compute with copies that the optimizer writes: the numbers are autocast's, and nobody reads stale copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vjepa import VJEPA, VJEPAConfig
from vjepa.train import TrainConfig, Trainer
from vjepa.train.low_precision import LowPrecision

CONFIG: dict[str, Any] = {
    "total_steps": 12,
    "warmup_steps": 3,
    "batch_size": 4,
    "precision": "bf16",
    "device": "cpu",
    "clip_after_step": 1,
    "clip_grad": 0.05,
}


def by_autocast(trainer: Trainer) -> Trainer:
    """The same trainer as it is with several processes."""
    trainer._low = None
    trainer._forward.model = trainer.model
    return trainer


def weights(model: VJEPA) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_start(model: VJEPA) -> VJEPA:
    other = VJEPA(VJEPAConfig(**model.config.to_dict()))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"accumulation_steps": 2}])
def test_steps_are_those_under_autocast_bit_for_bit(model, batch, changes):
    config = TrainConfig(**{**CONFIG, **changes})
    ours, theirs = Trainer(model, config), by_autocast(Trainer(same_start(model), config))
    for seed in range(4):
        assert ours.step(*batch(seed), monitors=True) == theirs.step(*batch(seed), monitors=True)
    found, expected = weights(ours.model), weights(theirs.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_matrices_and_their_gradients_are_bfloat16_and_nothing_else_is(model, batch):
    trainer = Trainer(model, TrainConfig(**CONFIG))
    twin = trainer._low.twin
    seen: dict[str, torch.dtype] = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.dtype}))
    trainer.step(*batch())
    low = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert set(seen) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(seen) - low == {name for name in seen if "norm" in name or name.endswith("mask_tokens")} != set()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(parameter.grad is None for parameter in [*model.parameters(), *twin.parameters()])


def test_copies_share_memory_with_the_optimizer_and_the_rest_with_the_model(model):
    trainer = Trainer(model, TrainConfig(**CONFIG))
    copies = [*trainer.optimizer.param_copies, *trainer.optimizer.shadow_copies]
    places = {tensor.data_ptr() for tensor in copies if tensor is not None}
    places |= {tensor.data_ptr() for tensor in model.state_dict().values()}
    places |= {buffer.data_ptr() for buffer in model.buffers()}
    twin = trainer._low.twin
    assert {tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers())} <= places


def test_weights_that_others_write_are_those_the_next_step_computes_with(model, batch):
    config = TrainConfig(**CONFIG)
    trainer = Trainer(model, config)
    trainer.step(*batch(0))
    other = VJEPA(model.config)  # other random weights
    model.load_state_dict(other.state_dict())
    fresh = Trainer(same_start(model), config)
    assert trainer.step(*batch(1))["loss"] == fresh.step(*batch(1))["loss"]
    with torch.no_grad():
        model.target_encoder.blocks[0].mlp.fc1.weight.mul_(1.5)
    changed = Trainer(same_start(model), config)
    assert trainer.step(*batch(2))["loss"] == changed.step(*batch(2))["loss"]


def test_copies_are_written_again_only_if_somebody_wrote(model, batch, monkeypatch):
    trainer = Trainer(model, TrainConfig(**CONFIG))
    calls = []
    monkeypatch.setattr(trainer.optimizer, "refresh_copies", lambda: calls.append(1))
    for seed in range(3):
        trainer.step(*batch(seed))
    assert not calls
    with torch.no_grad():
        model.encoder.norm.bias.add_(1)
    trainer.step(*batch(3))
    assert len(calls) == 1


def test_fp32_has_no_copies(model):
    trainer = Trainer(model, TrainConfig(**{**CONFIG, "precision": "fp32"}))
    assert trainer._low is None
    assert trainer.optimizer.param_copies == []


def test_a_low_precision_network_needs_no_autocast(model, batch):
    """What the twin computes is what a user gets who lowers the matrices by hand."""
    trainer = Trainer(model, TrainConfig(**CONFIG))
    assert isinstance(trainer._low, LowPrecision)
    video, masks = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.outputs(video, masks)
    found = trainer._low.twin.outputs(video, masks)
    assert found.loss == expected.loss
    assert found.prediction.dtype == expected.prediction.dtype == torch.bfloat16
    assert torch.equal(found.target_features, expected.target_features)


def test_target_graph_without_a_gpu_is_refused(model):
    with pytest.raises(
        ValueError, match=r"train.target_graph needs a CUDA device, precision bf16 and a single process"
    ):
        Trainer(model, TrainConfig(**CONFIG, target_graph=True))


def test_what_is_frozen_later_stays_and_checkpointing_reaches_the_twin(model, batch):
    trainer = Trainer(model, TrainConfig(**CONFIG))
    trainer.step(*batch(0))
    model.encoder.requires_grad_(False)
    model.set_activation_checkpointing(True)
    before = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    predictor = model.predictor.predictor_proj.weight.detach().clone()
    trainer.step(*batch(1))
    assert trainer.network.predictor.activation_checkpointing
    assert all(torch.equal(p, before[name]) for name, p in model.encoder.named_parameters())
    assert not torch.equal(model.predictor.predictor_proj.weight, predictor)
