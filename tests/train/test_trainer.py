"""One step of the trainer: its numbers, its guard, its configuration."""

from __future__ import annotations

import math

import pytest
import torch

from vjepa import VJEPA
from vjepa.train import NonFiniteError, TrainConfig, Trainer
from vjepa.train.guard import load_batch, save_bundle


def weights(model: VJEPA) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_step_returns_floats_of_its_schedules(model, batch):
    config = TrainConfig(total_steps=90_000, warmup_steps=12_000, precision="fp32", device="cpu", batch_size=4)
    numbers = Trainer(model, config).step(*batch())
    assert all(type(value) is float for value in numbers.values())
    assert numbers.keys() == {"loss", "lr", "weight_decay", "momentum", "grad_norm_encoder", "grad_norm_predictor"}
    assert numbers["lr"] == pytest.approx(2.00035e-4, rel=1e-5)
    assert numbers["weight_decay"] == pytest.approx(0.0400000001, rel=1e-9)
    assert numbers["momentum"] == 0.998


def test_target_follows_the_weights_after_the_optimizer_step(model, train_config, batch):
    trainer = Trainer(model, train_config)
    target = weights(model.target_encoder)
    momentum = trainer.step(*batch())["momentum"]
    after = weights(model.encoder)
    for name, found in model.target_encoder.state_dict().items():
        torch.testing.assert_close(found, momentum * target[name] + (1 - momentum) * after[name], rtol=1e-6, atol=1e-8)


def test_no_weight_decay_on_biases_and_vectors_but_on_mask_tokens(model, train_config):
    trainer = Trainer(model, train_config)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["decayed"] for p in group["params"]}
    for name, parameter in [*model.encoder.named_parameters(), *model.predictor.named_parameters()]:
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and "bias" not in name), name
    assert id(model.predictor.mask_tokens) in decayed
    listed = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(listed) == sum(p.requires_grad for p in model.parameters())


def test_clipping_begins_at_clip_after_step(model, batch):
    config = TrainConfig(
        total_steps=4, warmup_steps=0, clip_after_step=2, clip_grad=1e-3, precision="fp32", device="cpu"
    )
    trainer = Trainer(model, config)
    moment = []
    for _ in range(4):
        before = trainer.optimizer.state[model.predictor.predictor_proj.weight].get("exp_avg", torch.zeros(()))
        before = before.clone()
        trainer.step(*batch())
        after = trainer.optimizer.state[model.predictor.predictor_proj.weight]["exp_avg"]
        moment.append(float(((after - 0.9 * before) / 0.1).norm()))  # the gradient that AdamW saw
    assert min(moment[:2]) > 1e-3 >= max(moment[2:])


def test_accumulated_gradients_are_those_of_the_whole_batch(model, batch):
    states = []
    start = weights(model)
    for parts in (1, 3):
        model.load_state_dict(start)
        config = TrainConfig(
            total_steps=4, warmup_steps=0, precision="fp32", device="cpu", batch_size=5, accumulation_steps=parts
        )
        trainer = Trainer(model, config)
        numbers = trainer.step(*batch(clips=5))
        states.append(
            (numbers, {n: trainer.optimizer.state[p]["exp_avg"].clone() for n, p in model.encoder.named_parameters()})
        )
    (whole, moments), (split, split_moments) = states
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert split["grad_norm_encoder"] == pytest.approx(whole["grad_norm_encoder"], rel=1e-5)
    for name, moment in moments.items():
        torch.testing.assert_close(split_moments[name], moment, rtol=1e-4, atol=1e-8)


def test_activation_checkpointing_changes_nothing(model, train_config, batch):
    start = weights(model)
    Trainer(model, train_config).step(*batch())
    plain = weights(model)
    model.load_state_dict(start)
    Trainer(model, TrainConfig(**{**train_config.to_dict(), "activation_checkpointing": True})).step(*batch())
    assert equal(weights(model), plain)


