"""AdamWEMA prepares a step once, and again when anything about its tensors has changed."""

from __future__ import annotations

import copy
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vjepa.kernels import AdamWEMA, _adamw_step, _dispatch, backend, optimizer
from vjepa.kernels._tensor_lists import by_device

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]
SHAPES = ((4, 3), (5,), (2, 2, 2), (0,), ())
HYPER = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


@pytest.fixture
def prepared(monkeypatch):
    """One entry for each time that a step was prepared."""
    times = []

    class Counted(_adamw_step.Step):
        def __init__(self, lists):
            times.append(lists)
            super().__init__(lists)

    monkeypatch.setattr(optimizer, "Step", Counted)
    return times


class Pair:
    """The same parameters under AdamWEMA, and under torch's AdamW with the averages written out."""

    def __init__(self, params=None, momentum=0.75, **options):
        torch.manual_seed(0)
        self.ours = params or [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        self.shadows = [torch.randn_like(param) for param in self.ours]
        self.plain = [nn.Parameter(param.detach().clone()) for param in self.ours]
        self.averages = [shadow.clone() for shadow in self.shadows]
        self.optimizer = AdamWEMA(self.ours, self.shadows, **HYPER, momentum=momentum, **options)
        self.adamw = torch.optim.AdamW(self.plain, **HYPER)

    def step(self, lacking=(), like=torch.randn_like):
        for place, (ours, plain) in enumerate(zip(self.ours, self.plain, strict=True)):
            ours.grad = None if place in lacking else like(ours)
            plain.grad = None if ours.grad is None else ours.grad.clone()
        self.optimizer.step()
        self.adamw.step()
        for average, plain in zip(self.averages, self.plain, strict=True):
            average.lerp_(plain.detach(), 1 - self.optimizer.momentum)

    def check(self):
        for ours, plain in zip((*self.ours, *self.shadows), (*self.plain, *self.averages), strict=True):
            torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-6)
        for ours, plain in zip(self.ours, self.plain, strict=True):
            state, other = self.optimizer.state.get(ours, {}), self.adamw.state.get(plain, {})
            assert set(state) == set(other)
            for name in state:
                torch.testing.assert_close(state[name], other[name], rtol=2e-6, atol=1e-6)


def test_once_for_many_steps_and_new_gradients(prepared):
    pair = Pair()
    for _ in range(4):
        pair.step()
    pair.check()
    assert len(prepared) == 1


def test_a_backend_asked_for_meanwhile_serves(prepared):
    pair = Pair()
    pair.step()
    with backend("auto"):
        pair.step()
        pair.step()
    pair.step()
    pair.check()
    assert len(prepared) == 2


def test_parameters_with_a_gradient_now_and_then(prepared):
    pair = Pair()
    for lacking in ((), (1, 2), (0, 1, 2, 3, 4), (1,), ()):
        pair.step(lacking)
        pair.check()
    assert len(prepared) == 5


def test_memory_given_to_a_parameter_or_a_shadow_by_others():
    pair = Pair()
    pair.step()
    pair.ours[0].data = pair.ours[0].data.clone()
    pair.shadows[1].data = pair.shadows[1].data.clone()
    pair.step()
    state = pair.optimizer.state[pair.ours[2]]
    state["exp_avg"] = state["exp_avg"].clone()
    pair.step()
    state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()
    state["step"] = state["step"].clone()
    pair.step()
    pair.check()


def test_a_state_loaded_meanwhile():
    pair = Pair()
    pair.step()
    pair.step()
    saved = copy.deepcopy(pair.optimizer.state_dict()), copy.deepcopy(pair.adamw.state_dict())
    pair.step()
    pair.optimizer.load_state_dict(saved[0])
    pair.adamw.load_state_dict(saved[1])
    pair.step()
    pair.check()


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_gradients_live_no_longer_than_their_step(first):
    pair = Pair()
    if not first:
        pair.step()
    pair.step()
    grads = [weakref.ref(param.grad) for param in pair.ours]
    pair.optimizer.zero_grad()
    assert all(grad() is None for grad in grads)


