"""On a GPU: the results of the CPU under every backend, no wait for the device anywhere in a step, no compilation for a
new mask, and offsets beyond 2^31 elements."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import (
    EMA,
    AdamWEMA,
    TokenIndices,
    backend,
    gather_tokens,
    masked_l1_loss,
    predictor_tokens,
    scatter_tokens,
    tubelet_embed,
    varlen_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
L, D = 16, 32


class Step(torch.nn.Module):
    """Every differentiable operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, 3, 2, 4, 4) / 10)
        self.bias = torch.nn.Parameter(torch.randn(D))
        self.mask_tokens = torch.nn.Parameter(torch.randn(2, D))
        self.register_buffer("pos", torch.randn(L, D))

    def attend(self, x, sets):
        q = x.unflatten(1, (2, D // 2))
        return x + varlen_attention(q, q * 0.5, q + 1, sets.cu_seqlens, sets.lengths).flatten(1)

    def forward(self, video, context, target, kind, features):
        norm = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
        x = self.attend(tubelet_embed(video, self.weight, self.bias, self.pos, context, **norm), context)
        tokens, packed = predictor_tokens(x, self.mask_tokens, self.pos, context, target, kind)
        tokens = scatter_tokens(self.attend(tokens, packed), packed, L, fill=self.bias)
        return masked_l1_loss(gather_tokens(tokens, target), features, target)


def inputs(make_sets, context=(5, 9, 3, 3), target=(2, 4, 8, 1), seed=0):
    context = make_sets(context, L, (0, 1, 0, 1), seed=seed)
    target = make_sets(target, L, (0, 1, 0, 1), seed=seed + 1, duplicates=True)
    video = torch.randint(0, 256, (2, 3, 2, 16, 16), dtype=torch.uint8)
    return video, context, target, torch.tensor([0, 0, 1, 1]), torch.randn(2, L, D)


def test_equals_the_cpu(make_sets, serving):
    arguments, step = inputs(make_sets), Step()
    with backend("reference"):
        expected = step(*arguments)
        gradients = torch.autograd.grad(expected, list(step.parameters()))
    step.to("cuda")
    for _ in range(2):
        loss = step(*(argument.to("cuda") for argument in arguments))
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
        for ours, plain in zip(torch.autograd.grad(loss, list(step.parameters())), gradients, strict=True):
            torch.testing.assert_close(ours.cpu(), plain, rtol=1e-3, atol=1e-4)


def test_no_wait_for_the_device(make_sets, serving):
    step, shadow = Step().cuda(), Step().cuda()
    arguments = [argument.to("cuda") for argument in inputs(make_sets)]
    optimizer = AdamWEMA(step.parameters(), list(shadow.parameters()), copies=torch.bfloat16)
    ema = EMA(shadow, step)

    def once():
        step(*arguments).backward()
        optimizer.step()
        ema.update(0.99)

    once()  # constants go to the device the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((70, 300), (5,), (1,))]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, [torch.randn_like(param) for param in params]


@pytest.mark.parametrize("name", ["cuda", "reference"])
def test_a_cuda_graph_replays_the_optimizer_step(name):
    """Gradients, factor, learning rate, momentum and what was found are read anew, steps are counted on the device."""
    (params, shadows), (others, averages) = network(), network()
    options = {"weight_decay": 0.1, "capturable": True, "copies": torch.bfloat16}
    lr, momentum = torch.tensor(0.0, device="cuda"), torch.tensor(1.0, dtype=torch.float64, device="cuda")
    factor, found_inf = torch.tensor(1.0, device="cuda"), torch.tensor(0.0, device="cuda")
    with backend(name):
        optimizer, other = AdamWEMA(params, shadows, **options), AdamWEMA(others, averages, **options)
        for its in (optimizer, other):
            its.param_groups[0]["lr"], its.momentum = lr, momentum
            its.step(grad_factor=factor, found_inf=found_inf)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step(grad_factor=factor, found_inf=found_inf)
        for number in range(1, 6):
            lr.fill_(0.01 * number)
            momentum.fill_(0.9 + 0.01 * number)
            factor.fill_(1 / number)
            found_inf.fill_(float(number == 3))
            for param, twin in zip(params, others, strict=True):
                param.grad.normal_()
                twin.grad.copy_(param.grad)
            graph.replay()
            other.step(grad_factor=factor, found_inf=found_inf)
    assert [optimizer.state[param]["step"].item() for param in params] == [5.0] * 3
    for ours, plain in zip((*params, *shadows), (*others, *averages), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(c, p.detach().bfloat16()) for c, p in zip(optimizer.param_copies, params, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["cuda", "reference"])
def test_the_optimizer_step_is_that_of_pytorch_and_waits_for_nothing(name, capturable):
    (params, shadows), (others, averages) = network(), network()
    numbers = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer, adamw = AdamWEMA(params, shadows, **numbers, capturable=capturable), torch.optim.AdamW(others, **numbers)
    factor = torch.tensor(0.5, device="cuda")
    with backend(name):
        optimizer.step(grad_factor=factor)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(1, 4):
                for param in params:
                    param.grad = torch.full_like(param, float(number))  # at another address each time
                optimizer.step(grad_factor=factor)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for number in range(4):
        for param in others:
            param.grad = param.grad * 0.5 if number == 0 else torch.full_like(param, 0.5 * number)
        adamw.step()
        for average, param in zip(averages, others, strict=True):
            average.lerp_(param.detach(), 1 - optimizer.momentum)
    for ours, plain in zip((*params, *shadows), (*others, *averages), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("name", ["cuda", "reference"])
def test_the_optimizer_step_on_two_gpus(name):
    (params, shadows), (others, averages) = network(), network()
    moved = [torch.nn.Parameter(param.detach().to(f"cuda:{place % 2}")) for place, param in enumerate(params)]
    for param, old in zip(moved, params, strict=True):
        param.grad = old.grad.to(param.device)
    shadows = [shadow.to(param.device) for shadow, param in zip(shadows, moved, strict=True)]
    with backend(name):
        AdamWEMA(moved, shadows).step(grad_factor=torch.tensor(0.5, device="cuda:0"))
        AdamWEMA(others, averages).step(grad_factor=torch.tensor(0.5, device="cuda:0"))
    for ours, plain in zip((*moved, *shadows), (*others, *averages), strict=True):
        assert torch.equal(ours.cpu(), plain.cpu())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_no_kernel_is_compiled_for_a_new_mask(make_sets, monkeypatch):
    from triton import knobs

    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(str(facts["key"])))
    step, random = Step().cuda(), torch.Generator().manual_seed(0)

    def once(number):
        lengths = [torch.randint(1, L + 1, (4,), generator=random).tolist() for _ in range(2)]
        step(*(argument.to("cuda") for argument in inputs(make_sets, *lengths, seed=number))).backward()

    with backend("triton"):
        once(0)
        assert compiled, "the hook must see the first compilation"
        compiled.clear()
        for number in range(1, 100):
            once(number)
    assert not compiled


BEYOND = 2**31  # elements: their offsets do not fit in 32 bits


def far_sets(clips, length, device):
    """The first and last tokens of the first and last clips."""
    sets = [torch.tensor([0, 1, length - 1]), torch.tensor([0, length - 2, length - 1])]
    return TokenIndices.from_sets(sets, clip=[0, clips - 1]).to(device)


def check_far_rows(clips, length, width, device):
    """gather, its adjoint, scatter and the loss on [clips, length, width], whose last rows lie beyond `BEYOND`."""
    sets = far_sets(clips, length, device)
    x = torch.zeros(clips, length, width, dtype=torch.bfloat16, device=device)
    clip, token = sets.clip.repeat_interleave(3), sets.indices
    values = torch.randn(sets.total, width, device=device).bfloat16()
    x[clip, token] = values
    x.requires_grad_()
    rows = gather_tokens(x, sets)
    assert torch.equal(rows, values)
    (grad,) = torch.autograd.grad(rows, x, values)
    assert torch.equal(grad[clip, token], values)
    assert grad.count_nonzero() == values.count_nonzero()
    del grad, rows
    features = x.detach()
    loss = masked_l1_loss(values, features, sets)
    expected = (values.double() - F.layer_norm(values.double(), (width,))).abs().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(scatter_tokens(values, sets, length), features)


def check_far_tubelets(clips, device):
    """The tokens of the last clip, whose pixels lie beyond `BEYOND`, equal those of that clip alone."""
    video = torch.zeros(clips, 3, 16, 224, 224, dtype=torch.uint8, device=device)
    video[-1] = torch.randint(0, 256, video.shape[1:], dtype=torch.uint8)
    weight = (torch.randn(16, 3, 2, 16, 16, device=device) / 40).requires_grad_()
    ids = torch.tensor([0, 700, 1567])
    grads, outs = [], []
    for clip, source in ((clips - 1, video), (0, video[-1:].clone())):
        sets = TokenIndices.from_sets([ids], clip=[clip]).to(device)
        outs.append(tubelet_embed(source, weight, indices=sets))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), weight)[0])
    assert outs[0].abs().min() > 0
    assert torch.equal(*outs)
    assert torch.equal(*grads)


def memory_for(gibibytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"{gibibytes} GiB of free GPU memory are needed, there are {free >> 30}")


def test_rows_beyond_32_bits(serving):
    memory_for(60)
    clips, length, width = 3, 1 << 20, 1024
    assert (clips - 1) * length * width >= BEYOND
    check_far_rows(clips, length, width, "cuda")


def test_pixels_beyond_32_bits(serving):
    memory_for(8)
    clips = 900
    assert (clips - 1) * 3 * 16 * 224 * 224 >= BEYOND
    check_far_tubelets(clips, "cuda")