def test_bf16_trains_float32_weights(model, batch):
    config = TrainConfig(total_steps=20, warmup_steps=0, lr=2e-3, precision="bf16", device="cpu")
    trainer = Trainer(model, config)
    losses = [trainer.step(*batch())["loss"] for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_trainer_continues_bit_for_bit(model, train_config, batch, tmp_path, precision):
    train_config = TrainConfig(**{**train_config.to_dict(), "precision": precision})
    trainer = Trainer(model, train_config)
    for seed in range(3):
        trainer.step(*batch(seed))
    trainer.save(tmp_path / "saved")
    torch.rand(1)
    expected = [trainer.step(*batch(seed), monitors=True) for seed in range(3, 6)]
    expected_draw = torch.rand(3)
    resumed = Trainer.resume(tmp_path / "saved")
    torch.rand(1)
    assert resumed.config == train_config
    assert [resumed.step(*batch(seed), monitors=True) for seed in range(3, 6)] == expected
    assert torch.equal(torch.rand(3), expected_draw)
    assert equal(weights(resumed.model), weights(model))


def test_checkpoint_before_the_first_step_can_be_resumed(model, train_config, batch, tmp_path):
    trainer = Trainer(model, train_config)
    trainer.save(tmp_path)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step(*batch()) == trainer.step(*batch())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_step_is_refused_and_changes_nothing(model, train_config, batch, tmp_path, bad):
    trainer = Trainer(model, train_config)
    trainer.step(*batch(0))
    video, masks = batch(1)
    video = video.float() / 255
    video[2, 0, 1, 3, 4] = bad
    before, moments = weights(model), {p: dict(s) for p, s in trainer.optimizer.state.items()}
    with pytest.raises(NonFiniteError, match=r"Step 1 is not finite .loss nan") as caught:
        trainer.step(video, masks)
    assert "encoder.patch_embed.proj.weight" in caught.value.parameters
    assert equal(weights(model), before)
    assert all(
        torch.equal(torch.as_tensor(s[k]), torch.as_tensor(moments[p][k]))
        for p, s in trainer.optimizer.state.items()
        for k in s
    )
    assert trainer.steps_done == 1
    bundle = save_bundle(tmp_path / "bundle", trainer, video, masks, caught.value, [{"path": "a.mp4"}])
    with pytest.raises(NonFiniteError, match="Step 1 is not finite"):
        Trainer.resume(bundle / "checkpoint").step(*load_batch(bundle))
    assert math.isfinite(trainer.step(*batch(1))["loss"])


def test_masks_of_another_number_of_clips_are_refused(model, train_config, batch):
    video, _ = batch()
    with pytest.raises(ValueError, match="masks must be for the 4 clips of video, got masks for 3"):
        Trainer(model, train_config).step(video, batch(clips=3)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "train.precision must be 'bf16' or 'fp32', got 'fp16'"),
        ({"clip_grad": -1.0}, "train.clip_grad must be positive or null, got -1.0"),
        ({"batch_size": 0}, "train.batch_size must be at least 1 clip, got 0"),
        ({"accumulation_steps": 5}, r"train.accumulation_steps must be between 1 and batch_size \(4\), got 5"),
        ({"steps": 13}, r"train.steps must be between 1 and total_steps \(12\), or null, got 13"),
        ({"betas": (0.9, 1.0)}, r"train.betas must be two in \[0, 1\)"),
        ({"warmup_steps": 13}, "warmup_steps must be within"),
        ({"momentum": (0.9, 1.1)}, "momentum must be two numbers"),
    ],
)
def test_values_out_of_range_name_their_field(train_config, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**train_config.to_dict(), **changes})


def test_unknown_device_is_an_error(model, train_config):
    with pytest.raises(ValueError, match=r"train.device must be 'auto' or a torch device, got 'gpu'"):
        Trainer(model, TrainConfig(**{**train_config.to_dict(), "device": "gpu"}))
