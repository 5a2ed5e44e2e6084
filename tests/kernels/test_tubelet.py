"""tubelet_embed against a convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vjepa.kernels import TokenIndices, tubelet_embed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
B, C, T, H, W, D = 3, 3, 4, 12, 8, 7
KERNEL = (2, 4, 4)
L = 2 * 3 * 2
SETS = ((5, 1, 8, 4), (0, 2, 2, 1))  # lengths and clips: clip 2 serves two sets


def inputs(dtype=torch.float64, video_dtype=None):
    weight, bias, pos = torch.randn(D, C, *KERNEL), torch.randn(D), torch.randn(L, D)
    video = torch.randn(B, C, T, H, W)
    if video_dtype == torch.uint8:
        video = torch.randint(0, 256, video.shape, dtype=torch.uint8)
    else:
        video = video.to(dtype)
    return video, weight.to(dtype), bias.to(dtype), pos.to(dtype)


def by_convolution(video, weight, bias, pos, sets=None, mean=None, std=None):
    if video.dtype == torch.uint8:
        scaled = video.to(weight.dtype) / 255
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(mean or (0.0,) * C, dtype=weight.dtype).view(shape)
        video = (scaled - mean) / torch.tensor(std or (1.0,) * C, dtype=weight.dtype).view(shape)
    out = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    out = out if pos is None else out + pos
    if sets is None:
        return out
    owner = torch.repeat_interleave(sets.clip, torch.tensor(sets.lengths))
    return out[owner, sets.indices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("video_dtype", [None, torch.uint8])
@pytest.mark.parametrize("kept", [False, True])
def test_values_and_gradients(make_sets, check_accuracy, dtype, video_dtype, kept):
    video, *parameters = inputs(dtype, video_dtype)
    sets = make_sets(SETS[0], L, SETS[1]) if kept else None
    norm = {"mean": MEAN, "std": STD} if video_dtype else {}
    grads = torch.rand(18, D) if kept else torch.rand(B, L, D)

    def run(function, to):
        leaves = [p.detach().to(to).requires_grad_() for p in parameters]
        clip = video if video_dtype else video.to(to)
        out = function(clip, *leaves, sets, **norm)
        return out.detach(), *torch.autograd.grad(out, leaves, grads[: out.shape[0]].to(out.dtype))

    ours, plain, exact = run(tubelet_embed, dtype), run(by_convolution, dtype), run(by_convolution, torch.float64)
    for our, same, truth in zip(ours, plain, exact, strict=True):
        check_accuracy(our, same, truth)


@pytest.mark.parametrize("kept", [False, True])
def test_gradcheck(make_sets, kept):
    video, weight, bias, pos = (x.requires_grad_() for x in inputs())
    sets = make_sets((2, 3), L, (0, 0), duplicates=True) if kept else None
    small = video[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: tubelet_embed(*x, sets), (small, weight, bias, pos), fast_mode=True)


def test_video_gradient_adds_the_sets_of_a_clip(make_sets):
    video, weight, bias, pos = inputs()
    sets = make_sets((4, 6), L, (1, 1), duplicates=True)
    ours, plain = video.clone().requires_grad_(), video.clone().requires_grad_()
    tubelet_embed(ours, weight, bias, pos, sets).square().sum().backward()
    by_convolution(plain, weight, bias, pos, sets).square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
def test_bias_and_positions_are_optional(given):
    video, weight, bias, pos = inputs()
    bias, pos = (bias if given[0] else None), (pos if given[1] else None)
    torch.testing.assert_close(tubelet_embed(video, weight, bias, pos), by_convolution(video, weight, bias, pos))


@pytest.mark.parametrize("norm", [{}, {"mean": MEAN}, {"std": STD}, {"mean": 0.5, "std": 0.25}])
def test_uint8_without_all_constants(norm):
    video, weight, bias, pos = inputs(video_dtype=torch.uint8)
    full = {name: (value,) * C if isinstance(value, float) else value for name, value in norm.items()}
    expected = by_convolution(video, weight, bias, pos, **full)
    torch.testing.assert_close(tubelet_embed(video, weight, bias, pos, **norm), expected)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "frames_first"])
def test_any_strides(make_sets, layout):
    video, weight, bias, pos = inputs()
    if layout == "channels_last":
        strided = video.to(memory_format=torch.channels_last_3d)
    elif layout == "sliced":
        strided = torch.randn(B, C, T, H, 2 * W, dtype=torch.float64)[..., ::2]
    else:
        strided = torch.randn(B, T, C, H, W, dtype=torch.float64).transpose(1, 2)
    assert not strided.is_contiguous()
    sets = make_sets(SETS[0], L, SETS[1])
    for chosen in (None, sets):
        expected = tubelet_embed(strided.contiguous(), weight, bias, pos, chosen)
        assert torch.equal(tubelet_embed(strided, weight, bias, pos, chosen), expected)


def test_only_kept_tubelets_are_read():
    video, weight, bias, pos = inputs()
    video[1:] = float("nan")
    video[0, :, :2] = float("nan")
    video[0, :, 2:, 4:] = float("nan")
    kept = TokenIndices.from_sets([torch.tensor([6, 7])])
    assert torch.isfinite(tubelet_embed(video, weight, bias, pos, kept)).all()


def test_other_grids_channels_and_empty_sets():
    video = torch.randn(2, 12, 1, 6, 4, dtype=torch.float64)  # 12 bands, a single frame
    weight = torch.randn(5, 12, 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(tubelet_embed(video, weight), by_convolution(video, weight, None, None))
    nothing = TokenIndices.from_sets([torch.tensor([], dtype=torch.int64)])
    assert tubelet_embed(video, weight, indices=nothing).shape == (0, 5)


def test_positions_of_higher_precision_promote():
    video, weight, bias, pos = inputs(torch.bfloat16)
    assert tubelet_embed(video, weight, bias, pos.float()).dtype == torch.float32
    assert tubelet_embed(video, weight, bias, pos).dtype == torch.bfloat16


def test_deterministic(make_sets):
    video, weight, bias, pos = inputs(torch.float32, torch.uint8)
    sets = make_sets((40, 50, 60), L, (0, 1, 1), duplicates=True)

    def run():
        leaves = [x.clone().requires_grad_() for x in (weight, bias, pos)]
        out = tubelet_embed(video, *leaves, sets, mean=MEAN, std=STD)
        return torch.autograd.grad(out.square().sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_opcheck(make_sets):
    video, weight, bias, pos = (x.float().requires_grad_() for x in inputs())
    sets = make_sets(SETS[0], L, SETS[1])
    packed = (sets.indices, sets.cu_seqlens, sets.clip)
    opcheck(torch.ops.vjepa.tubelet_embed.default, (video, weight, bias, pos, *packed, None, None))
    pixels = inputs(video_dtype=torch.uint8)[0]
    norm = (list(MEAN), list(STD))
    opcheck(torch.ops.vjepa.tubelet_embed.default, (pixels, weight, bias, pos, None, None, None, *norm))
    grad, dtypes = torch.randn(sets.total, D), (torch.float32, torch.float32)
    for needs in ([True] * 4, [False, True, False, False]):
        arguments = (grad, video.detach(), weight.detach(), *packed, None, None, *dtypes, needs)
        opcheck(torch.ops.vjepa.tubelet_embed_backward.default, arguments)


def test_no_clips():
    video, *parameters = (x.requires_grad_() for x in inputs())
    out = tubelet_embed(video[:0], *parameters)
    assert out.shape == (0, L, D)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), parameters))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"video": torch.zeros(C, T, H, W)}, ValueError, r"video must have the shape \[B, C, T, H, W\]"),
        ({"video": torch.zeros(B, C, T, H, W, dtype=torch.int32)}, TypeError, "video must be one of uint8"),
        ({"video": torch.zeros(B, C, T, H, W).half()}, TypeError, "video must be uint8 or torch.float32 like weight"),
        ({"video": torch.zeros(B, 4, T, H, W)}, ValueError, "video must have the 3 channels of weight"),
        ({"video": torch.zeros(B, C, T, H, 9)}, ValueError, r"divisible by the tubelet \(2, 4, 4\)"),
        ({"video": torch.zeros(B, C, 0, H, W)}, ValueError, "divisible by the tubelet"),
        ({"weight": torch.zeros(D, C * 32)}, ValueError, r"weight must have the shape \[D, C, t, h, w\]"),
        ({"weight": torch.zeros(D, C, 0, 4, 4)}, ValueError, "weight must have no size of 0"),
        ({"bias": torch.zeros(D + 1)}, ValueError, "bias must have 7 entries like weight"),
        ({"bias": torch.zeros(D).double()}, TypeError, "bias must be one of float32"),
        ({"pos_embed": torch.zeros(L + 1, D)}, ValueError, r"pos_embed must have the shape \(12, 7\)"),
        ({"indices": torch.tensor([1])}, TypeError, "indices must be a TokenIndices, got"),
        ({"indices": TokenIndices.from_sets([torch.tensor([L])])}, ValueError, "between 0 and 11 .*, got 12"),
        ({"indices": TokenIndices.from_sets([torch.tensor([0])], clip=[B])}, ValueError, "between 0 and 2 .*, got 3"),
        ({"mean": MEAN}, ValueError, "mean and std are for uint8 video"),
    ],
)
def test_refuses(change, error, sentence):
    video, weight, bias, pos = inputs(torch.float32)
    arguments = {"video": video, "weight": weight, "bias": bias, "pos_embed": pos, **change}
    with pytest.raises(error, match=sentence):
        tubelet_embed(**arguments)


@pytest.mark.parametrize(
    ("norm", "error", "sentence"),
    [
        ({"mean": (0.5, 0.5)}, ValueError, "mean must have one number for each of the 3 channels, got 2"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be positive, got .*0.0"),
        ({"std": (0.5, float("nan"), 0.5)}, ValueError, "std must be positive, got .*nan"),
        ({"mean": "abc"}, TypeError, "mean must hold numbers, got 'abc'"),
        ({"mean": torch.zeros(3)}, TypeError, "mean must be a number or a sequence of numbers"),
    ],
)
def test_refuses_constants(norm, error, sentence):
    video, weight, *_ = inputs(torch.float32, torch.uint8)
    with pytest.raises(error, match=sentence):
        tubelet_embed(video, weight, **norm)
