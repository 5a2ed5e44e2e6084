"""masked_l1_loss against the formula written out in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

from vjepa.kernels import TokenIndices, backend, masked_l1_loss, reference
from vjepa.kernels._dispatch import select

pytestmark = pytest.mark.usefixtures("used_memory")

B, L, D = 3, 10, 7
LENGTHS, CLIP = (4, 1, 9, 2), (0, 1, 2, 0)
N = sum(LENGTHS)


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


def with_gradient(loss, prediction, *arguments, **options):
    leaf = prediction.detach().requires_grad_()
    value = loss(leaf, *arguments, **options)
    return value.detach(), *torch.autograd.grad(3 * value, leaf)


def check(prediction, features, targets, weights=None, eps=1e-5):
    """Value and gradient are the formula's; returns them."""
    ours = with_gradient(masked_l1_loss, prediction, features, targets, weights=weights, eps=eps)
    wide = None if weights is None else weights.double()
    exact = with_gradient(formula, prediction.double(), features.double(), targets, weights=wide, eps=eps)
    assert (ours[0].dtype, ours[1].dtype) == (torch.promote_types(prediction.dtype, torch.float32), prediction.dtype)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2 * torch.finfo(prediction.dtype).eps, atol=0)
    return ours


@pytest.fixture
def targets(make_sets, device):
    return make_sets(LENGTHS, L, CLIP, duplicates=True).to(device)


@pytest.fixture
def inputs(device):
    return torch.randn(N, D, device=device), 3 * torch.randn(B, L, D, device=device) + 5


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16), (FP64, FP64)])
@pytest.mark.parametrize("weights", [None, FP32, BF16])
def test_value_and_gradient(inputs, targets, dtypes, weights):
    share = None if weights is None else torch.rand(N, device=targets.indices.device).to(weights)
    check(inputs[0].to(dtypes[0]), inputs[1].to(dtypes[1]), targets, share)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (13, 2, 31), (1,) * 9 + (4,)])
def test_any_sets(make_sets, device, lengths):
    targets = make_sets(lengths, L, [n % B for n in range(len(lengths))], duplicates=True).to(device)
    prediction, features = torch.randn(targets.total, D, device=device), torch.randn(B, L, D, device=device)
    check(prediction, features, targets)
    check(prediction, features, targets, torch.rand(targets.total, device=device))


