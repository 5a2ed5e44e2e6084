"""AdamWEMA and EMA on FSDP2's shards, in two processes over gloo, against PyTorch on whole tensors in one.

Shards are uneven and one is empty. The processes are those of shards.py, started once for all backends.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from vjepa.kernels import AdamWEMA, _dispatch, backend

SCRIPT = Path(__file__).with_name("shards.py")
CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]
TURNS = range(8)  # unsharded runs in float32, whose rounding differs because the rows come in another order

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


@pytest.fixture(scope="module")
def shards() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("vjepa_tests_shards", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote, by backend."""
    folder = tmp_path_factory.mktemp("shards")
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank), *BACKENDS],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(params=BACKENDS)
def ranks(request: pytest.FixtureRequest, of_ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each process wrote of one backend."""
    return [of_rank[request.param] for of_rank in of_ranks]


@pytest.fixture(scope="module")
def unsharded(shards):
    """Trains without shards: torch's AdamW, and the average written out where it is in force."""

    @cache
    def train(dtype: torch.dtype, averaging: range, turned: int = 0) -> dict[str, dict[str, Tensor]]:
        model, target = (shards.network().to(dtype) for _ in range(2))
        optimizer = shards.adamw(model)
        for step in range(shards.STEPS):
            optimizer.zero_grad()
            (sum(shards.loss_of(model, step, rank, turned) for rank in range(2)) / 2).backward()
            optimizer.step()
            for average, param in zip(target.parameters(), model.parameters(), strict=True):
                if step in averaging:
                    average.data.lerp_(param.data, 1 - shards.momentum_at(step))
        return {**shards.gathered(model, optimizer), "shadow": shards.gathered(target)["param"]}

    return train


def largest_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of any tensor, as a share of the tensor's largest value."""
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in exact.items()}
    return float(
        torch.stack([(found[name] - truth).abs().max() / truth.abs().max() for name, truth in exact.items()]).max()
    )


def test_the_network_is_sharded_unevenly(ranks):
    rows = [[rank["rows"][name] for name in ("first.weight", "second.bias", "scale")] for rank in ranks]
    assert rows == [[3, 2, 1], [2, 1, 0]]


@pytest.mark.parametrize(
    ("run", "averaging"),
    [
        ("straight", range(20)),
        ("resumed", range(20)),
        ("resumed from a whole", range(20)),
        ("to adamw", range(10)),
        ("from adamw", range(10, 20)),
        ("from a whole of adamw", range(10, 20)),
    ],
)
def test_trains_as_whole_tensors_do(unsharded, ranks, run, averaging):
    """The error against float64 is at most twice the largest of unsharded runs in float32, or two roundings."""
    exact = unsharded(torch.float64, averaging)
    others = [unsharded(torch.float32, averaging, turned) for turned in TURNS]
    rounding = torch.finfo(torch.float32).eps
    for kind, truth in exact.items():
        allowed = 2 * max(rounding, *(largest_error(other[kind], truth) for other in others))
        for rank in ranks:
            assert rank["runs"][run].keys() == exact.keys()
            assert largest_error(rank["runs"][run][kind], truth) <= allowed, kind


@pytest.mark.parametrize("run", ["resumed", "resumed from a whole"])
def test_resumes_bit_identically_through_the_state_of_all_processes(ranks, run):
    for rank in ranks:
        for kind, by_name in rank["runs"]["straight"].items():
            for name, tensor in by_name.items():
                assert torch.equal(tensor, rank["runs"][run][kind][name]), (kind, name)


def test_a_step_does_not_communicate(ranks):
    for rank in ranks:
        in_passes, in_steps = zip(*rank["counts"], strict=True)
        assert len(in_steps) == 20
        assert all(in_passes), "weights and gradients are exchanged, which the counter sees"
        assert not any(in_steps)


def test_the_average_alone_does_not_communicate_either(shards, ranks, check_accuracy):
    whole = [shards.network(seed).get_parameter for seed in range(2)]
    for rank in ranks:
        assert rank["ema"]["count"] == 0
        for name, ours in rank["ema"]["average"].items():
            plain, source = (parameter(name).detach().clone() for parameter in whole)
            exact = plain.double()
            for step in range(20):
                plain.lerp_(source, 1 - shards.momentum_at(step))
                exact.lerp_(source.double(), 1 - shards.momentum_at(step))
            check_accuracy(ours, plain, exact)


def test_copies_are_shards_too(ranks):
    for rank in ranks:
        assert len(rank["copied"]) == 2 * len(rank["ema"]["copied"]) == 10
        for tensor, copy in (*rank["copied"], *rank["ema"]["copied"]):
            assert torch.equal(copy, tensor.bfloat16())


def test_other_shards_are_refused(ranks):
    """By columns, whole on every process, and no shards at all."""
    ours = "shadows must be sharded like params, got another placement"
    other = "source_module must be sharded like target_module, got another placement of weight"
    for rank in ranks:
        assert rank["refusals"] == {"AdamWEMA": [ours] * 3, "EMA": [other] * 3}


@pytest.fixture
def mesh():
    """A mesh of two processes of which only this one exists: whatever communicates goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placement", "grad_placement", "rows", "grad_shape"),
    [
        (Shard(0), Replicate(), 2, (4, 4)),
        (Shard(0), Shard(1), 2, (4, 2)),
        (Replicate(), Partial(), 4, (4, 4)),
    ],
)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_gradients_of_other_shards_are_refused(mesh, placement, grad_placement, rows, grad_shape, backend_name):
    """Shards of other elements, even as many of them, and sums that are not added up yet."""
    param, shadow = (DTensor.from_local(torch.ones(rows, 4), mesh, [placement]) for _ in range(2))
    param = nn.Parameter(param)
    param.grad = DTensor.from_local(torch.ones(grad_shape), mesh, [grad_placement])
    optimizer = AdamWEMA([param], [shadow])
    with (
        backend(backend_name),
        pytest.raises(ValueError, match=r"gradients must be sharded like their parameter .* got another placement"),
    ):
        optimizer.step()
    assert torch.equal(param.to_local(), torch.ones(rows, 4))
    assert not optimizer.state


def test_a_factor_may_be_whole_on_every_process_but_no_part_of_a_sum(mesh):
    """As torch.nn.utils.get_total_norm returns them for sharded gradients."""
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(2, 4))
    param.grad, plain.grad = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)]), torch.ones(2, 4)
    optimizer = AdamWEMA([param], [None])
    with pytest.raises(ValueError, match=r"grad_factor must be .*whole on every process"):
        optimizer.step(grad_factor=DTensor.from_local(torch.tensor(0.5), mesh, [Partial()]))
    assert not optimizer.state
    optimizer.step(grad_factor=DTensor.from_local(torch.tensor(0.5), mesh, [Replicate()]))
    AdamWEMA([plain], [None]).step(grad_factor=torch.tensor(0.5))
    assert torch.equal(param.to_local(), plain)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_setting_up_the_state_moves_no_average(shards, backend_name):
    """torch.distributed.checkpoint does so by a step with lr 0, before it saves or loads the state of a new optimizer."""
    model, target, before = shards.network(0), shards.network(1), shards.network(1)
    with backend(backend_name):
        get_optimizer_state_dict(model, shards.adamw_ema(model, target))
    for shadow, expected in zip(target.parameters(), before.parameters(), strict=True):
        assert torch.equal(shadow, expected)
