"""The native attention behind ctypes: what is refused, what is read and written, and that results are always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import _cpu_attention, _native, reference

REASON = _cpu_attention.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

AVX512, NARROW, TILES, IN_SOFTWARE = (
    getattr(_cpu_attention, name) for name in ("AVX512", "AVX512_BF16", "AMX_BF16", "AMX_IN_SOFTWARE")
)


def lacks(needed, what):
    found = 0 if REASON is not None else _cpu_attention.instructions()
    return pytest.mark.skipif(not found & needed, reason=f"the processor has no {what}")


# Tensors and products: bfloat16 without its own products is widened while it is packed.
KINDS = [
    pytest.param((torch.float32, AVX512), id="float32"),
    pytest.param((torch.bfloat16, AVX512), id="bfloat16, float32 products"),
    pytest.param((torch.bfloat16, AVX512 | NARROW), id="bfloat16", marks=lacks(NARROW, "products of bfloat16")),
    pytest.param((torch.bfloat16, AVX512 | NARROW | TILES), id="bfloat16, tiles", marks=lacks(TILES, "tiles")),
    pytest.param((torch.float32, AVX512 | NARROW | TILES), id="float32, tiles", marks=lacks(TILES, "tiles")),
]
# Slower by orders of magnitude, so that only small problems are given to them.
AND_SOFTWARE = [
    *KINDS,
    *(
        pytest.param(
            (dtype, AVX512 | NARROW | IN_SOFTWARE),
            id=f"{dtype}, tiles in software".removeprefix("torch."),
            marks=lacks(NARROW, "products of bfloat16"),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
]
HEAD_DIMS = (1, 2, 3, 15, 16, 17, 24, 31, 32, 33, 48, 50, 64, 80, 96, 127, 192, 255, 256)
# Around the rows of a tile, its columns, and the blocks of queries (96, 192, 256) and keys (96, 128, 512).
LENGTHS = (1, 2, 5, 6, 7, 15, 17, 33, 63, 65, 95, 97, 127, 129, 191, 193, 257, 513)
GUARD = 77  # elements on either side of what is written


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def problem(lengths, heads, head_dim, dtype, kv_lengths=None):
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    q, grad = (draw(sum(lengths), heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (draw(sum(kv_lengths), heads, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v, grad, torch.tensor(lengths, dtype=torch.int64), torch.tensor(kv_lengths, dtype=torch.int64)


def guarded(shape, dtype):
    """A tensor of NaN inside of a larger one of sevens."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD,), 7.0, dtype=dtype)
    inside = whole[GUARD : GUARD + size]
    inside.fill_(float("nan"))
    return whole, inside.view(shape)


def assert_guarded(whole):
    assert torch.equal(whole[:GUARD], torch.full_like(whole[:GUARD], 7.0))
    assert torch.equal(whole[-GUARD:], torch.full_like(whole[-GUARD:], 7.0))


def about(q, k, lengths, kv_lengths, scale, instructions):
    found = _cpu_attention._about(q, k, lengths, kv_lengths, scale)
    found.instructions = instructions
    return found


def forward(q, k, v, lengths, kv_lengths, scale, instructions, threads=2):
    (whole, out), (whole_lse, lse) = guarded(q.shape, q.dtype), guarded((q.shape[1], q.shape[0]), torch.float32)
    call = _cpu_attention._library().vjepa_attention_cpu
    given = about(q, k, lengths, kv_lengths, scale, instructions)
    _native.check(call(given, _cpu_attention._heads(q, k, v), out.data_ptr(), lse.data_ptr(), threads))
    assert_guarded(whole)
    assert_guarded(whole_lse)
    return out, lse


def backward(grad, q, k, v, out, lse, lengths, kv_lengths, scale, instructions, threads=2):
    wholes, grads = zip(*(guarded(x.shape, x.dtype) for x in (q, k, v)), strict=True)
    call = _cpu_attention._library().vjepa_attention_backward_cpu
    given = about(q, k, lengths, kv_lengths, scale, instructions)
    heads = _cpu_attention._heads(q, k, v, out, grad)
    _native.check(call(given, heads, lse.data_ptr(), *(x.data_ptr() for x in grads), threads))
    for whole in wholes:
        assert_guarded(whole)
    return grads


def both(q, k, v, grad, lengths, kv_lengths, scale, instructions, threads=2):
    out, lse = forward(q, k, v, lengths, kv_lengths, scale, instructions, threads)
    return (
        out,
        lse,
        *backward(grad, q, k, v, out, lse, lengths, kv_lengths, scale, instructions, threads),
    )


