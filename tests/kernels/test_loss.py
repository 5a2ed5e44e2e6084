"""masked_l1_loss against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, masked_l1_loss

B, L, D = 3, 10, 7
LENGTHS, CLIP = (4, 1, 9, 2), (0, 1, 2, 0)


def formula(prediction, features, targets, eps=1e-5, weights=None):
    mean, var = features.mean(-1, keepdim=True), features.var(-1, unbiased=False, keepdim=True)
    normed = (features - mean) / torch.sqrt(var + eps)
    losses, start = [], 0
    for s, n in enumerate(targets.lengths):
        rows = slice(start, start + n)
        error = (prediction[rows] - normed[targets.clip[s], targets.indices[rows]]).abs().mean(1)
        share = torch.ones_like(error) if weights is None else weights[rows]
        losses.append((share * error).sum() / share.sum())
        start += n
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient(make_sets, dtypes, weighted):
    targets = make_sets(LENGTHS, L, CLIP, duplicates=True)
    prediction = torch.randn(16, D).to(dtypes[0]).requires_grad_()
    features = (3 * torch.randn(B, L, D) + 5).to(dtypes[1])
    weights = torch.rand(16) if weighted else None
    loss = masked_l1_loss(prediction, features, targets, weights=weights)
    assert loss.dtype == torch.float32
    leaf = prediction.detach().double().requires_grad_()
    exact = formula(leaf, features.double(), targets, weights=None if weights is None else weights.double())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    (ours,), (truth,) = torch.autograd.grad(3 * loss, prediction), torch.autograd.grad(3 * exact, leaf)
    assert ours.dtype == dtypes[0]
    torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(dtypes[0]).eps, atol=0)


def test_accuracy_in_float32(make_sets, check_accuracy):
    targets = make_sets(LENGTHS, L, CLIP)
    prediction, features = torch.randn(16, D), 10 + torch.randn(B, L, D)
    exact = formula(prediction.double(), features.double(), targets)
    check_accuracy(masked_l1_loss(prediction, features, targets), formula(prediction, features, targets), exact)


def test_eps_and_equal_weights(make_sets):
    targets = make_sets(LENGTHS, L, CLIP)
    prediction, features = torch.randn(16, D), torch.randn(B, L, D)
    exact = formula(prediction.double(), features.double(), targets, eps=0.7).float()
    torch.testing.assert_close(masked_l1_loss(prediction, features, targets, eps=0.7), exact)
    same = masked_l1_loss(prediction, features, targets, weights=torch.full((16,), 0.3))
    torch.testing.assert_close(same, masked_l1_loss(prediction, features, targets))


def test_each_set_counts_alike_whatever_its_length():
    targets = TokenIndices.from_sets([torch.tensor([0]), torch.arange(9)], clip=[0, 0])
    features = torch.zeros(1, L, D)  # layer norm of a constant is 0
    prediction = torch.cat([torch.full((1, D), 4.0), torch.full((9, D), 2.0)])
    assert masked_l1_loss(prediction, features, targets).item() == pytest.approx(3.0)


def test_only_the_prediction_gets_a_gradient(make_sets):
    targets = make_sets((2,), L)
    prediction, features, weights = (torch.rand(s).requires_grad_() for s in ((2, D), (1, L, D), (2,)))
    masked_l1_loss(prediction, features, targets, weights=weights).backward()
    assert prediction.grad is not None
    assert features.grad is None
    assert weights.grad is None


def test_gradient_is_zero_where_the_prediction_is_exact():
    prediction = torch.zeros(2, D, requires_grad=True)
    masked_l1_loss(prediction, torch.zeros(1, L, D), TokenIndices.from_sets([torch.tensor([1, 2])])).backward()
    assert not prediction.grad.any()


def test_only_the_named_rows_are_read(make_sets):
    targets = TokenIndices.from_sets([torch.tensor([1, 3])])
    features = torch.full((1, L, D), float("nan"))
    features[0, [1, 3]] = torch.randn(2, D)
    assert torch.isfinite(masked_l1_loss(torch.randn(2, D), features, targets))


def test_gradcheck(make_sets):
    targets = make_sets(LENGTHS, L, CLIP, duplicates=True)
    prediction = torch.randn(16, D, dtype=torch.float64, requires_grad=True)
    features, weights = torch.randn(B, L, D, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: masked_l1_loss(p, features, targets, weights=weights), (prediction,), fast_mode=True
    )


def test_deterministic_and_any_strides(make_sets):
    targets = make_sets(LENGTHS, L, CLIP)
    prediction, features = torch.randn(D, 16).T, torch.randn(L, B, D).transpose(0, 1)
    losses = [masked_l1_loss(prediction, features, targets), masked_l1_loss(prediction, features, targets)]
    losses.append(masked_l1_loss(prediction.contiguous(), features.contiguous(), targets))
    assert losses[0] == losses[1] == losses[2]


def test_opcheck(make_sets):
    targets = make_sets(LENGTHS, L, CLIP)
    prediction, features = torch.randn(16, D, requires_grad=True), torch.randn(B, L, D)
    packed = (targets.indices, targets.cu_seqlens, targets.clip, torch.tensor(LENGTHS))
    for weights in (None, torch.rand(16)):
        opcheck(torch.ops.vjepa.masked_l1_loss.default, (prediction, features, *packed, 1e-5, weights))
    sign = torch.randint(-1, 2, (16, D), dtype=torch.int8)
    arguments = (torch.tensor(2.0), sign, targets.cu_seqlens, None, torch.bfloat16)
    opcheck(torch.ops.vjepa.masked_l1_loss_backward.default, arguments)


def ids(*sets, clip=None):
    return TokenIndices.from_sets([torch.tensor(s, dtype=torch.int64) for s in sets], clip=clip)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"prediction": torch.zeros(D)}, ValueError, r"prediction must have the shape \[N, D\]"),
        ({"prediction": torch.zeros(2, D)}, ValueError, "prediction must have one row for each of the 3 targets"),
        ({"features": torch.zeros(B, L, D + 1)}, ValueError, "features must have 7 features like prediction"),
        ({"features": torch.zeros(B, L, D).long()}, TypeError, "features must be one of float32"),
        ({"targets": ids([0, 1, 2], [])}, ValueError, "targets must have no empty set, got 0 tokens in set 1"),
        ({"targets": ids([0, 1, L])}, ValueError, "targets.indices must be between 0 and 9 .*, got 10"),
        ({"targets": ids([0, 1, 2], clip=[B])}, ValueError, "targets.clip must be between 0 and 2 .*, got 3"),
        ({"targets": None}, TypeError, "targets must be a TokenIndices, got NoneType"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str 'small'"),
        ({"weights": torch.ones(2)}, ValueError, "weights must have one entry for each of the 3 targets"),
        ({"weights": torch.ones(3).long()}, TypeError, "weights must be one of float32"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "weights must not be negative or NaN, got -1.0"),
        (
            {"weights": torch.tensor([1.0, float("nan"), 1.0])},
            ValueError,
            "weights must not be negative or NaN, got nan",
        ),
        ({"weights": torch.zeros(3)}, ValueError, "weights must have a positive sum in each set, got 0 in set 0"),
    ],
)
def test_refuses(change, error, sentence):
    good = {
        "prediction": torch.zeros(3, D),
        "features": torch.zeros(B, L, D),
        "targets": ids([0, 1], [2]),
        "weights": None,
    }
    with pytest.raises(error, match=sentence):
        masked_l1_loss(**{**good, **change})