def test_groups_that_change(each_backend):
    pair = Pair(copies=torch.bfloat16)
    pair.step()
    late = [nn.Parameter(torch.randn(6, 2)) for _ in range(2)]
    late[1].data.copy_(late[0].data)
    pair.optimizer.add_param_group({"params": [late[0]], "lr": 0.5})
    pair.adamw.add_param_group({"params": [late[1]], "lr": 0.5})
    for param in late:
        param.grad = torch.ones_like(param)
    pair.step()
    pair.check()
    torch.testing.assert_close(*late, rtol=2e-6, atol=1e-6)
    frozen, average = pair.ours[0].detach().clone(), pair.shadows[0].clone()
    for its in (pair.optimizer, pair.adamw):
        its.param_groups[0]["params"] = its.param_groups[0]["params"][1:]
    pair.averages[0] = average  # the shadow of a parameter that is in no group stays as well
    pair.optimizer.step()
    assert torch.equal(pair.ours[0], frozen)
    assert torch.equal(pair.shadows[0], average)
    pair.optimizer.refresh_copies()
    assert all(
        torch.equal(c, p.detach().bfloat16()) for c, p in zip(pair.optimizer.param_copies, pair.ours, strict=True)
    )


def transposed(param):
    return torch.randn(tuple(reversed(param.shape))).permute(tuple(reversed(range(param.ndim))))


def test_dense_tensors_of_any_layout(each_backend):
    """Parameters in channels-last order and transposed ones are walked as they lie in memory."""
    params = [torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last), torch.randn(3, 4).t(), torch.randn(6)]
    pair = Pair([nn.Parameter(param) for param in params], copies=torch.bfloat16)
    for _ in range(3):
        pair.step()
    pair.check()
    assert all(param.stride() == tensor.stride() for param, tensor in zip(pair.ours, params, strict=True))
    assert all(
        torch.equal(c, p.detach().bfloat16()) for c, p in zip(pair.optimizer.param_copies, pair.ours, strict=True)
    )


def test_gradients_of_another_layout(each_backend):
    """Not walkable beside their parameters: the reference serves, unless another backend was asked for."""
    pair = Pair()
    pair.step()
    before = [param.detach().clone() for param in pair.ours]
    if each_backend == "reference":
        pair.step(like=transposed)
        pair.step()
        pair.check()
        return
    with pytest.raises(RuntimeError, match=r"it walks tensors as one run of memory, .* got grads\[0\] of shape"):
        pair.step(like=transposed)
    assert all(map(torch.equal, pair.ours, before))
    with backend("auto"):
        pair.step(like=transposed)
    pair.step()


def test_views_with_gaps(each_backend):
    whole = torch.randn(3, 8)
    pair = Pair([nn.Parameter(whole[:, ::2]), nn.Parameter(torch.randn(7)[1::3])])
    between = whole[:, 1::2].clone()
    pair.plain = [nn.Parameter(param.detach().clone()) for param in pair.ours]
    pair.adamw = torch.optim.AdamW(pair.plain, **HYPER)
    with backend("auto"):
        for _ in range(3):
            pair.step()
    pair.check()
    assert torch.equal(whole[:, 1::2], between)


def test_where_operators_are_traced(each_backend):
    """Under a mode that sees operators there is one, with the same result."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    pair, other = Pair(copies=torch.float16), Pair(copies=torch.float16)
    for lacking in ((), (1,), ()):
        torch.manual_seed(1)
        pair.step(lacking)
        torch.manual_seed(1)
        with Watch():
            other.step(lacking)
    assert seen.count("vjepa.adamw_ema_.default") == 3
    assert all(map(torch.equal, (*pair.ours, *pair.shadows), (*other.ours, *other.shadows)))
    assert all(map(torch.equal, pair.optimizer.param_copies, other.optimizer.param_copies))


class Wrapped(torch.Tensor):
    """Its elements are another tensor's, which only those find who go through operators."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        cls.seen.append(str(function))
        unwrapped = tree_map_only(Wrapped, lambda tensor: tensor.inner, (arguments, options or {}))
        result = function(*unwrapped[0], **unwrapped[1])
        return tree_map_only(torch.Tensor, Wrapped, result)


def test_tensors_that_wrap_others():
    pair = Pair([torch.randn(4, 3)])
    inner, shadow = pair.ours[0].clone(), pair.shadows[0].clone()
    param = nn.Parameter(Wrapped(inner))
    param.grad = Wrapped(torch.ones(4, 3))
    Wrapped.seen.clear()
    AdamWEMA([param], [Wrapped(shadow)], **HYPER, momentum=0.75).step()
    assert Wrapped.seen.count("vjepa.adamw_ema_.default") == 1
    pair.step(like=torch.ones_like)
    assert torch.equal(inner, pair.ours[0])
    assert torch.equal(shadow, pair.shadows[0])


