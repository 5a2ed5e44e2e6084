"""One of the processes of test_shards.py: trains a sharded network over gloo and writes down what became of it.

    python tests/kernels/shards.py FOLDER RANK BACKEND [BACKEND ...]

The processes meet through a file in FOLDER; each writes FOLDER/rank{RANK}.pt, a dictionary by backend. The test loads this
file as a module to train the same network unsharded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import AdamW, Optimizer

from vjepa.kernels import EMA, AdamWEMA, backend

WORLD = 2
ROWS = 8  # of a batch, for each process
STEPS, HALF = 20, 10  # where an optimizer takes over from another, it does so after half of the steps
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered by the first process,
FROM_WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # which hands it out again


class Network(nn.Module):
    """Of 5 and of 3 rows the first process has one more than the second, of one row the second has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs))) * self.scale


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def loss_of(model: nn.Module, step: int, rank: int, turned: int = 0) -> Tensor:
    """Mean squared error on one process's share of the step's batch, whose rows are turned round by so many."""
    generator = torch.Generator().manual_seed(WORLD * step + rank)
    dtype = next(model.parameters()).dtype
    inputs, wanted = (torch.randn(ROWS, width, generator=generator).to(dtype).roll(turned, 0) for width in (7, 3))
    return nn.functional.mse_loss(model(inputs), wanted)


def momentum_at(step: int) -> float:
    return 0.9 + 0.004 * step


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on the matrices of the linear layers alone."""
    named = dict(model.named_parameters())
    matrices = [param for name, param in named.items() if name.endswith("weight")]
    others = [param for name, param in named.items() if not name.endswith("weight")]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def grouped(model: nn.Module) -> list[Tensor]:
    return [param for group in groups(model) for param in group["params"]]


def adamw(model: nn.Module) -> AdamW:
    return AdamW(groups(model), **HYPER)


def adamw_ema(model: nn.Module, target: nn.Module) -> AdamWEMA:
    return AdamWEMA(groups(model), grouped(target), **HYPER, copies=torch.bfloat16)


def gathered(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, dict[str, Tensor]]:
    """Parameters and moments, whole, and step counts, by name."""
    found: dict[str, dict[str, Tensor]] = {"param": dict(model.named_parameters())}
    if optimizer is not None:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found[key] = {name: optimizer.state[param][key] for name, param in model.named_parameters()}
    return {
        key: {name: getattr(tensor, "full_tensor", tensor.clone)().detach() for name, tensor in named.items()}
        for key, named in found.items()
    }


# ------------------------------------------------------------------------------------------------ in each process


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> list[tuple[int, int]]:
    """How often each step communicated: in its passes through the network, and in the optimizer."""
    counts = []
    for step in steps:
        optimizer.zero_grad()
        with CommDebugMode() as in_passes:
            loss_of(model, step, dist.get_rank()).backward()
        if isinstance(optimizer, AdamWEMA):
            optimizer.momentum = momentum_at(step)
        with CommDebugMode() as in_step:
            optimizer.step()
        counts.append((in_passes.get_total_counts(), in_step.get_total_counts()))
    return counts


def copied(tensors: Iterable[Tensor], copies: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each of this process's shards beside its low-precision copy."""
    return [(tensor.to_local().detach().clone(), copy) for tensor, copy in zip(tensors, copies, strict=True)]


def straight(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """All steps with AdamWEMA."""
    model, target = make(), make()
    optimizer = adamw_ema(model, target)
    counts = train(model, optimizer, range(STEPS))
    copies = [*optimizer.param_copies, *optimizer.shadow_copies]
    return {
        "trained": {**gathered(model, optimizer), "shadow": gathered(target)["param"]},
        "counts": counts,
        "rows": {name: param.to_local().shape[0] for name, param in model.named_parameters()},
        "copied": copied([*grouped(model), *grouped(target)], copies),
    }


def handed_over(
    make: Callable[..., nn.Module],
    first: Callable[[nn.Module, nn.Module], Optimizer],
    second: Callable[[nn.Module, nn.Module], Optimizer],
    to_save: StateDictOptions | None = None,
    to_load: StateDictOptions | None = None,
) -> dict[str, Any]:
    """Half of the steps with one optimizer, the others with a second one on a second network, which take over the state."""
    old, old_target, new, new_target = make(), make(), make(1), make(1)
    optimizer, heir = first(old, old_target), second(new, new_target)
    train(old, optimizer, range(HALF))
    saved = get_optimizer_state_dict(old, optimizer, options=to_save)
    set_optimizer_state_dict(new, heir, saved, options=to_load)
    # The averages come after the state of the optimizer, because the function above makes a step with lr 0 to set that up.
    new.load_state_dict(old.state_dict())
    new_target.load_state_dict(old_target.state_dict())
    train(new, heir, range(HALF, STEPS))
    return {**gathered(new, heir), "shadow": gathered(new_target)["param"]}


def averaged(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """EMA of another network's weights, step after step."""
    target, source = make(), make(1)
    ema = EMA(target, source, copies=torch.bfloat16)
    with CommDebugMode() as communication:
        for step in range(STEPS):
            ema.update(momentum_at(step))
    return {
        "average": gathered(target)["param"],
        "count": communication.get_total_counts(),
        "copied": copied(map(target.get_parameter, ema.copies), ema.copies.values()),
    }


def refusals(mesh: DeviceMesh) -> dict[str, list[str]]:
    """What AdamWEMA and EMA say to averages that are not sharded as the weights are, by rows."""

    def linear(*placements: Placement) -> nn.Linear:
        layer = nn.Linear(4, 4, bias=False)
        if placements:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
        return layer

    source = linear(Shard(0))
    makers = {
        "AdamWEMA": lambda target: AdamWEMA(source.parameters(), target.parameters()),
        "EMA": lambda target: EMA(target, source),
    }
    found: dict[str, list[str]] = {name: [] for name in makers}
    for target in (linear(Shard(1)), linear(Replicate()), linear()):
        for name, make in makers.items():
            try:
                make(target)
            except ValueError as error:
                found[name].append(str(error))
    return found


def results(mesh: DeviceMesh) -> dict[str, Any]:
    def make(seed: int = 0) -> nn.Module:
        return fully_shard(network(seed), mesh=mesh)

    def plain(model: nn.Module, target: nn.Module) -> Optimizer:
        return adamw(model)

    once = straight(make)
    runs = {
        "straight": once.pop("trained"),
        "resumed": handed_over(make, adamw_ema, adamw_ema),
        "resumed from a whole": handed_over(make, adamw_ema, adamw_ema, WHOLE, FROM_WHOLE),
        "to adamw": handed_over(make, adamw_ema, plain),
        "from adamw": handed_over(make, plain, adamw_ema),
        "from a whole of adamw": handed_over(make, plain, adamw_ema, WHOLE, FROM_WHOLE),
    }
    return {"runs": runs, **once, "ema": averaged(make), "refusals": refusals(mesh)}


def main(folder: str, rank: str, *backends: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder).absolute() / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=int(rank), world_size=WORLD, timeout=timedelta(seconds=60)
    )
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name in backends:
        with backend(name):
            found[name] = results(mesh)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # PyTorch's tables of DTensors keep the group, whose threads may kill a process that ends as usual


if __name__ == "__main__":
    main(*sys.argv[1:])
