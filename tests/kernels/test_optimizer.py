"""AdamWEMA against torch.optim.AdamW followed by the average written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.library import opcheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from vjepa.kernels import AdamWEMA, _dispatch, backend

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]
SHAPES = ((4, 3), (5,), (2, 2, 2))
HYPER = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def clones(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def same(first, second):
    return all(map(torch.equal, first, second))


def assert_nearly(ours, plain, backend_name):
    """The same bits from the reference, which calls PyTorch's own AdamW; a few roundings apart from native code."""
    if backend_name == "reference":
        assert same(ours, plain)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with backend(request.param):
        yield request.param


def test_updates_as_adamw_and_then_averages(each_backend):
    ours, shadows = parameters(), parameters(1)
    plain, averages = clones(ours), [shadow.detach().clone() for shadow in shadows]
    optimizer, adamw = AdamWEMA(ours, shadows, **HYPER, momentum=0.9), torch.optim.AdamW(plain, **HYPER, fused=True)
    for step in range(4):
        optimizer.momentum = 0.9 + 0.02 * step
        train(optimizer, ours, [step])
        train(adamw, plain, [step])
        for average, param in zip(averages, plain, strict=True):
            average.lerp_(param.detach(), 1 - optimizer.momentum)  # of the weights after the step
    assert_nearly(ours, plain, each_backend)
    for shadow, average in zip(shadows, averages, strict=True):
        torch.testing.assert_close(shadow.detach(), average, rtol=1e-6, atol=1e-7)


def test_accuracy_against_the_equations(check_accuracy, each_backend):
    def equations(params, steps, dtype):
        b1, b2 = HYPER["betas"]
        params = [param.detach().to(dtype) for param in params]
        first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
        for step in range(steps):
            like = [nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for p in params]
            set_gradients(like, step)
            for p, a, q, zero in zip(params, first, second, like, strict=True):
                g = zero.grad.to(dtype)
                p *= 1 - HYPER["lr"] * HYPER["weight_decay"]
                a.copy_(b1 * a + (1 - b1) * g)
                q.copy_(b2 * q + (1 - b2) * g**2)
                root = (q / (1 - b2 ** (step + 1))).sqrt() + HYPER["eps"]
                p -= HYPER["lr"] * (a / (1 - b1 ** (step + 1))) / root
        return params

    ours = parameters()
    plain, exact = equations(ours, 5, torch.float32), equations(ours, 5, torch.float64)
    train(AdamWEMA(ours, [None] * 3, **HYPER), ours, range(5))
    for param, in_float32, truth in zip(ours, plain, exact, strict=True):
        check_accuracy(param.detach(), in_float32, truth)


def test_groups_have_their_own_numbers(each_backend):
    ours, shadows = parameters(), parameters(1)
    plain = clones(ours)

    def groups(params):
        return [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "lr": 1e-3}]

    optimizer, adamw = AdamWEMA(groups(ours), shadows, **HYPER), torch.optim.AdamW(groups(plain), **HYPER, fused=True)
    train(optimizer, ours, range(2))
    optimizer.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.5
    train(optimizer, ours, [2])
    train(adamw, plain, range(2, 2))
    adamw.param_groups[0]["lr"] = HYPER["lr"]
    train(adamw, plain, range(2))
    adamw.param_groups[0]["lr"] = 0.5
    train(adamw, plain, [2])
    assert_nearly(ours, plain, each_backend)


def test_some_parameters_have_no_shadow_or_no_gradient(each_backend):
    ours, (first, _, third) = parameters(), parameters(1)
    start, third_start = clones(ours), third.detach().clone()
    optimizer = AdamWEMA(ours, [first, None, third], **HYPER, momentum=0.5)
    set_gradients(ours, 0)
    ours[2].grad = None
    optimizer.step()
    assert not torch.equal(ours[1], start[1])
    assert torch.equal(ours[2], start[2])
    assert ours[2] not in optimizer.state
    torch.testing.assert_close(third.detach(), (third_start + ours[2].detach()) / 2)  # the shadow still follows


