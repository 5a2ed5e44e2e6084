"""A step that does not wait for its numbers, as on a GPU: the same training, and a refusal that comes later in vain."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa import VJEPA
from vjepa.train import NonFiniteError, TrainConfig, Trainer
from vjepa.train.numbers import StepNumbers

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "unique", "_unique2"}


@pytest.fixture(params=["fp32", "bf16"])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return TrainConfig(
        total_steps=12, warmup_steps=0, batch_size=4, precision=request.param, device="cpu", clip_grad=0.05
    )


def deferred(model: VJEPA, config: TrainConfig) -> Trainer:
    trainer = Trainer(model, config)
    trainer._waits = False
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for number, (_, moments) in enumerate(trainer.optimizer.state.items()):
        tensors |= {f"{number}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    return tensors


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def poisoned(batch, seed):
    video, masks = batch(seed)
    video = video.float() / 255
    video[2, 0, 1, 3, 4] = math.inf
    return video, masks


def test_training_is_the_same(model, config, batch):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    later = deferred(model, config)
    numbers = [later.step(*batch(seed)) for seed in range(3)]
    later.settle()
    found = state(later)
    model.load_state_dict(start)
    at_once = Trainer(model, config)
    assert numbers == [at_once.step(*batch(seed)) for seed in range(3)]
    assert equal(found, state(at_once))


def test_what_follows_a_refused_step_changes_nothing(model, config, batch):
    trainer = deferred(model, config)
    trainer.step(*batch(0))
    trainer.settle()
    before, generator = state(trainer), torch.get_rng_state()
    refused = trainer.step(*poisoned(batch, 1))  # tells nothing yet
    assert trainer.steps_done == 2
    with pytest.raises(NonFiniteError, match=r"Step 1 is not finite .loss nan") as caught:
        trainer.step(*batch(2))
    assert "encoder.patch_embed.proj.weight" in caught.value.parameters
    assert trainer.steps_done == 1
    assert equal(state(trainer), before)
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(NonFiniteError, match="Step 1"):
        refused["loss"]
    # and it goes on as if neither had been
    after = trainer.step(*batch(3))
    assert math.isfinite(after["loss"])
    assert trainer.steps_done == 2
    assert not equal(state(trainer), before)


@pytest.mark.parametrize("ask", [lambda t, n: t.settle(), lambda t, n: n["loss"], lambda t, n: t.save("unused")])
def test_whoever_asks_first_is_told(model, config, batch, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = deferred(model, config)
    before = state(trainer)
    numbers = trainer.step(*poisoned(batch, 0))
    assert numbers["lr"] > 0  # known without the device
    with pytest.raises(NonFiniteError, match="Step 0"):
        ask(trainer, numbers)
    assert trainer.steps_done == 0
    trainer.settle()  # it is told once
    assert {n: t for n, t in state(trainer).items() if n in before}.keys() == before.keys()
    assert all(torch.equal(state(trainer)[name], tensor) for name, tensor in before.items())
    assert not list(tmp_path.iterdir())


def test_numbers_are_a_dict_of_floats_that_reads_when_asked():
    calls = []
    numbers = StepNumbers({"lr": 0.5}, {"loss": torch.tensor(2.0), "norm": torch.tensor(3.0)}, calls.append)
    assert numbers["lr"] == 0.5
    assert list(numbers) == ["loss", "lr", "norm"]
    assert not calls
    expected = {"loss": 2.0, "lr": 0.5, "norm": 3.0}
    assert numbers["norm"] == 3.0
    assert calls == [{"loss": 2.0, "norm": 3.0}]
    for read in (
        dict,
        lambda n: {**n},
        lambda n: json.loads(json.dumps(n)),
        lambda n: dict(n.items()),
        lambda n: dict(zip(n, n.values(), strict=True)),
        lambda n: n.copy(),
        lambda n: {name: n.get(name) for name in n},
        lambda n: eval(repr(n)),
        lambda n: n | {},
        lambda n: {} | n,
        lambda n: {name: n.pop(name) for name in list(n)},
    ):
        fresh = StepNumbers({"lr": 0.5}, {"loss": torch.tensor(2.0), "norm": torch.tensor(3.0)}, lambda numbers: None)
        assert read(fresh) == expected
    assert calls == [{"loss": 2.0, "norm": 3.0}]  # once


class Waits(TorchDispatchMode):
    """Names the operators called that read a tensor's values on the host.

    What the model computes is floating; integers are masks, which the host knows; a momentum (float64) is
    read on a CPU only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITS and args[0].dtype in (torch.float32, torch.bfloat16):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_operator_of_a_step_reads_a_value_on_the_host(model, config, batch):
    trainer = deferred(model, config)
    trainer.step(*batch(0))
    video, masks = batch(1)
    with Waits() as waits:
        trainer.step(video, masks)
    assert waits.found == []
    with Waits() as waits:
        float(torch.ones(1).sum())
    assert waits.found  # the count counts


def test_after_a_refusal_that_was_read_training_goes_on(model, config, batch):
    trainer = deferred(model, config)
    numbers = trainer.step(*poisoned(batch, 0))
    with torch.no_grad(), pytest.raises(NonFiniteError, match="Step 0"):
        numbers["loss"]
    assert math.isfinite(trainer.step(*batch(1))["loss"])
    trainer.settle()
    assert trainer.steps_done == 1


def test_a_checkpoint_that_is_loaded_ends_what_was_awaited(model, config, batch, tmp_path):
    trainer = deferred(model, config)
    trainer.step(*batch(0))
    trainer.save(tmp_path / "saved")
    trainer.step(*poisoned(batch, 1))
    trainer.load(tmp_path / "saved")
    assert math.isfinite(trainer.step(*batch(2))["loss"])
    trainer.settle()
    assert trainer.steps_done == 2


def test_numbers_are_saved_as_a_plain_dict(model, config, batch, tmp_path):
    numbers = Trainer(model, config).step(*batch(0))
    torch.save(numbers, tmp_path / "numbers.pt")
    assert torch.load(tmp_path / "numbers.pt") == dict(numbers)


def test_gradients_that_others_left_are_no_part_of_a_step(model, config, batch):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = Trainer(model, config).step(*batch(0))
    model.load_state_dict(start)
    trainer = Trainer(model, config)
    model(*batch(3)).backward()
    assert trainer.step(*batch(0)) == expected
