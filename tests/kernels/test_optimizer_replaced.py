"""What others replaced between steps of AdamWEMA, or loaded: refused where it no longer fits, before anything is written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vjepa.kernels import AdamWEMA, _dispatch, backend

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


def stepped(**options):
    """An optimizer that has done a step, its parameters and its shadows."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    shadows = [torch.randn(4, 3) for _ in range(2)]
    optimizer = AdamWEMA(params, shadows, copies=torch.bfloat16, **options)
    for param in params:
        param.grad = torch.randn(4, 3)
    optimizer.step()
    return optimizer, params, shadows


def everything(optimizer, params, shadows):
    state = [copy.deepcopy(optimizer.state[param]) for param in params]
    tensors = (*params, *shadows, *optimizer.param_copies, *optimizer.shadow_copies)
    return [tensor.detach().clone() for tensor in tensors], state


def larger(optimizer, params, shadows):
    params[1].data = torch.randn(4, 5)
    params[1].grad = torch.randn(4, 5)


def larger_with_its_state(optimizer, params, shadows):
    larger(optimizer, params, shadows)
    optimizer.state[params[1]].update({name: torch.zeros(4, 5) for name in ("exp_avg", "exp_avg_sq")})


def larger_with_its_shadow(optimizer, params, shadows):
    larger_with_its_state(optimizer, params, shadows)
    shadows[1].data = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (
            lambda o, p, s: setattr(p[1], "data", p[1].data.double()),
            ValueError,
            r"gradients must be like their parameter \(4, 3\) float64 on cpu, got \(4, 3\) float32",
        ),
        (larger, ValueError, r"exp_avgs\[1\] must be like params \(4, 5\) float32 on cpu, got \(4, 3\)"),
        (larger_with_its_state, ValueError, r"shadows\[1\] must be like params \(4, 5\)"),
        (larger_with_its_shadow, ValueError, r"param_copies\[1\] must be like params \(4, 5\)"),
        (lambda o, p, s: s[1].set_(torch.zeros(2)), ValueError, r"shadows\[1\] must be like params"),
        (
            lambda o, p, s: o.state[p[1]].update(exp_avg=torch.zeros(2)),
            ValueError,
            r"exp_avgs\[1\] must be like params \(4, 3\) float32 on cpu, got \(2,\)",
        ),
        (
            lambda o, p, s: o.state[p[1]].update(exp_avg_sq=torch.zeros(4, 3, dtype=torch.float64)),
            ValueError,
            r"exp_avg_sqs\[1\] must be like params \(4, 3\) float32 on cpu, got \(4, 3\) float64",
        ),
        (
            lambda o, p, s: o.state[p[1]].update(exp_avg=torch.zeros(4, 3, device="meta")),
            ValueError,
            r"exp_avgs\[1\] must be like params .* got \(4, 3\) float32 on meta",
        ),
        (
            lambda o, p, s: o.state[p[1]].update(step=torch.tensor(1)),
            ValueError,
            r"steps\[1\] must be a float32 scalar on the CPU or on cpu, got \(\) int64",
        ),
        (lambda o, p, s: o.state[p[1]].update(step=1), TypeError, r"steps\[1\] must be a float32 scalar, got int 1"),
    ],
)
def test_what_does_not_fit_any_more(spoil, error, sentence):
    optimizer, params, shadows = stepped()
    spoil(optimizer, params, shadows)
    tensors, state = everything(optimizer, params, shadows)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    after, after_state = everything(optimizer, params, shadows)
    assert all(map(torch.equal, tensors, after))
    for old, new in zip(state, after_state, strict=True):
        assert old.keys() == new.keys()
        assert all(
            old[name] is new[name]
            or not torch.is_tensor(old[name])
            or old[name].is_meta
            or torch.equal(old[name], new[name])
            for name in old
        )


def test_the_state_of_another_model():
    """As many parameters, of other shapes: PyTorch loads it."""
    optimizer, params, shadows = stepped()
    others = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    adamw = torch.optim.AdamW(others)
    for param in others:
        param.grad = torch.ones(2, 3)
    adamw.step()
    optimizer.load_state_dict(adamw.state_dict())
    tensors, _ = everything(optimizer, params, shadows)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must be like params \(4, 3\) float32 on cpu, got \(2, 3\)"):
        optimizer.step()
    assert all(map(torch.equal, tensors, everything(optimizer, params, shadows)[0]))


def test_a_view_with_gaps_at_the_same_address():
    """As many elements, neither before nor after contiguous: what lies between them is not the parameter's."""
    whole = torch.randn(4, 8)
    param = nn.Parameter(whole.view(-1)[:16].view(4, 4).t())
    optimizer = AdamWEMA([param], [torch.zeros(4, 4).t()])
    param.grad = torch.ones(4, 4).t()
    with backend("auto"):
        optimizer.step()
        param.data = whole[:, ::2]
        between, before = whole[:, 1::2].clone(), param.detach().clone()
        optimizer.step()
    assert torch.equal(whole[:, 1::2], between)
    assert not any(map(torch.equal, param.detach(), before))


def test_moments_of_fewer_elements_at_the_same_address():
    optimizer, params, _shadows = stepped()
    moment = optimizer.state[params[0]]["exp_avg"]
    rest = moment.flatten()[6:].clone()
    whole = moment.data
    moment.data = whole[:2]
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must be like params .* got \(2, 3\)"):
        optimizer.step()
    assert torch.equal(whole.flatten()[6:], rest)


def test_a_first_step_that_is_refused_begins_no_state(each_backend):
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = AdamWEMA(params, [None, None])
    params[0].grad, params[1].grad = torch.ones(4, 3), params[0].detach()
    with pytest.raises(ValueError, match="must have memory of its own"):
        optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.ones(4, 3)
    optimizer.step()
    assert [float(its["step"]) for its in optimizer.state.values()] == [1.0, 1.0]


def sgd_state(params):
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    sgd.step()
    return sgd.state_dict()


def without_a_moment(params):
    adamw = torch.optim.AdamW(params)
    adamw.step()
    state_dict = copy.deepcopy(adamw.state_dict())
    del state_dict["state"][1]["exp_avg_sq"]
    return state_dict


def out_of_range(params):
    state_dict = torch.optim.AdamW(params).state_dict()
    state_dict["param_groups"][0]["betas"] = (0.9, 1.0)
    return state_dict


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (sgd_state, "state_dict must be that of AdamW, got a group without betas"),
        (without_a_moment, "state_dict must be that of AdamW, got a state of parameter 1 without exp_avg_sq"),
        (lambda params: {"state": {}}, "state_dict must be that of AdamW, got one without param_groups"),
        (out_of_range, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_state_that_is_not_of_adamw(make, sentence):
    optimizer, _params, _shadows = stepped()
    others = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    for param in others:
        param.grad = torch.ones(4, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(make(others))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for old, new in zip(before["state"].values(), after["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_what_was_made_in_inference_mode(each_backend):
    """Shadows, moments and counts; written in inference mode and outside."""
    results = []
    for inference in (True, False):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 3))
        param.grad = torch.ones(4, 3)
        with torch.inference_mode(inference):
            shadow = torch.randn(4, 3)
            optimizer = AdamWEMA([param], [shadow], copies=torch.bfloat16, momentum=0.5)
            optimizer.step()
        optimizer.step()
        version = param._version
        with torch.inference_mode(inference):
            optimizer.step()
        assert param._version > version
        results.append(
            [param, shadow, *optimizer.param_copies, *optimizer.shadow_copies, *optimizer.state[param].values()]
        )
    assert all(map(torch.equal, *results))