def test_sets_of_more_weights_than_are_added_at_a_time(make_sets, device, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("vjepa.kernels._triton_loss.WEIGHTS", 4)
    targets = make_sets((9, 1, 4, 5), L, CLIP, duplicates=True).to(device)
    with backend("triton"):
        check(
            torch.randn(19, D, device=device),
            torch.randn(B, L, D, device=device),
            targets,
            torch.rand(19, device=device),
        )


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("weights", [None, FP32])
def test_backends_take_empty_sets(make_sets, device, weights):
    """The operator refuses them, but no kernel relies on that."""
    sets = make_sets((0, 2, 0, 0, 3, 0), L, (0, 1, 2, 0, 2, 1)).to(device)
    share = None if weights is None else torch.rand(5, device=device)
    inputs, packed = (torch.randn(5, D), torch.randn(B, L, D)), (sets.indices, sets.cu_seqlens, sets.clip)
    prediction, features = (x.to(device) for x in inputs)
    row, grad = select("masked_l1_loss", device), torch.ones((), device=device)
    results = []
    for forward, backward in (
        (row.forward, row.backward),
        (reference.masked_l1_loss, reference.masked_l1_loss_backward),
    ):
        loss, statistics = forward(prediction, features, packed, 1e-5, share)
        results.append((loss, backward(grad, prediction, features, packed, statistics, share)))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("width", [1, 64, 130, 384, 768, 1280, 1664, 2048, 4100, 9000])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_any_width(make_sets, device, width, dtype):
    targets = make_sets((2, 3), L).to(device)
    prediction, features = torch.randn(5, width, device=device), torch.randn(2, L, width, device=device)
    check(prediction.to(dtype) + 9, features.to(dtype), targets)  # + 9: no difference is near 0


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("mean", [0, 1000])
def test_accuracy_in_float32(targets, inputs, check_accuracy, mean):
    prediction, features = inputs[0], mean + inputs[1]  # squares of 1000 would swallow a variance of 9
    exact = with_gradient(formula, prediction.double(), features.double(), targets)
    plain = with_gradient(formula, prediction, features, targets)
    for triple in zip(with_gradient(masked_l1_loss, prediction, features, targets), plain, exact, strict=True):
        check_accuracy(*triple)


@pytest.mark.usefixtures("serving")
def test_eps_and_equal_weights(inputs, targets):
    check(*inputs, targets, eps=0.7)
    check(*inputs, targets, eps=0)
    same = masked_l1_loss(*inputs, targets, weights=torch.full((N,), 0.3, device=inputs[0].device))
    torch.testing.assert_close(same, masked_l1_loss(*inputs, targets))


@pytest.mark.usefixtures("serving")
def test_each_set_counts_alike_whatever_its_length(device):
    targets = TokenIndices.from_sets([torch.tensor([0]), torch.arange(9)], clip=[0, 0], device=device)
    features = torch.zeros(1, L, D, device=device)  # layer norm of a constant is 0
    prediction = torch.cat([torch.full((1, D), 4.0), torch.full((9, D), 2.0)]).to(device)
    assert masked_l1_loss(prediction, features, targets).item() == pytest.approx(3.0)


def test_only_the_prediction_gets_a_gradient(make_sets):
    targets = make_sets((2,), L)
    prediction, features, weights = (torch.rand(s).requires_grad_() for s in ((2, D), (1, L, D), (2,)))
    masked_l1_loss(prediction, features, targets, weights=weights).backward()
    assert prediction.grad is not None
    assert features.grad is None
    assert weights.grad is None
    assert not masked_l1_loss(prediction.detach(), features, targets, weights=weights).requires_grad


@pytest.mark.usefixtures("serving")
def test_gradient_is_zero_where_the_prediction_is_exact(device):
    prediction = torch.zeros(2, D, device=device, requires_grad=True)
    targets = TokenIndices.from_sets([torch.tensor([1, 2])], device=device)
    masked_l1_loss(prediction, torch.zeros(1, L, D, device=device), targets).backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.usefixtures("serving")
def test_only_the_named_rows_are_read(device):
    targets = TokenIndices.from_sets([torch.tensor([1, 3])], device=device)
    features = torch.full((1, L, D), float("nan"), device=device)
    features[0, [1, 3]] = torch.randn(2, D, device=device)
    for result in with_gradient(masked_l1_loss, torch.randn(2, D, device=device), features, targets):
        assert torch.isfinite(result).all()


@pytest.mark.usefixtures("serving")
@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, below Triton's interpreter
def test_a_set_without_weight_makes_the_loss_nan(inputs, targets, device):
    weights = torch.ones(N, device=device)
    weights[LENGTHS[0]] = 0  # the only token of set 1; on the CPU the operator refuses that
    sets = (targets.indices, targets.cu_seqlens, targets.clip)
    assert select("masked_l1_loss", device).forward(*inputs, sets, 1e-5, weights)[0].isnan()


@pytest.mark.usefixtures("serving")
def test_gradcheck(inputs, targets):
    prediction, features = (x.double() for x in inputs)
    weights = torch.rand(N, dtype=torch.float64, device=features.device)
    assert torch.autograd.gradcheck(
        lambda p: masked_l1_loss(p, features, targets, weights=weights), (prediction.requires_grad_(),), fast_mode=True
    )


@pytest.mark.usefixtures("serving")
def test_deterministic_and_any_strides(inputs, targets):
    prediction, features = inputs
    weights = torch.rand(N, device=prediction.device)
    apart = {name: torch.stack((value := getattr(targets, name), value), 1)[:, 0] for name in ("indices", "clip")}
    calls = [
        (prediction, features, targets, weights),
        (prediction, features, targets, weights),
        (prediction.T.contiguous().T, features.movedim(0, -1).contiguous().movedim(-1, 0), targets, weights),
        (
            torch.cat((prediction, prediction), 1)[:, :D],
            torch.stack((features, features), 2)[:, :, 1],
            targets,
            weights,
        ),
        (prediction, features, dataclasses.replace(targets, **apart), weights.repeat_interleave(3)[::3]),
    ]
    results = [with_gradient(masked_l1_loss, *call[:3], weights=call[3]) for call in calls]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    one = weights[:1].expand(N)
    torch.testing.assert_close(masked_l1_loss(*inputs, targets, weights=one), masked_l1_loss(*inputs, targets))


def test_backends_understand_each_other(inputs, targets):
    pytest.importorskip("triton")
    results = []
    for forward, backward in (("reference", "reference"), ("triton", "reference"), ("reference", "triton")):
        leaf = inputs[0].clone().requires_grad_()
        with backend(forward):
            loss = masked_l1_loss(leaf, inputs[1], targets)
        with backend(backward):
            results.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_keeps_two_numbers_a_token_beside_its_inputs(inputs, targets):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        masked_l1_loss(inputs[0].requires_grad_(), inputs[1], targets)
    given = {x.data_ptr() for x in (*inputs, targets.indices, targets.cu_seqlens, targets.clip)}
    assert [tuple(x.shape) for x in kept if x.data_ptr() not in given] == [(N, 2)]


def test_a_row_too_wide_for_a_program(device):
    pytest.importorskip("triton")
    one = TokenIndices.from_sets([torch.tensor([0])], device=device)
    prediction = torch.ones(1, 65537, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match="at most 65536 features, got 65537"):
        masked_l1_loss(prediction, prediction[None], one)
    assert masked_l1_loss(prediction, prediction[None], one).item() == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.usefixtures("serving")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_offsets_beyond_32_bits(device):
    far = 2**30 + 8
    memory = torch.zeros(3 * far, dtype=BF16, device=device)
    features = memory.as_strided((1, 3, 64), (0, far, 1))
    features.copy_(torch.randn(1, 3, 64))
    targets = TokenIndices.from_sets([torch.tensor([0, 2, 1])], device=device)
    prediction = memory.as_strided((3, 64), (far, 1), 128).copy_(torch.randn(3, 64))
    for ours, near in zip(
        with_gradient(masked_l1_loss, prediction, features, targets),
        with_gradient(masked_l1_loss, prediction.clone(), features.clone(), targets),
        strict=True,
    ):
        assert torch.equal(ours, near)


@pytest.mark.usefixtures("serving")
def test_opcheck(inputs, targets):
    prediction, features = inputs[0].requires_grad_(), inputs[1]
    packed = (targets.indices, targets.cu_seqlens, targets.clip)
    for weights in (None, torch.rand(N, device=features.device)):
        arguments = (prediction, features, *packed, torch.tensor(LENGTHS), 1e-5, weights)
        opcheck(torch.ops.vjepa.masked_l1_loss.default, arguments)
        statistics = torch.ops.vjepa.masked_l1_loss(*arguments)[1]
        grad = torch.tensor(2.0, device=features.device)
        arguments = (grad, prediction.detach().bfloat16(), features, *packed, statistics, weights)
        opcheck(torch.ops.vjepa.masked_l1_loss_backward.default, arguments)


def test_the_operator_refuses_bad_ids_itself():
    """Compiled code reaches it without the public function's checks of values."""
    good = {"prediction": torch.zeros(1, D), "features": torch.zeros(B, L, D), "indices": torch.tensor([0])}
    good |= {"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32), "clip": torch.tensor([0])}
    good |= {"lengths": torch.tensor([1]), "eps": 1e-5, "weights": None}
    for name, bad in (("indices", [L]), ("indices", [-1]), ("clip", [B]), ("clip", [-1])):
        with pytest.raises(ValueError, match=f"targets.{name} must be between 0 and"):
            torch.ops.vjepa.masked_l1_loss(**{**good, name: torch.tensor(bad)})


def test_offsets_that_are_no_sums_of_the_lengths_are_refused(inputs, targets):
    """Sets built in compiled code are checked in the operator."""
    rest = (targets.clip.cpu(), torch.tensor(LENGTHS), 1e-5, None)
    with pytest.raises(ValueError, match=r"targets\.cu_seqlens must be the running sum of targets\.lengths"):
        torch.ops.vjepa.masked_l1_loss(*(x.cpu() for x in (*inputs, targets.indices, targets.cu_seqlens + 1)), *rest)


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
        (
            {"weights": torch.tensor([0.0, 1.0, 0.0])},
            ValueError,
            "weights must have a positive sum in each set, got 0 in set 1",
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