def plain(q, k, v, grad, lengths, kv_lengths, scale):
    """Softmax written out, one sequence after the other, in the dtype of the tensors; with gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    outs, sums = [leaves[0][:0]], [q.new_zeros(q.shape[1], 0)]
    parts = (x.split(n.tolist()) for x, n in zip(leaves, (lengths, kv_lengths, kv_lengths), strict=True))
    for a, b, c in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
        sums.append(scores.logsumexp(-1) if a.shape[0] else scores.sum(-1))
    out = torch.cat(outs)
    grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True, allow_unused=True)
    return out.detach(), torch.cat(sums, 1).detach(), *grads


def by_sdpa(q, k, v, grad, lengths, kv_lengths, scale):
    """PyTorch's own kernel, which as this one has the gradient of the softmax from `out`, not from its weights."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = [leaves[0][:0]]
    parts = (x.split(n.tolist()) for x, n in zip(leaves, (lengths, kv_lengths, kv_lengths), strict=True))
    for a, b, c in zip(*parts, strict=True):
        if a.shape[0]:
            heads = (x.transpose(0, 1)[None] for x in (a, b, c))
            outs.append(F.scaled_dot_product_attention(*heads, scale=scale)[0].transpose(0, 1))
    return torch.autograd.grad(torch.cat(outs), leaves, grad, materialize_grads=True, allow_unused=True)


def assert_accurate(results, inputs, scale):
    """At most twice PyTorch's error in the same dtype, the larger of two ways, as in tests/kernels/test_attention.py; the
    root of its mean square, because the largest of few errors is a matter of luck.

    Where a sequence has a single key, the gradients of query and key are zero, as the difference of two products dO v, of
    which the one rounds on the way through `out`.
    """
    q, k, v, grad, lengths, kv_lengths = inputs
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact, same, peer = plain(*wide, scale), plain(*inputs, scale), by_sdpa(*inputs, scale)
    several = kv_lengths > 1
    rows = [several.repeat_interleave(lengths), several.repeat_interleave(kv_lengths)]
    products = float(grad.double().norm(dim=-1).amax()) * float(v.double().norm(dim=-1).amax()) if q.numel() else 0.0
    for place, (ours, theirs, other, truth) in enumerate(zip(results, same, (*same[:2], *peer), exact, strict=True)):
        assert torch.isfinite(ours).all()
        eps = torch.finfo(ours.dtype).eps
        if place in (2, 3):
            chosen = rows[place - 2]
            zero, ours, theirs, other, truth = ours[~chosen], *(x[chosen] for x in (ours, theirs, other, truth))
            largest = max(float(x.abs().max()) for x in (q, k))
            assert not zero.numel() or float(zero.abs().max()) <= eps * scale * products * largest * int(lengths.max())
        if truth.numel():
            error, *allowed = (float((x - truth).square().mean().sqrt()) for x in (ours, theirs, other))
            rounding = eps * float(truth.square().mean().sqrt())
            assert error <= 2 * max(*allowed, rounding), f"error {error:.3g} of {place}, PyTorch's {allowed}"