def test_shadows_follow_parameters_that_do_not_learn(each_backend):
    ours, shadows = parameters(), parameters(1)
    expected = [
        shadow.detach().lerp(param.detach(), 0.5).lerp(param.detach(), 0.5)
        for shadow, param in zip(shadows, ours, strict=True)
    ]
    optimizer = AdamWEMA(ours, shadows, lr=0.0, momentum=0.5)
    for _ in range(2):
        optimizer.step()
    for shadow, average in zip(shadows, expected, strict=True):
        torch.testing.assert_close(shadow.detach(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float16])
def test_copies(copies, each_backend):
    ours, shadows = parameters(), [*parameters(1)[:2], None]
    optimizer = AdamWEMA(ours, shadows, copies=copies)

    def check():
        assert same(optimizer.param_copies, [param.detach().to(copies) for param in ours])
        assert same(optimizer.shadow_copies[:2], [shadow.detach().to(copies) for shadow in shadows[:2]])
        assert optimizer.shadow_copies[2] is None

    check()
    set_gradients(ours, 0)
    ours[0].grad = None
    optimizer.step()
    check()
    with torch.no_grad():
        ours[1].zero_()
        shadows[0].zero_()
    optimizer.refresh_copies()
    check()
    assert AdamWEMA(ours, shadows).param_copies == []


def test_copies_of_parameters_that_have_their_dtype_already():
    ours = parameters(dtype=torch.bfloat16)
    optimizer = AdamWEMA(ours, parameters(1), lr=0.1, copies=torch.bfloat16)
    set_gradients(ours, 0)
    optimizer.step()
    assert same(optimizer.param_copies, ours)
    assert not any(one.data_ptr() == other.data_ptr() for one, other in zip(optimizer.param_copies, ours, strict=True))


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("fused", [True, None])
def test_state_dict_is_that_of_adamw(direction, fused, each_backend):
    ours = parameters()
    plain = clones(ours)
    optimizer = AdamWEMA(ours, parameters(1), **HYPER)
    adamw = torch.optim.AdamW(plain, lr=1.0, fused=fused)
    if direction == "to torch":
        train(optimizer, ours, range(3))
        with torch.no_grad():
            for mine, theirs in zip(ours, plain, strict=True):
                theirs.copy_(mine)
        adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        adamw = torch.optim.AdamW(plain, **HYPER, fused=fused)
        train(adamw, plain, range(3))
        with torch.no_grad():
            for mine, theirs in zip(ours, plain, strict=True):
                mine.copy_(theirs)
        optimizer = AdamWEMA(ours, parameters(1), lr=1.0)
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert optimizer.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == HYPER["lr"]
    assert set(optimizer.state_dict()["param_groups"][0]) == set(adamw.state_dict()["param_groups"][0])
    train(optimizer, ours, range(3, 6))
    train(adamw, plain, range(3, 6))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
        assert float(optimizer.state[mine]["step"]) == 6


def test_counts_of_steps_of_any_kind_are_loaded(each_backend):
    """Old checkpoints have Python numbers, and no keys that came later."""
    results = []
    for make in (lambda step: step, int, lambda step: step.long()):
        ours = parameters()
        optimizer = AdamWEMA(ours, parameters(1), **HYPER)
        train(optimizer, ours, range(2))
        state_dict = copy.deepcopy(optimizer.state_dict())
        for state in state_dict["state"].values():
            state["step"] = make(state["step"])
        for name in (
            "amsgrad",
            "maximize",
            "foreach",
            "fused",
            "capturable",
            "differentiable",
            "decoupled_weight_decay",
        ):
            del state_dict["param_groups"][0][name]
        optimizer.load_state_dict(state_dict)
        train(optimizer, ours, [2])
        assert [state["step"].item() for state in optimizer.state.values()] == [3.0] * 3
        results.append(ours)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_resumes_bit_identically_through_its_own_state_dict(each_backend):
    straight, shadows = parameters(), parameters(1)
    train(AdamWEMA(straight, shadows, **HYPER), straight, range(4))
    broken, other_shadows = parameters(), parameters(1)
    first = AdamWEMA(broken, other_shadows, **HYPER)
    train(first, broken, range(2))
    second = AdamWEMA(broken, other_shadows, lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, broken, range(2, 4))
    assert same(straight, broken)
    assert same(shadows, other_shadows)


