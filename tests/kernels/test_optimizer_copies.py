"""A network that computes with the low-precision copies: the optimizer takes its gradients from them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from vjepa.kernels import AdamWEMA, backend

SHAPES = ((7, 5), (33,), (4, 3, 2))


def problem(copies: torch.dtype | None = torch.bfloat16) -> tuple[list[torch.Tensor], list[torch.Tensor], AdamWEMA]:
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    shadows = [param.detach().clone() for param in params]
    return params, shadows, AdamWEMA(params, shadows, lr=0.01, copies=copies)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_gradients_of_copies_count_as_those_of_their_parameters(name, factor):
    ours, our_shadows, optimizer = problem()
    theirs, their_shadows, plain = problem()
    factor = None if factor is None else torch.tensor(factor)
    for step in range(3):
        for place, grad in enumerate(gradients(step)):
            if (place + step) % 3:  # now here, now there
                optimizer.param_copies[place].requires_grad_()
                optimizer.param_copies[place].grad = grad
            else:
                ours[place].grad = grad.float()
            theirs[place].grad = grad.float()
        with backend(name):
            optimizer.step(grad_factor=factor)
            plain.step(grad_factor=factor)
        optimizer.zero_grad()
        plain.zero_grad()
    assert all(map(torch.equal, [*ours, *our_shadows], [*theirs, *their_shadows]))
    assert all(map(torch.equal, optimizer.param_copies, plain.param_copies))
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(optimizer.state[one][key], plain.state[other][key]) for key in ("exp_avg", "exp_avg_sq"))


def test_autograd_through_copies():
    params, _, optimizer = problem()
    low = [copied.requires_grad_() for copied in optimizer.param_copies]
    before = [copied.detach().clone() for copied in low]
    sum((copied.float() ** 2).sum() for copied in low).backward()
    assert {copied.grad.dtype for copied in low} == {torch.bfloat16}
    assert all(param.grad is None for param in params)
    optimizer.step()
    assert all(torch.equal(copied, param.detach().bfloat16()) for copied, param in zip(low, params, strict=True))
    assert not any(map(torch.equal, low, before))
    optimizer.zero_grad(set_to_none=False)
    assert all(not copied.grad.any() for copied in low)
    optimizer.zero_grad()
    assert all(copied.grad is None for copied in low)


def test_a_gradient_in_both_places_is_refused_before_anything_moves():
    params, shadows, optimizer = problem()
    before = [tensor.detach().clone() for tensor in (*params, *shadows)]
    for param, copied in zip(params, optimizer.param_copies, strict=True):
        param.grad = torch.ones_like(param)
        copied.requires_grad_().grad = torch.ones_like(copied)
    with pytest.raises(ValueError, match=r"params must have a gradient or their copy has, got both for .7, 5."):
        optimizer.step()
    assert all(map(torch.equal, before, (*params, *shadows)))
    assert not optimizer.state


def test_copies_are_parameters_that_modules_can_hold():
    _, _, optimizer = problem()
    layer = torch.nn.Linear(5, 7, bias=False)
    layer.weight = optimizer.param_copies[0]
    assert layer.weight is optimizer.param_copies[0]
    assert not layer.weight.requires_grad
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert all(map(torch.equal, other.param_copies, optimizer.param_copies))
        assert all(type(copied) is torch.nn.Parameter for copied in (*other.param_copies, *other.shadow_copies))
