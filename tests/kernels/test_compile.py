"""Under torch.compile(fullgraph=True): equal to eager, and lengths that change every step compile nothing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from vjepa.kernels import (
    TokenIndices,
    backend,
    ema_update_,
    gather_tokens,
    masked_l1_loss,
    predictor_tokens,
    scatter_tokens,
    tubelet_embed,
    varlen_attention,
)

L, D = 16, 8
STEPS = [((2, 3), (5, 3)), ((7, 2), (4, 6)), ((1, 1), (3, 2)), ((6, 9), (1, 8)), ((16, 4), (2, 16)), ((3, 3), (3, 3))]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Step(torch.nn.Module):
    """Every operator once, as a training step strings them together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, 3, 2, 4, 4))
        self.bias = torch.nn.Parameter(torch.randn(D))
        self.mask_tokens = torch.nn.Parameter(torch.randn(2, D))
        self.qkv = torch.nn.Parameter(torch.randn(3, D))
        self.register_buffer("pos", torch.randn(L, D))

    def attend(self, x, sets):
        q, k, v = (x[:, None] * self.qkv).unflatten(2, (2, D // 2)).unbind(1)
        return x + varlen_attention(q, k, v, sets.cu_seqlens, sets.lengths).flatten(1)

    def forward(self, video, context, target, kind, features):
        norm = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        x = self.attend(tubelet_embed(video, self.weight, self.bias, self.pos, context, **norm), context)
        tokens, packed = predictor_tokens(x, self.mask_tokens, self.pos, context, target, kind)
        tokens = scatter_tokens(self.attend(tokens, packed), packed, L, fill=self.bias)
        return masked_l1_loss(gather_tokens(tokens, target), features, target)


def batch(lengths, make_sets, seed):
    context = make_sets(lengths[0], L, seed=seed, tensor_lengths=True)
    target = make_sets(lengths[1], L, seed=seed + 100, tensor_lengths=True)
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (2, 3, 2, 16, 16), dtype=torch.uint8, generator=generator)
    return video, context, target, torch.tensor([0, 1]), torch.randn(2, L, D, generator=generator)


def value_and_gradients(module, function, arguments):
    module.zero_grad()
    loss = function(*arguments)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


def test_equals_eager_with_lengths_that_change_every_step(make_sets):
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number, lengths in enumerate(STEPS):
        arguments = batch(lengths, make_sets, number)
        # the second step makes the numbers of tokens symbolic, after that nothing compiles again
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            ours = value_and_gradients(step, compiled, arguments)
        for our, eager in zip(ours, value_and_gradients(step, step, arguments), strict=True):
            torch.testing.assert_close(our, eager, rtol=1e-6, atol=1e-7)


def test_100_masks_compile_nothing_after_the_first_two(make_sets):
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for number in range(102):
        lengths = torch.randint(1, L + 1, (2, 2), generator=generator).tolist()
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            loss, *gradients = value_and_gradients(step, compiled, batch(lengths, make_sets, number))
        assert loss.isfinite() and len(gradients) == 4


def test_a_number_that_is_compiled_in_is_seen(make_sets):
    """The condition of the test above can fail: on lengths given as a tuple torch.compile does specialise."""

    def lengths_as_constants(x, sets):
        return gather_tokens(x, sets) * len(sets.lengths) * sets.lengths[0]

    compiled = torch.compile(lengths_as_constants, fullgraph=True, dynamic=False, backend="eager")
    x = torch.zeros(2, L, D)
    compiled(x, make_sets((2, 3), L))
    with pytest.raises(torch._dynamo.exc.RecompileError), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x, make_sets((4, 3), L))


def test_backend_is_chosen_when_compiled_code_runs(make_sets):
    step, counter = Step(), CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    arguments = batch(STEPS[0], make_sets, 0)
    with backend("reference"):
        first = compiled(*arguments)
    with backend("sdpa"):
        second = compiled(*arguments)
    assert counter.frame_count == 1
    torch.testing.assert_close(first, second)


def test_bad_values_raise_from_compiled_code(make_sets):
    compiled = torch.compile(lambda x, sets: gather_tokens(x, sets) * 2, fullgraph=True, backend="aot_eager")
    good, bad = make_sets((3,), L), TokenIndices.from_sets([torch.tensor([0, 1, L])])
    compiled(torch.zeros(1, L, D), good)
    with pytest.raises(ValueError, match="indices must be between 0 and 15"):
        compiled(torch.zeros(1, L, D), bad)


def test_inductor_with_dynamic_sizes(make_sets):
    def function(x, sets):
        q = gather_tokens(x, sets).unflatten(1, (2, 4))
        return varlen_attention(q, q * 2, q + 1, sets.cu_seqlens, sets.lengths).sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for number, lengths in enumerate(((3, 6), (8, 2), (6, 6))):  # 8 tokens would be taken for D
        x = torch.randn(2, L, D, requires_grad=True)
        sets = make_sets(lengths, L, seed=number, tensor_lengths=True)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            (ours,) = torch.autograd.grad(compiled(x, sets), x)
        (eager,) = torch.autograd.grad(function(x, sets), x)
        torch.testing.assert_close(ours, eager)


def test_in_place_update_with_a_momentum_that_changes():
    compiled = torch.compile(ema_update_, fullgraph=True, backend="aot_eager")
    targets, sources = [torch.randn(4), torch.randn(2, 3)], [torch.randn(4), torch.randn(2, 3)]
    for number, momentum in enumerate((0.9, 0.95, 0.96, 0.97)):
        expected = [t.lerp(s, 1 - momentum) for t, s in zip(targets, sources, strict=True)]
        with torch._dynamo.config.patch(error_on_recompile=number >= 1):
            compiled(targets, sources, torch.tensor(momentum))
        for ours, eager in zip(targets, expected, strict=True):
            torch.testing.assert_close(ours, eager)


def test_opcheck_refuses_a_wrong_fake():
    """opcheck, on which the other files rely, does see a fake that lies about the shape."""
    with torch.library._scoped_library("vjepa_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("vjepa_test::double", lambda x: x.new_empty(x.shape[0] + 1), lib=library)
        with pytest.raises(Exception, match="test_faketensor"):
            opcheck(torch.ops.vjepa_test.double.default, (torch.randn(3),), test_utils="test_faketensor")