def test_copies_and_pickles_whole():
    ours = parameters()
    optimizer = AdamWEMA(ours, parameters(1), **HYPER, momentum=0.7, copies=torch.bfloat16)
    train(optimizer, ours, range(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.momentum == 0.7
        own = twin.param_groups[0]["params"]
        train(twin, own, [2])
        assert same(twin.param_copies, [param.detach().bfloat16() for param in own])
        assert not torch.equal(own[0], ours[0])


def test_works_with_schedulers_and_closures():
    ours = parameters()
    optimizer = AdamWEMA(ours, parameters(1), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in ours)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach())]
    scheduler.step()
    losses.append(float(optimizer.step(closure).detach()))
    assert losses[1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_two_hundred_steps_of_training_stay_together(each_backend):
    """A small network on a fixed task: weights, averages and losses as with PyTorch's AdamW and an average beside it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    inputs, targets = torch.randn(32, 8), torch.randn(32, 4)
    other, shadow, average = (copy.deepcopy(network) for _ in range(3))
    optimizer = AdamWEMA(network.parameters(), shadow.parameters(), lr=1e-3, weight_decay=0.05, momentum=0.99)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for step in range(200):
        lr = 1e-3 * min(1.0, (step + 1) / 20)
        losses.append([])
        for net, stepper in ((network, optimizer), (other, adamw)):
            stepper.param_groups[0]["lr"] = lr
            stepper.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            loss.backward()
            stepper.step()
            losses[-1].append(float(loss.detach()))
        with torch.no_grad():
            for mean, param in zip(average.parameters(), other.parameters(), strict=True):
                mean.lerp_(param, 0.01)
    assert losses[-1][0] < 0.9 * losses[0][0]
    ours, theirs = torch.tensor(losses, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for net, plain in ((network, other), (shadow, average)):
        for param, expected in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-3, atol=1e-4)


def test_native_code_serves_what_it_can_and_plain_pytorch_the_rest(each_backend):
    """Float64 and views with gaps go to the reference, unless the native library was asked for by name."""
    ours = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), nn.Parameter(torch.randn(3, 8)[:, ::2])]
    for param in ours:
        optimizer = AdamWEMA([param], [param.detach().clone()])
        param.grad = torch.ones_like(param)
        if each_backend == "cpu":
            with pytest.raises(RuntimeError, match=r"the backend cpu cannot serve adamw_ema_ on cpu: it (needs|walks)"):
                optimizer.step()
            continue
        optimizer.step()


def sparse(params):
    params[2].grad = torch.zeros(params[2].shape).to_sparse()


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda optimizer, params: sparse(params), TypeError, "params must have dense gradients, got a sparse one"),
        (lambda o, p: o.param_groups[1].update(lr=-1.0), ValueError, "lr must be at least 0 and below inf, got -1.0"),
        (lambda o, p: o.param_groups[1].update(lr=float("nan")), ValueError, "lr must be at least 0 .*, got nan"),
        (
            lambda o, p: o.param_groups[1].update(betas=(0.9, 1.0)),
            ValueError,
            r"betas\[1\] must be .* below 1, got 1.0",
        ),
        (lambda o, p: o.param_groups[1].update(weight_decay="x"), TypeError, "weight_decay must be a number"),
        (lambda o, p: o.param_groups[1].update(amsgrad=True), ValueError, "params must have amsgrad=False"),
    ],
)
def test_a_bad_input_changes_nothing(spoil, error, sentence):
    ours, shadows = parameters(), parameters(1)
    before, shadows_before = clones(ours), clones(shadows)
    optimizer = AdamWEMA([{"params": ours[:2]}, {"params": ours[2:]}], shadows)
    set_gradients(ours, 0)
    spoil(optimizer, ours)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    assert same(ours, before)
    assert same(shadows, shadows_before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"shadows": [None, *parameters(1, torch.bfloat16)[:2]]},
            TypeError,
            r"shadows\[1\] must be float32 or float64",
        ),
        ({"shadows": parameters(1)[:2]}, ValueError, "shadows must have 3 entries like params, got 2"),
        ({"shadows": parameters(1, torch.bfloat16)}, TypeError, r"shadows\[0\] must be float32 or float64"),
        ({"shadows": parameters(1)[::-1]}, ValueError, r"params\[0\] must be \(2, 2, 2\) float32 on cpu like shadows"),
        ({"shadows": None}, TypeError, "shadows must be a list of tensors or None, got NoneType"),
        ({"shadows": [1, None, None]}, TypeError, "shadows must be tensors or None, got int 1"),
        ({"momentum": -0.1}, ValueError, "momentum must be between 0 and 1, got -0.1"),
        ({"copies": torch.float32}, TypeError, "copies must be torch.bfloat16, torch.float16 or None"),
        ({"lr": -1}, ValueError, "lr must be at least 0"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0"),
    ],
)
def test_refuses(change, error, sentence):
    with pytest.raises(error, match=sentence):
        AdamWEMA(**{"params": parameters(), "shadows": parameters(1), **change})


def test_refuses_a_momentum_set_later_and_foreign_states():
    ours = parameters()
    optimizer = AdamWEMA(ours, parameters(1))
    with pytest.raises(ValueError, match="momentum must be between 0 and 1, got 2"):
        optimizer.momentum = 2
    assert optimizer.momentum == 0.998
    adamw = torch.optim.AdamW(clones(ours), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=False"):
        optimizer.load_state_dict(adamw.state_dict())


def test_opcheck(each_backend):
    params, shadows = ([p.detach() for p in parameters(seed)] for seed in (0, 1))
    moments = [torch.rand_like(p) for p in params], [torch.rand_like(p) for p in params]
    steps, copies = [torch.tensor(2.0) for _ in params], [p.bfloat16() for p in params]
    count = len(params)
    numbers = ([1, count - 1], [1e-3, 0.9, 0.99, 1e-8, 0.1] * 2, torch.tensor(0.99, dtype=torch.float64))
    factors, found_inf = [torch.tensor(0.5), torch.tensor(1.0)], torch.tensor(0.0)
    for extra, scalars in (
        ((shadows, copies, [p.bfloat16() for p in shadows]), ([], [], None)),
        (([], [], []), ([torch.tensor(1e-3)] * 2, factors, found_inf)),
    ):
        arguments = (params, [torch.rand_like(p) for p in params], *moments, steps, *extra, *numbers, *scalars)
        opcheck(torch.ops.vjepa.adamw_ema_.default, arguments)


def test_shards_are_updated_without_communication(each_backend):
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        plain, average = nn.Parameter(torch.randn(2, 3)), torch.randn(2, 3)
        param, shadow, grad = (
            DTensor.from_local(x.detach().clone(), mesh, [Shard(0)]) for x in (plain, average, torch.ones(2, 3))
        )
        param = nn.Parameter(param)
        param.grad, plain.grad = grad, torch.ones(2, 3)
        optimizer = AdamWEMA([param], [shadow], copies=torch.bfloat16)
        torch.optim.AdamW([plain], fused=True).step()
        with CommDebugMode() as communication:
            optimizer.step()
        assert communication.get_total_counts() == 0
        assert_nearly([param.to_local()], [plain], each_backend)
        torch.testing.assert_close(shadow.to_local(), average.lerp(plain.detach(), 0.002))
        assert torch.equal(optimizer.param_copies[0], param.to_local().detach().bfloat16())
        assert isinstance(optimizer.state[param]["exp_avg"], DTensor)
    finally:
        dist.destroy_process_group()
