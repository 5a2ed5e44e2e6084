"""What a step is told by tensors: found_inf, scales, learning rates and momentum, read when and where it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vjepa.kernels import AdamWEMA, _dispatch, backend
from vjepa.kernels._optimizer_numbers import check_capture

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]
HYPER = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


def network():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, [torch.randn_like(param) for param in params]


def test_after_an_infinite_gradient_only_the_averages_move():
    (params, shadows), (others, averages) = network(), network()
    optimizer = AdamWEMA(params, shadows, **HYPER, copies=torch.bfloat16)
    other = AdamWEMA(others, averages, **HYPER)
    for found in (0.0, 1.0, 3.0, 0.0):
        before = [tensor.detach().clone() for tensor in (*params, *shadows)]
        states = copy.deepcopy([optimizer.state[param] for param in params if param in optimizer.state])
        optimizer.step(found_inf=torch.tensor(found))
        if found:
            assert all(map(torch.equal, params, before))
            for state, its in zip(states, optimizer.state.values(), strict=True):
                assert all(torch.equal(state[name], its[name]) for name in state)
            for shadow, old, param in zip(shadows, before[2:], params, strict=True):
                torch.testing.assert_close(shadow, old.lerp(param.detach(), 1 - optimizer.momentum))
            assert all(map(torch.equal, optimizer.shadow_copies, (shadow.bfloat16() for shadow in shadows)))
        else:
            other.step()
            assert all(map(torch.equal, params, others))


@pytest.mark.parametrize(
    "factors", [torch.tensor(0.25), [torch.tensor(0.25)] * 2, [torch.tensor(3.0), None]], ids=["one", "two", "for one"]
)
def test_gradients_are_multiplied_by_a_factor(factors):
    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:]}]

    (params, _), (others, _) = network(), network()
    optimizer, adamw = AdamWEMA(groups(params), [None] * 2, **HYPER), torch.optim.AdamW(groups(others), **HYPER)
    given = [param.grad.clone() for param in params]
    of_groups = [factors] * 2 if isinstance(factors, torch.Tensor) else factors
    for param, factor in zip(others, of_groups, strict=True):
        param.grad *= 1.0 if factor is None else factor
    for _ in range(3):
        optimizer.step(grad_factor=factors)
        adamw.step()
    for ours, plain in zip(params, others, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, given, strict=True))


@pytest.mark.parametrize(
    ("factor", "error", "sentence"),
    [
        (0.5, TypeError, "grad_factor must be a 0-d float32 tensor or a list, got float 0.5"),
        ([0.5], TypeError, "grad_factor must be a 0-d float32 tensor, got float 0.5"),
        (torch.ones(1), TypeError, r"grad_factor must be a 0-d float32 tensor, got \(1,\) float32"),
        (torch.ones((), dtype=torch.float64), TypeError, "grad_factor must be a 0-d float32 tensor"),
        ([None, None], ValueError, "grad_factor must have 1 entries like groups, got 2"),
        (torch.ones((), device="meta"), ValueError, "grad_factor must be on the device of"),
    ],
)
def test_refuses_a_factor_and_changes_nothing(factor, error, sentence):
    params, shadows = network()
    before = [tensor.clone() for tensor in (*params, *shadows)]
    optimizer = AdamWEMA(params, shadows)
    with pytest.raises(error, match=sentence):
        optimizer.step(grad_factor=factor)
    assert all(map(torch.equal, (*params, *shadows), before))
    assert not optimizer.state


@pytest.mark.parametrize("found", [False, True])
def test_grad_scaler_leaves_the_scale_to_the_step(found):
    (params, shadows), (others, _) = network(), network()
    optimizer, adamw = AdamWEMA(params, shadows, **HYPER), torch.optim.AdamW(others, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert optimizer._step_supports_amp_scaling
    for param in params:
        param.grad *= 1024.0
    if found:
        params[0].grad[0, 0] = torch.inf
    before = [param.detach().clone() for param in params]
    scaler.scale(torch.zeros(()))  # makes the scale
    scaler.step(optimizer)
    scaler.update()
    if found:
        assert all(map(torch.equal, params, before))
        assert scaler.get_scale() == 512.0
    else:
        adamw.step()
        for ours, plain in zip(params, others, strict=True):
            torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6)
    assert not hasattr(optimizer, "found_inf")


def test_grad_scaler_after_it_has_unscaled():
    (params, shadows), (others, _) = network(), network()
    optimizer, adamw = AdamWEMA(params, shadows, **HYPER), torch.optim.AdamW(others, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for param in params:
        param.grad *= 8.0
    scaler.unscale_(optimizer)
    optimizer_norm = nn.utils.clip_grad_norm_(params, 1.0)
    assert optimizer_norm > 1
    nn.utils.clip_grad_norm_(others, 1.0)
    scaler.step(optimizer)
    adamw.step()
    for ours, plain in zip(params, others, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_factor_of_a_parameter_of_one_low_precision_number(capturable):
    param = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    other = nn.Parameter(param.detach().clone())
    param.grad, other.grad = torch.full_like(param, 0.5), torch.full_like(param, 0.25)
    with backend("auto"):
        AdamWEMA([param], [None], lr=0.25, capturable=capturable).step(grad_factor=torch.tensor(0.5))
        AdamWEMA([other], [None], lr=0.25, capturable=capturable).step()
    assert torch.equal(param, other)
    assert param < 1


def test_scale_and_factor_together():
    (params, shadows), (others, averages) = network(), network()
    optimizer, other = AdamWEMA(params, shadows, **HYPER), AdamWEMA(others, averages, **HYPER)
    optimizer.grad_scale = torch.tensor([4.0])  # as some scalers have it
    optimizer.step(grad_factor=torch.tensor(2.0))
    other.step(grad_factor=torch.tensor(0.5))
    assert all(map(torch.equal, params, others))


def test_capturable_keeps_its_counts_and_goes_to_and_fro(each_backend):
    (params, shadows), (others, averages) = network(), network()
    optimizer, other = AdamWEMA(params, shadows, **HYPER, capturable=True), AdamWEMA(others, averages, **HYPER)
    for its in (optimizer, other):
        its.step()
        its.step()
    assert all(map(torch.equal, params, others))
    assert optimizer.state_dict()["param_groups"][0]["capturable"] is True
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["capturable"] is False
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.param_groups[0]["capturable"] is True
    assert [state["step"].item() for state in optimizer.state.values()] == [2.0, 2.0]


def test_numbers_on_a_cpu_may_be_tensors():
    (params, shadows), (others, averages) = network(), network()
    optimizer, other = AdamWEMA(params, shadows, **HYPER), AdamWEMA(others, averages, **HYPER)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    optimizer.momentum = torch.tensor(0.5)
    other.param_groups[0]["lr"], other.momentum = 0.25, 0.5
    optimizer.step()
    other.step()
    assert all(map(torch.equal, (*params, *shadows), (*others, *averages)))


@pytest.mark.parametrize(
    ("step", "error", "sentence"),
    [
        (lambda o: o.step(found_inf=1.0), TypeError, "found_inf must be a 0-d float32 tensor, got float 1.0"),
        (lambda o: o.step(found_inf=torch.ones(1)), TypeError, r"found_inf must be a 0-d float32 tensor, got \(1,\)"),
        (
            lambda o: o.step(found_inf=torch.ones((), device="meta")),
            ValueError,
            r"found_inf must be on the device of params \(cpu\) or on the CPU, got \(\) float32 on meta",
        ),
        (
            lambda o: (o.param_groups[0].update(lr=torch.ones((), device="meta")), o.step()),
            TypeError,
            r"lr must be a number, got \(\) float32 on meta",
        ),
        (
            lambda o: (o.add_param_group({"params": [nn.Parameter(torch.ones(1))], "capturable": True}), o.step()),
            ValueError,
            "params must have one capturable for all groups",
        ),
    ],
)
def test_refuses(step, error, sentence):
    params, shadows = network()
    before = [param.detach().clone() for param in params]
    optimizer = AdamWEMA(params, shadows)
    with pytest.raises(error, match=sentence):
        step(optimizer)
    assert all(map(torch.equal, params, before))


def test_a_first_step_that_only_sets_up_the_state():
    """With lr 0 and gradients of zeros, as torch.distributed.checkpoint does; other first steps move the averages."""
    for lr, zero, moves in ((0.0, True, False), (0.0, False, True), (1e-3, True, True)):
        params, shadows = network()
        before = [shadow.clone() for shadow in shadows]
        optimizer = AdamWEMA(params, shadows, lr=lr)
        if zero:
            for param in params:
                param.grad.zero_()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(shadows, before, strict=True)) == moves
        if lr == 0.0 and zero:
            optimizer.step()  # the second is an ordinary one
            assert not any(map(torch.equal, shadows, before))


def test_a_scaler_leaves_its_scale_only_to_counts_that_lie_with_the_parameters():
    """Elsewhere the host counts, and would have to wait for what the scaler found."""
    for device, capturable, expected in (("cpu", False, True), ("meta", False, False), ("meta", True, True)):
        optimizer = AdamWEMA([nn.Parameter(torch.zeros(2, device=device))], [None], capturable=capturable)
        assert optimizer._step_supports_amp_scaling is expected


def test_a_graph_captures_no_step_that_counts_on_the_host(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    check_capture([{"capturable": False}], {cpu})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_capture([{"capturable": False}], {cpu})
    check_capture([{"capturable": True}], {cpu, cuda})
    with pytest.raises(ValueError, match="params must have capturable=True where a CUDA graph captures the step"):
        check_capture([{"capturable": False}], {cpu, cuda})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_capture([{"capturable": False}], {cuda})
