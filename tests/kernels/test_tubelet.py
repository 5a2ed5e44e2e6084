"""tubelet_embed against a convolution in float64."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vjepa.kernels import TokenIndices, backend, tubelet_embed
from vjepa.kernels._dispatch import select

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
B, C, T, H, W, D = 3, 3, 4, 12, 8, 7
KERNEL = (2, 4, 4)
L = 2 * 3 * 2
SETS = ((5, 1, 8, 4), (0, 2, 2, 1))  # lengths and clips: clip 2 serves two sets
# Channels, tubelet, grid of tokens, features. Of the tiles of a kernel, each fills some and leaves others partly empty;
# of its steps, each is whole rows of a patch, or parts of rows, frames and channels.
SHAPES = {
    "patch 8": (3, (2, 8, 8), (2, 2, 3), 24),
    "patch 16, wide": (1, (2, 16, 16), (1, 2, 2), 250),
    "patch 7 of an image": (1, (1, 7, 7), (3, 2, 3), 5),
    "patch 14": (2, (1, 14, 14), (1, 2, 2), 130),
    "odd tubelet": (2, (3, 5, 2), (2, 1, 3), 17),
    "single pixels": (1, (1, 1, 1), (2, 3, 5), 67),  # of few weights the largest error is a matter of luck
}


@pytest.fixture(params=["reference", "cpu", "triton"])
def serving(request, device):
    """Each backend in turn, forced."""
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("the cpu backend serves no GPU")
    with backend(request.param):
        yield request.param


def inputs(dtype=torch.float64, video_dtype=None, device="cpu"):
    weight, bias, pos = torch.randn(D, C, *KERNEL), torch.randn(D), torch.randn(L, D)
    return clips(B, C, T, H, W, dtype=video_dtype or dtype).to(device), *(
        x.to(device, dtype) for x in (weight, bias, pos)
    )


def clips(*shape, dtype):
    return torch.randint(0, 256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def by_convolution(video, weight, bias, pos, sets=None, mean=None, std=None):
    if video.dtype == torch.uint8:
        scaled = video.to(weight.dtype) / 255
        shape, channels = (1, -1, 1, 1, 1), video.shape[1]
        mean = torch.tensor(mean or (0.0,) * channels, dtype=weight.dtype, device=video.device).view(shape)
        video = (scaled - mean) / torch.tensor(std or (1.0,) * channels, dtype=weight.dtype, device=video.device).view(
            shape
        )
    out = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    out = out if pos is None else out + pos
    if sets is None:
        return out
    owner = torch.repeat_interleave(sets.clip, torch.tensor(sets.lengths, device=video.device))
    return out[owner, sets.indices]


def check_all(check_accuracy, video, parameters, sets, norm):
    """Values and the gradients of weight, bias and positions."""
    dtype = parameters[0].dtype
    number = video.shape[0] * parameters[2].shape[0] if sets is None else sets.total
    grads = torch.rand(number, parameters[0].shape[0], device=video.device)

    def run(function, to):
        leaves = [p.detach().to(to).requires_grad_() for p in parameters]
        out = function(video if video.dtype == torch.uint8 else video.to(to), *leaves, sets, **norm)
        return out.detach(), *torch.autograd.grad(out, leaves, grads.view(out.shape).to(out.dtype))

    ours, plain, exact = run(tubelet_embed, dtype), run(by_convolution, dtype), run(by_convolution, torch.float64)
    for our, same, truth in zip(ours, plain, exact, strict=True):
        check_accuracy(our, same, truth)


@pytest.mark.usefixtures("serving", "used_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("video_dtype", [None, torch.uint8])
@pytest.mark.parametrize("kept", [False, True])
def test_values_and_gradients(make_sets, check_accuracy, device, dtype, video_dtype, kept):
    video, *parameters = inputs(dtype, video_dtype, device)
    sets = make_sets(SETS[0], L, SETS[1]).to(device) if kept else None
    check_all(check_accuracy, video, parameters, sets, {"mean": MEAN, "std": STD} if video_dtype else {})


@pytest.mark.usefixtures("serving", "used_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "video_dtype"), [(torch.float32, None), (torch.bfloat16, torch.uint8)])
def test_any_shape(make_sets, check_accuracy, device, shape, dtype, video_dtype):
    channels, kernel, grid, features = SHAPES[shape]
    length = grid[0] * grid[1] * grid[2]
    sizes = [cells * step for cells, step in zip(grid, kernel, strict=True)]
    video = clips(2, channels, *sizes, dtype=video_dtype or dtype).to(device)
    given = torch.randn(features, channels, *kernel) / 10, torch.randn(features), torch.randn(length, features)
    sets = make_sets((3, 0, 1, 7), length, (1, 0, 0, 1), duplicates=True).to(device)
    norm = (
        {"mean": [0.4] * channels, "std": [0.2 + 0.1 * channel for channel in range(channels)]} if video_dtype else {}
    )
    parameters = [x.to(device, dtype) for x in given]
    for chosen in (None, sets):
        check_all(check_accuracy, video, parameters, chosen, norm)


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize("serving", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_tokens_may_be_split(make_sets, check_accuracy, monkeypatch, device, serving, dtype):
    monkeypatch.setattr("vjepa.kernels._triton_tubelet_backward.LEAST_SPLIT", 16)
    video, *parameters = inputs(dtype, torch.uint8, device)
    sets = make_sets((40, 30, 29), L, (0, 1, 1), duplicates=True).to(device)
    check_all(check_accuracy, video, parameters, sets, {"mean": MEAN, "std": STD})


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize("serving", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_may_come_in_chunks(make_sets, check_accuracy, monkeypatch, device, serving, dtype):
    monkeypatch.setattr("vjepa.kernels._cpu_tubelet.CHUNK", 1)
    monkeypatch.setattr("vjepa.kernels._cpu_tubelet.ROWS", 5)  # tokens of a chunk; the last one has fewer
    video, *parameters = inputs(dtype, torch.uint8, device)
    for sets in (None, make_sets((4, 3, 6), L, (0, 2, 2), duplicates=True)):
        check_all(check_accuracy, video, parameters, sets, {"mean": MEAN, "std": STD})


@pytest.mark.parametrize("serving", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("kept", [False, True])
def test_gradcheck(make_sets, serving, kept):
    video, weight, bias, pos = (x.requires_grad_() for x in inputs())
    sets = make_sets((2, 3), L, (0, 0), duplicates=True) if kept else None
    small = video[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: tubelet_embed(*x, sets), (small, weight, bias, pos), fast_mode=True)


@pytest.mark.usefixtures("serving")
def test_video_gradient_adds_the_sets_of_a_clip(make_sets, device):
    video, weight, bias, pos = inputs(torch.float32, device=device)
    sets = make_sets((4, 6), L, (1, 1), duplicates=True).to(device)
    ours, plain = video.clone().requires_grad_(), video.clone().requires_grad_()
    tubelet_embed(ours, weight, bias, pos, sets).square().sum().backward()
    by_convolution(plain, weight, bias, pos, sets).square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
def test_bias_and_positions_are_optional(device, given):
    video, weight, bias, pos = inputs(torch.float32, device=device)
    bias, pos = (bias if given[0] else None), (pos if given[1] else None)
    expected = by_convolution(video, weight, bias, pos)
    torch.testing.assert_close(tubelet_embed(video, weight, bias, pos), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("norm", [{}, {"mean": MEAN}, {"std": STD}, {"mean": 0.5, "std": 0.25}])
def test_uint8_without_all_constants(device, norm):
    video, weight, bias, pos = inputs(torch.float32, torch.uint8, device)
    full = {name: (value,) * C if isinstance(value, float) else value for name, value in norm.items()}
    expected = by_convolution(video, weight, bias, pos, **full)
    torch.testing.assert_close(tubelet_embed(video, weight, bias, pos, **norm), expected, rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "channels last": lambda dtype: clips(B, C, T, H, W, dtype=dtype).to(memory_format=torch.channels_last_3d),
    "every other pixel": lambda dtype: clips(B, C, T, H, 2 * W, dtype=dtype)[..., ::2],
    "frames first": lambda dtype: clips(B, T, C, H, W, dtype=dtype).transpose(1, 2),
    "crop": lambda dtype: clips(B, C, T + 1, H + 3, W + 5, dtype=dtype)[:, :, 1:, 2:-1, 3:-2],
    "one still clip": lambda dtype: clips(1, C, 1, H, W, dtype=dtype).expand(B, C, T, H, W),
    "clips that overlap": lambda dtype: clips(C, T, H, W + 4, dtype=dtype).unfold(3, W, 2).permute(3, 0, 1, 2, 4),
    "channels that overlap": lambda dtype: clips(B, T, H, W + 4, dtype=dtype).unfold(3, W, 2).permute(0, 3, 1, 2, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(make_sets, device, serving, dtype, layout):
    strided = LAYOUTS[layout](dtype).to(device)
    _, *parameters = inputs(torch.float32, device=device)
    assert not strided.is_contiguous()
    if serving == "cpu" and strided.stride(4) != 1:
        with pytest.raises(RuntimeError, match="it needs the pixels of a row side by side, got the stride"):
            tubelet_embed(strided, *parameters)
        return

    def run(video, chosen):
        leaves = [x.clone().requires_grad_() for x in parameters]
        out = tubelet_embed(video, *leaves, chosen)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for chosen in (None, make_sets(SETS[0], L, SETS[1]).to(device)):
        for ours, expected in zip(run(strided, chosen), run(strided.contiguous(), chosen), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.usefixtures("serving")
def test_any_strides_of_the_rest(make_sets, device):
    video, *parameters = inputs(torch.float32, device=device)
    sets = make_sets(SETS[0], L, SETS[1]).to(device)
    apart = [torch.stack((x, x), -1)[..., 0] for x in parameters]
    for chosen in (None, sets):
        grad = torch.randn(D, B * L if chosen is None else sets.total, device=device).T
        results = []
        for given, last in ((parameters, grad.contiguous()), (apart, grad)):
            leaves = [x.detach().requires_grad_() for x in given]
            out = tubelet_embed(video, *leaves, chosen)
            results.append([out, *torch.autograd.grad(out, leaves, last.reshape(out.shape))])
        for plain, strided in zip(*results, strict=True):
            torch.testing.assert_close(plain, strided, rtol=1e-4, atol=1e-4)


APART = 2**30  # two of these steps lead to 2**31, which 32 bits take for -(2**31)


@pytest.fixture
def far(tmp_path, device):
    """Memory of 2^31 elements and a few, of which few are touched: a file with a hole, or a part of the GPU's memory.

    As much lies before it, so that a kernel which computes offsets in 32 bits fails the test and not the process.
    """

    def zeros(dtype):
        size = 4 * APART + 64
        if device.type == "cuda":
            if torch.cuda.mem_get_info(device)[0] < 2 * size * dtype.itemsize:
                pytest.skip(f"needs {2 * size * dtype.itemsize >> 30} GB of the GPU's memory")
            return torch.zeros(size, dtype=dtype, device=device)[2 * APART :]
        return torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=dtype)[2 * APART :]

    return zeros


@pytest.mark.parametrize(
    ("dimension", "inside"),
    [(0, False), (1, True), *((number, inside) for number in (2, 3, 4) for inside in (False, True))],
)
def test_pixels_far_away(make_sets, far, device, serving, dimension, inside):
    """Tokens, or pixels inside a token, lie 2^31 elements apart."""
    if serving == "cpu" and inside and dimension == 4:
        pytest.skip("the cpu backend needs the pixels of a row side by side")
    shape, strides, kernel = [2] * 5, [16, 8, 4, 2, 1], [1, 1, 1]
    shape[dimension], strides[dimension] = 3, APART
    if inside and dimension > 1:
        kernel[dimension - 2] = 3
    video = far(torch.uint8).as_strided(shape, strides)
    video.copy_(clips(*shape, dtype=torch.uint8))
    weight = torch.randn(5, shape[1], *kernel, device=device, requires_grad=True)
    length = video[0, 0].numel() // weight[0, 0].numel()
    sets = make_sets((length, 3, 2), length, (shape[0] - 1, 0, 1), duplicates=True).to(device)
    for chosen in (None, sets):
        outs = [tubelet_embed(given, weight, indices=chosen) for given in (video, video.contiguous())]
        assert torch.equal(*outs)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), weight)[0] for out in outs))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("kept", [False, True])
def test_positions_and_gradients_far_away(far, device, kept):
    sets = TokenIndices.from_sets([torch.arange(3)], device=device) if kept else None
    video, weight = torch.randn(1, 2, 3, 1, 1, device=device).half(), torch.randn(8, 2, 1, 1, 1, device=device).half()
    rows = far(torch.float16).as_strided((3, 8), (APART, 1))
    rows.copy_(torch.randn(3, 8))
    near = rows.clone()
    assert torch.equal(*(tubelet_embed(video, weight, None, pos, sets) for pos in (rows, near)))
    packed = (None,) * 3 if sets is None else (sets.indices, sets.cu_seqlens, sets.clip)
    arguments = (video, weight, *packed, None, None, weight.dtype, weight.dtype, [False, True, True, True])
    results = [
        torch.ops.vjepa.tubelet_embed_backward(grad if kept else grad[None], *arguments) for grad in (rows, near)
    ]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_writes_far_away(far, device):
    module = import_module("vjepa.kernels._triton_tubelet")
    video, weight = torch.tensor([1.0, 2.0, 3.0], device=device), torch.arange(16.0, device=device)
    meta = module._meta(video.dtype, 16, dict.fromkeys("CTHW", 1), module.precision(video.dtype))
    # a lie about the features, of which the only program makes 16, puts the tokens far apart
    sizes = (3, 0, 0, 3, 1, 1, APART, *(0, 0, 1, 0, 0), 0)
    out = far(torch.uint8)
    module._tubelet_kernel[1,](video, weight, *(None,) * 7, out, *sizes, **meta)
    assert out.as_strided((3, 16), (APART, 1)).tolist() == torch.outer(video, weight).tolist()


@pytest.mark.usefixtures("serving")
def test_only_kept_tubelets_are_read(device):
    video, *parameters = inputs(torch.float32, device=device)
    video[1:] = float("nan")
    video[0, :, :2] = float("nan")
    video[0, :, 2:, 4:] = float("nan")
    kept = TokenIndices.from_sets([torch.tensor([6, 7])]).to(device)
    leaves = [x.requires_grad_() for x in parameters]
    out = tubelet_embed(video, *leaves, kept)
    for result in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert torch.isfinite(result).all()


@pytest.mark.usefixtures("serving")
def test_empty_sets(make_sets, device):
    video, *parameters = inputs(torch.float32, device=device)
    leaves = [x.requires_grad_() for x in parameters]
    out = tubelet_embed(video, *leaves, make_sets((0, 0), L, (1, 2)).to(device))
    assert out.shape == (0, D)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.usefixtures("serving")
def test_positions_of_higher_precision_promote(make_sets, check_accuracy, device):
    video, weight, bias, pos = inputs(torch.bfloat16, device=device)
    assert tubelet_embed(video, weight, bias, pos).dtype == torch.bfloat16
    for sets in (None, make_sets(SETS[0], L, SETS[1]).to(device)):
        leaves = [x.clone().requires_grad_() for x in (weight, bias, pos.float())]
        out = tubelet_embed(video, *leaves, sets)
        grad = torch.rand_like(out)
        plain = tubelet_embed(video, weight, bias, None, sets).float()
        plain += pos.float() if sets is None else pos.float()[sets.indices]
        exact = by_convolution(*(x.double() for x in (video, weight, bias, pos)), sets)
        check_accuracy(out.detach(), plain, exact)
        grads = torch.autograd.grad(out, leaves, grad)
        assert [x.dtype for x in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        expected = torch.autograd.grad(by_convolution(video.double(), *doubles, sets), doubles, grad.double())
        for ours, truth in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_of_double_positions_add_in_float64(make_sets, device, kept):
    video, weight, _, pos = inputs(torch.float32, device=device)
    sets = make_sets((40, 30), L, (0, 1), duplicates=True).to(device) if kept else None
    pos = pos.double().requires_grad_()
    out = tubelet_embed(video, weight, None, pos, sets)
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, pos, grad)
    expected = grad.sum(0) if sets is None else torch.zeros_like(pos).index_put_((sets.indices,), grad, accumulate=True)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(make_sets, device, dtype):
    video, weight, bias, pos = inputs(dtype, torch.uint8, device)
    sets = make_sets((40, 50, 60), L, (0, 1, 1), duplicates=True).to(device)

    def run():
        leaves = [x.clone().requires_grad_() for x in (weight, bias, pos)]
        out = tubelet_embed(video, *leaves, sets, mean=MEAN, std=STD)
        return torch.autograd.grad(out.square().sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("serving")
def test_opcheck(make_sets, device):
    video, weight, bias, pos = (x.requires_grad_() for x in inputs(torch.float32, device=device))
    sets = make_sets(SETS[0], L, SETS[1]).to(device)
    packed = (sets.indices, sets.cu_seqlens, sets.clip)
    opcheck(torch.ops.vjepa.tubelet_embed.default, (video, weight, bias, pos, *packed, None, None))
    pixels = inputs(torch.float32, torch.uint8, device)[0]
    norm = (list(MEAN), list(STD))
    opcheck(torch.ops.vjepa.tubelet_embed.default, (pixels, weight, bias, pos, None, None, None, *norm))
    grad, dtypes = torch.randn(sets.total, D, device=device), (torch.float32, torch.float32)
    for needs in ([True] * 4, [False, True, False, False]):
        arguments = (grad, video.detach(), weight.detach(), *packed, None, None, *dtypes, needs)
        opcheck(torch.ops.vjepa.tubelet_embed_backward.default, arguments)


@pytest.mark.usefixtures("serving")
def test_no_clips(device):
    video, *parameters = (x.requires_grad_() for x in inputs(torch.float32, device=device))
    out = tubelet_embed(video[:0], *parameters)
    assert out.shape == (0, L, D)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), parameters))


@pytest.mark.parametrize("serving", ["triton"], indirect=True)
def test_triton_says_that_it_has_no_float64(serving, device):
    with pytest.raises(RuntimeError, match=r"cannot serve tubelet_embed on .* float64"):
        tubelet_embed(*inputs(device=device))


def test_a_cpu_takes_its_own_path_where_it_can():
    video, weight, *_ = inputs(torch.float32)
    cpu = torch.device("cpu")
    assert select("tubelet_embed", cpu, video, weight).name == "cpu"
    apart = video.to(memory_format=torch.channels_last_3d)
    assert select("tubelet_embed", cpu, apart, weight).name == "reference"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_products_of_float32_are_as_pytorch_has_been_told(monkeypatch):
    monkeypatch.setattr("vjepa.kernels._triton_product.interpreted", lambda: False)
    precision = import_module("vjepa.kernels._triton_product").precision
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert precision(torch.float32) == expected
            assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


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


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("offsets", [[0, 3], [0, 1], [1, 2], [0]])
def test_the_operator_refuses_bad_offsets_itself(device, offsets):
    """A kernel would read where they point to."""
    if device.type != "cpu":
        pytest.skip("values on a device are not read")
    video, weight, bias, pos = inputs(torch.float32)
    sets = torch.tensor([0, 1]), torch.tensor(offsets, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cu_seqlens must (rise from 0 to the 2|have 2 entries)"):
        torch.ops.vjepa.tubelet_embed(video, weight, bias, pos, *sets, None, None)
