"""The optimizer's parameters and moments by the name of the parameter, which outlives any change of their order."""

from __future__ import annotations

import os
from typing import Any

import torch

from vjepa.checkpoint import CheckpointError
from vjepa.model import VJEPA

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases and one-dimensional parameters (so it does to mask tokens)."""
    return "bias" not in name and parameter.ndim != 1


def parameter_groups(model: VJEPA) -> tuple[list[dict[str, Any]], list[torch.Tensor | None]]:
    """AdamW groups, decayed and not, of the parts encoder and predictor; and for each parameter its moving average or None.

    The averages are listed in the order of the groups: the target encoder's for a parameter of the encoder, None for
    one of the predictor.
    """
    averages = dict(model.target_encoder.named_parameters())
    groups: list[dict[str, Any]] = []
    shadows: list[torch.Tensor | None] = []
    for decayed in (True, False):
        for part, module in (("encoder", model.encoder), ("predictor", model.predictor)):
            chosen = {name: p for name, p in module.named_parameters() if is_decayed(name, p) == decayed}
            groups.append({"params": list(chosen.values()), "decayed": decayed, "part": part})
            shadows += [averages[name] if part == "encoder" else None for name in chosen]
    return groups, shadows


def moment_tensors(model: VJEPA, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors: step.<name>, exp_avg.<name>, exp_avg_sq.<name>; empty before the first step."""
    return {
        f"{moment}.{name}": torch.as_tensor(optimizer.state[parameter][moment])
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
        for moment in _MOMENTS
    }


def load_moments(
    model: VJEPA,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    source: str | os.PathLike[str],
) -> None:
    """The inverse of `moment_tensors`.

    Raises:
        CheckpointError: Names or shapes are not those of the parameters; lists them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {
        f"{moment}.{names[p]}": () if moment == "step" else tuple(p.shape) for p in ordered for moment in _MOMENTS
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found and found != expected:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{source} does not fit this architecture, {len(differing)} keys differ: {'; '.join(differing)}."
        )
    state = {}
    if found:
        state = {i: {moment: tensors[f"{moment}.{names[p]}"] for moment in _MOMENTS} for i, p in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