@pytest.mark.parametrize("kind", AND_SOFTWARE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(kind, head_dim):
    dtype, instructions = kind
    torch.manual_seed(head_dim)
    heads = max(2, 256 // head_dim)  # enough numbers that the largest error of so many says something
    inputs, scale = problem((41, 1, 70), heads, head_dim, dtype), 1.1 * head_dim**-0.5
    assert_accurate(both(*inputs, scale, instructions), inputs, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(kind, length):
    """Together with an empty sequence, one of one token, and other numbers of keys."""
    dtype, instructions = kind
    torch.manual_seed(length)
    for lengths, kv_lengths in (((length, 0, 1), (length, 3, 1)), ((length, 0), (40, 2)), ((40, 2), (length, 1))):
        inputs = problem(lengths, 16 if length < 100 else 2, 20, dtype, kv_lengths)
        results = both(*inputs, 0.2, instructions)
        assert_accurate(results, inputs, 0.2)
    assert not torch.cat([x.flatten() for x in results]).isnan().any()


@pytest.mark.parametrize("kind", AND_SOFTWARE)
def test_keys_that_nobody_sees_have_no_gradient(kind):
    dtype, instructions = kind
    results = both(*problem((0, 3, 0), 2, 5, dtype, (4, 2, 7)), 0.5, instructions)
    for grad in results[3:]:
        assert not grad[:4].any()
        assert not grad[6:].any()
    assert all(result.numel() == 0 for result in both(*problem((0, 0), 2, 5, dtype), 0.5, instructions))
    assert all(result.numel() == 0 for result in both(*problem((), 2, 5, dtype), 0.5, instructions))
    assert all(result.numel() == 0 for result in both(*problem((3, 4), 0, 5, dtype), 0.5, instructions))


@lacks(TILES, "tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [(1,), (130, 33)], ids=str)
def test_tiles_in_software_compute_what_the_processor_does(lengths, dtype):
    torch.manual_seed(1)
    inputs = problem(lengths, 2, 40, dtype)
    hard, soft = (both(*inputs, 0.2, AVX512 | NARROW | which) for which in (TILES, IN_SOFTWARE))
    assert all(map(torch.equal, hard, soft))


@pytest.mark.parametrize("kind", AND_SOFTWARE)
@pytest.mark.parametrize("head_dim", [1, 7, 24, 33, 80])
def test_only_the_features_of_a_head_are_read(kind, head_dim):
    """What lies between the heads, and between the tokens, is NaN; rows begin at any element."""
    dtype, instructions = kind
    inputs, scale = problem((29, 70), 3, head_dim, dtype), head_dim**-0.5
    expected = both(*inputs, scale, instructions)

    def apart(x):
        room = torch.full((x.shape[0], 2, x.shape[1], head_dim + 3), float("nan"), dtype=dtype)
        view = room[:, 1, :, 1 : head_dim + 1]
        view.copy_(x)
        return view

    q, k, v, grad, *lengths = inputs
    views = [apart(x) for x in (q, k, v)]
    out, lse = forward(*views, *lengths, scale, instructions)
    grads = backward(apart(grad), *views, apart(out), lse, *lengths, scale, instructions)
    assert all(map(torch.equal, expected, (out, lse, *grads)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(team, kind):
    """Neither where heads are divided among threads nor where there are more heads than threads."""
    dtype, instructions = kind
    for lengths, heads in (((613,), 1), ((100, 31, 0, 260), 3)):
        inputs = problem(lengths, heads, 24, dtype)
        alone = both(*inputs, 0.2, instructions, threads=1)
        for threads in (2, 3, 7, 64):
            assert all(map(torch.equal, alone, both(*inputs, 0.2, instructions, threads=threads)))


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_native_attention as here
torch.save(here.in_two_dtypes(), sys.argv[2])
"""


def in_two_dtypes():
    torch.manual_seed(5)
    found = _cpu_attention.instructions()
    problems = [
        (problem(lengths, 2, 24, dtype), instructions)
        for (dtype, instructions), lengths in product(
            ((torch.float32, AVX512), (torch.float32, found), (torch.bfloat16, found)), ((1, 5), (131,), (600, 3))
        )
    ]
    return [both(*inputs, 0.2, instructions) for inputs, instructions in problems]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the allocator of glibc to fill memory")
def test_what_the_scratch_memory_held_does_not_matter(tmp_path):
    expected = in_two_dtypes()
    for filling in ("0", "128"):  # none, and 0x7f7f..., which overflows in the first product
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "results")],
            env={**os.environ, "MALLOC_PERTURB_": filling},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        for ours, same in zip(torch.load(tmp_path / "results"), expected, strict=True):
            assert all(map(torch.equal, ours, same))


def test_the_scale_and_the_size_of_scores():
    """Scores beyond the range of the exponentials, of either sign, and a scale that is far from one."""
    for factor, scale in ((1e4, 1.0), (1e-4, 1e4), (30.0, 0.3)):
        q, k, v, grad, *lengths = problem((50,), 1, 8, torch.float32)
        inputs = q * factor, k, v, grad, *lengths
        results = both(*inputs, scale, 1)
        assert all(torch.isfinite(result).all() for result in results)
        exact = plain(*(x.double() if x.is_floating_point() else x for x in inputs), scale)
        # a score of 10^4 is known to 2^-24 of it, and so are, relatively, the weights
        tolerance = 8 * 2.0**-24 * max(1.0, float(exact[1].abs().max()))
        torch.testing.assert_close(results[0].double(), exact[0], rtol=0, atol=tolerance * float(v.abs().max()))
        torch.testing.assert_close(results[1].double(), exact[1], rtol=1e-6, atol=1e-6)


def test_reference_and_library_agree_on_the_log_sum_exp():
    """The one passes it to the other where forward and backward have different backends."""
    q, k, v, grad, *lengths = problem((30, 9), 2, 16, torch.float32)
    _, lse = forward(q, k, v, *lengths, 0.25, 1)
    out, expected = reference.varlen_attention(q, k, v, None, lengths[0], 0.25, None, lengths[1])
    torch.testing.assert_close(lse, expected)
    ours = backward(grad, q, k, v, out, expected, *lengths, 0.25, 1)
    theirs = reference.varlen_attention_backward(grad, q, k, v, out, lse, None, lengths[0], 0.25, None, lengths[1])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
