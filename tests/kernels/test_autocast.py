"""Under torch.autocast the operators keep to the dtypes they are given: results do not change by one bit."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import backend, masked_l1_loss, predictor_tokens, tubelet_embed, varlen_attention

LENGTHS = (3, 5)
OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)


def embed(x, make_sets):
    video = x.reshape(1, 1, 4, 8, 8)
    return tubelet_embed(video, x[:64].reshape(4, 1, 2, 2, 4), x[:4])


def attend(x, make_sets):
    q = x[: 8 * 8].reshape(8, 2, 4)
    return varlen_attention(q, q + 1, q * 2, OFFSETS, LENGTHS)


def predict(x, make_sets):
    sets = make_sets(LENGTHS, 8)
    return predictor_tokens(x[:32].reshape(8, 4), x[:8].reshape(2, 4), x[:32].reshape(8, 4), sets, sets, OFFSETS[:2])[0]


def loss(x, make_sets):
    sets = make_sets(LENGTHS, 8, (0, 1))
    return masked_l1_loss(x[:32].reshape(8, 4), x[:64].reshape(2, 8, 4), sets)


@pytest.mark.parametrize("function", [embed, attend, predict, loss])
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_results_do_not_change(make_sets, function, name):
    x = torch.randn(256, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), backend(name):
            out = function(x, make_sets)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    assert all(map(torch.equal, *results))