def test_autocast_does_not_matter():
    pair, other = Pair(), Pair()
    torch.manual_seed(1)
    pair.step()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        other.step()
    assert all(map(torch.equal, (*pair.ours, *pair.shadows), (*other.ours, *other.shadows)))


def test_versions_of_what_is_written_go_up():
    pair = Pair(copies=torch.bfloat16)
    written = (*pair.ours[:3], *pair.shadows[:3], *pair.optimizer.param_copies[:3], *pair.optimizer.shadow_copies[:3])
    for _ in range(2):
        versions = [tensor._version for tensor in written]
        pair.step()
        assert all(tensor._version > version for tensor, version in zip(written, versions, strict=True))
    versions = [param._version for param in pair.ours[:2]]
    pair.step(lacking=(0,))
    assert pair.ours[0]._version == versions[0]  # what it had computed can still be differentiated
    assert pair.ours[1]._version > versions[1]


def halves(*lists):
    """Pretends that every other tensor lies on another device."""
    for device, places, whole in by_device(*lists):
        for start in (0, 1):
            yield device, places[start::2], tuple(tensors[start::2] for tensors in whole)


def test_parameters_of_several_devices(monkeypatch):
    monkeypatch.setattr(_adamw_step, "by_device", halves)
    pair = Pair()
    groups = [{"params": pair.ours[:2]}, {"params": pair.ours[2:], "lr": 0.5}]
    pair.optimizer = AdamWEMA(groups, pair.shadows, **HYPER, momentum=0.75)
    pair.adamw = torch.optim.AdamW([{"params": pair.plain[:2]}, {"params": pair.plain[2:], "lr": 0.5}], **HYPER)
    for lacking in ((), (1, 4), ()):
        pair.step(lacking)
    pair.check()


SHARING = r"must have memory of its own, got a tensor that shares it with"


@pytest.mark.parametrize("devices", [by_device, halves], ids=["one device", "two devices"])
@pytest.mark.parametrize("place", [0, 1])
def test_what_shares_memory_is_refused_and_nothing_is_written(monkeypatch, devices, place):
    monkeypatch.setattr(_adamw_step, "by_device", devices)

    def fresh():
        return [nn.Parameter(torch.randn(8)) for _ in range(2)], [torch.randn(8) for _ in range(2)]

    def own_shadow(params, shadows):
        shadows[place] = params[place].detach()

    def part_of_a_shadow(params, shadows):
        shadows[place] = torch.cat((params[place].detach(), torch.zeros(4)))
        params[place].data = shadows[place][:8]
        shadows[place] = shadows[place][4:]

    def own_gradient(params, shadows):
        params[place].grad = params[place].detach()

    for spoil in (own_shadow, part_of_a_shadow, own_gradient):
        params, shadows = fresh()
        for param in params:
            param.grad = torch.ones(8)
        spoil(params, shadows)
        before = [tensor.detach().clone() for tensor in (*params, *shadows)]
        with pytest.raises(ValueError, match=SHARING):
            AdamWEMA(params, shadows).step()
        assert all(map(torch.equal, (*params, *shadows), before))


def test_a_gradient_that_shares_memory_at_a_later_step():
    pair = Pair()
    pair.step()
    before = [tensor.detach().clone() for tensor in (*pair.ours, *pair.shadows)]
    first = pair.optimizer.state[pair.ours[1]]["exp_avg"]
    for shared in (pair.ours[1].detach(), pair.shadows[0].view(-1)[3:8], first):
        pair.ours[1].grad = shared
        with pytest.raises(ValueError, match=SHARING):
            pair.optimizer.step()
        assert all(map(torch.equal, (*pair.ours, *pair.shadows), before))
    assert pair.optimizer.state[pair.ours[0]]["step"] == 1


def test_a_shadow_without_memory_of_its_own_elements():
    param = nn.Parameter(torch.randn(4, 3))
    param.grad = torch.ones(4, 3)
    optimizer = AdamWEMA([param], [torch.zeros(3).expand(4, 3)])
    with backend("auto"), pytest.raises(ValueError, match=r"shadows\[0\] must have memory for each of its elements"):
        optimizer.step()
