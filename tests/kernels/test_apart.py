"""Whether tensors share memory, against sets of their bytes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from vjepa.kernels import backend, ema_update_
from vjepa.kernels._apart import Reach, check_apart

DRAWS = 2000


def drawn(generator, memory):
    """A view of some bytes of `memory`, of any strides."""
    typed = memory.view(generator.choice([torch.float32, torch.bfloat16]))
    while True:
        shape = [generator.randint(0 if generator.random() < 0.1 else 1, 3) for _ in range(generator.randint(0, 3))]
        strides = [generator.choice([0, 1, 1, 2, 3, 4, 6]) for _ in shape]
        start = generator.randint(0, 6)
        if start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) < typed.numel():
            return typed.as_strided(shape, strides, start)


def bytes_of(tensor):
    """The bytes of each element."""
    for place in itertools.product(*map(range, tensor.shape)):
        steps = sum(index * stride for index, stride in zip(place, tensor.stride(), strict=True))
        start = tensor.data_ptr() + steps * tensor.element_size()
        yield range(start, start + tensor.element_size())


def test_against_sets_of_bytes():
    generator, memory, outcomes = random.Random(0), torch.zeros(96, dtype=torch.uint8), []
    for _ in range(DRAWS):
        written, read = ([drawn(generator, memory) for _ in range(generator.randint(0, 2))] for _ in range(2))
        own = [set(itertools.chain(*bytes_of(tensor))) for tensor in (*written, *read)]
        shared = any(
            (first < len(written) or second < len(written)) and own[first] & own[second]
            for first, second in itertools.combinations(range(len(own)), 2)
        )
        for tensor, its in zip(written, own, strict=False):
            shared = shared or tensor.numel() * tensor.element_size() > len(its)
        outcomes.append(bool(shared))
        if shared:
            with pytest.raises(ValueError, match="must have memory"):
                check_apart({"written": written}, {"read": read})
        else:
            check_apart({"written": written}, {"read": read})
        reach = Reach(written)
        if reach.leaves(read):
            assert not set().union(*own[: len(written)]) & set().union(*own[len(written) :])
        outside = torch.zeros(4)
        assert reach.leaves([outside, outside[:0]])
    assert DRAWS // 4 < sum(outcomes) < 3 * DRAWS // 4


@pytest.mark.parametrize(
    ("targets", "sources", "sentence"),
    [
        (lambda w: [w[:, :2]], lambda w: [w[:, 1:3]], r"sources\[0\] must have memory of its own, .* targets\[0\]"),
        (lambda w: [w[:, :2]] * 2, lambda w: [torch.ones(3, 2)] * 2, r"targets\[1\] must have memory of its own"),
        (lambda w: [w[:, :2]], lambda w: [w.t()[:2].t()], "must have memory of its own"),
        (lambda w: [w[0]], lambda w: [w[0, :1].expand(4)], "must have memory of its own"),
        (
            lambda w: [w.as_strided((3, 3), (1, 1))],
            lambda w: [torch.ones(3, 3)],
            r"targets\[0\] must have memory for each of its elements, got strides \(1, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_views_with_gaps_that_share_elements(targets, sources, sentence, backend_name):
    whole = torch.arange(12.0).view(3, 4)
    with backend(backend_name), pytest.raises(ValueError, match=sentence):
        ema_update_(targets(whole), sources(whole), 0.5)
    assert torch.equal(whole, torch.arange(12.0).view(3, 4))
