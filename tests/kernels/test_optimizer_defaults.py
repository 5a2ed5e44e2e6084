"""AdamWEMA and EMA where torch's default dtype and device are others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vjepa.kernels import EMA, AdamWEMA, _dispatch, backend, ema_update_

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


@pytest.fixture(params=["float64", "meta"])
def other_default(request):
    def choose(on):
        if request.param == "float64":
            torch.set_default_dtype(torch.float64 if on else torch.float32)
        else:
            torch.set_default_device("meta" if on else None)

    yield choose
    choose(False)


def test_adamw_ema(other_default):
    """The second parameter lacks a shadow, the third a gradient."""
    results = []
    for other in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        shadows = [torch.randn(4, 3), None, torch.randn(4, 3)]
        for param in params[:2]:
            param.grad = torch.randn(4, 3)
        numbers = {"grad_factor": [torch.tensor(0.5)], "found_inf": torch.tensor(0.0)}
        other_default(other)
        optimizer = AdamWEMA(params, shadows, momentum=0.9, copies=torch.bfloat16)
        for _ in range(2):
            optimizer.step(**numbers)
        optimizer.momentum = 0.5
        optimizer.step()
        optimizer.refresh_copies()
        other_default(False)
        state = [tensor for its in optimizer.state.values() for tensor in its.values()]
        results.append([*params, shadows[0], shadows[2], *optimizer.param_copies, *state])
    for plain, others in zip(*results, strict=True):
        assert plain.dtype == others.dtype
        assert plain.device == others.device
        assert torch.equal(plain, others)


def test_ema(other_default):
    results = []
    for other in (False, True):
        torch.manual_seed(0)
        target, source = nn.Linear(3, 4), nn.Linear(3, 4)
        momentum = torch.tensor(0.25)
        other_default(other)
        average = EMA(target, source, copies=torch.float16)
        average.update(0.5)
        average.update(momentum)
        ema_update_(target.parameters(), source.parameters(), 0.75)
        other_default(False)
        results.append([*target.parameters(), *average.copies.values()])
    assert all(map(torch.equal, *results))
