"""csrc behind ctypes: the EMA against its float64 formula, on the CPU and through the CUDA kernel's host execution."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch

from vjepa.kernels import _native

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

SIZES = (0, 1, 7, 127, 1009, 4096, 2**20 + 3)
SOURCES = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (None, torch.bfloat16, torch.float16)
MOMENTUM = 0.9987
UNIT = 2.0**-24  # half the distance between 1 and the next float32


def tensors(sizes, source_dtype, copy_dtype, shift=0):
    """Targets, sources and NaN-filled copies of the sizes; views that begin `shift` elements into their storage."""
    generator = torch.Generator().manual_seed(sum(sizes) + shift)

    def view(storage):
        return storage[shift:]

    targets = [view(torch.randn(n + shift, generator=generator)) for n in sizes]
    sources = [view(torch.randn(n + shift, generator=generator).to(source_dtype)) for n in sizes]
    if copy_dtype is None:
        return targets, sources, None
    return targets, sources, [view(torch.full((n + shift,), torch.nan, dtype=copy_dtype)) for n in sizes]


def cuda_code_on_host(targets, sources, momentum, copies=None, chunk_elements=_native.CHUNK_ELEMENTS):
    """What the CUDA kernel does with these tensors: the same tables, the same blocks and threads, on the host."""
    table = _native._entries(targets, sources, copies, "cpu")
    chunks = _native._plan(table, chunk_elements)
    _native._check(_native._library().vjepa_ema_cuda_on_host(table, chunks, len(chunks), momentum))
    return chunks


def assert_formula(before, sources, after, copies, momentum=MOMENTUM):
    """Within the rounding of weight, difference, product and sum; copies are the targets rounded once."""
    for k, (old, source, new) in enumerate(zip(before, sources, after, strict=True)):
        exact = momentum * old.double() + (1 - momentum) * source.double()
        step = min(momentum, 1 - momentum) * (source.double() - old.double()).abs()
        bound = UNIT * (3 * step + exact.abs()) * (1 + 1e-6)
        assert torch.all((new.double() - exact).abs() <= bound)
        if copies is not None:
            assert torch.equal(copies[k], new.to(copies[k].dtype))


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("update", [_native.ema_update_cpu, cuda_code_on_host], ids=["cpu", "cuda on host"])
def test_ema_is_its_formula(update, source_dtype, copy_dtype, shift):
    sizes = SIZES if update is _native.ema_update_cpu else SIZES[:-1]
    targets, sources, copies = tensors(sizes, source_dtype, copy_dtype, shift)
    before = [t.clone() for t in targets]
    update(targets, sources, MOMENTUM, copies)
    assert_formula(before, sources, targets, copies)


@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
def test_cuda_code_gives_the_bits_of_the_cpu(source_dtype):
    sizes = (5, 300_007, 0, 65_536)
    results = []
    for update in (_native.ema_update_cpu, cuda_code_on_host):
        targets, sources, copies = tensors(sizes, source_dtype, torch.bfloat16)
        update(targets, sources, MOMENTUM, copies)
        results.append((targets, copies))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_thread_count_does_not_change_a_bit():
    results = []
    for threads in (1, 2, 3, 64):
        targets, sources, copies = tensors((2**20 + 3, 1, 2**19 + 1), torch.float32, torch.bfloat16)
        _native.ema_update_cpu(targets, sources, MOMENTUM, copies, threads=threads)
        results.append([*targets, *copies])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("copy_dtype", COPIES[1:], ids=str)
def test_copies_round_as_pytorch_does(copy_dtype):
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 2**16, dtype=torch.int32) << 16 | 0x8000  # half-way between two bfloat16
    half = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = half.nextafter(torch.tensor(torch.inf)).view(torch.int32)
    values = torch.cat([bits, ties, half.view(torch.int32), between]).view(torch.float32)
    copy = torch.empty(len(values), dtype=copy_dtype)
    target = values.clone()
    _native.ema_update_cpu([target], [torch.zeros_like(values)], 1.0, [copy])
    expected = target.to(copy_dtype)
    number = ~expected.isnan()
    assert torch.equal(copy.isnan(), ~number)
    assert torch.equal(copy[number].view(torch.int16), expected[number].view(torch.int16))


def test_every_finite_float16_is_read_exactly_and_no_other_passes_for_finite():
    source = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    target = torch.zeros(2**16)
    _native.ema_update_cpu([target], [source], 0.0)
    finite = source.isfinite()
    assert torch.equal(target.isfinite(), finite)
    assert torch.equal(target[finite], source[finite].float())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ends_of_the_momentum(momentum):
    targets, sources, _ = tensors((1009,), torch.float32, None)
    expected = targets[0].clone() if momentum else sources[0].clone()
    _native.ema_update_cpu(targets, sources, momentum)
    assert torch.equal(targets[0], expected)


@pytest.mark.parametrize("momentum", [0.3, 0.5, 0.9999])
def test_a_target_equal_to_its_source_does_not_drift(momentum):
    targets, _, _ = tensors((1009,), torch.float32, None)
    before = targets[0].clone()
    for _ in range(100):
        _native.ema_update_cpu(targets, [before], momentum)
    assert torch.equal(targets[0], before)


@pytest.mark.parametrize("momentum", [0.1, 0.499, 0.5, 0.75])
def test_both_ends_of_the_step_keep_the_formula(momentum):
    targets, sources, copies = tensors((1009,), torch.float32, torch.float16)
    before = [t.clone() for t in targets]
    _native.ema_update_cpu(targets, sources, momentum, copies)
    assert_formula(before, sources, targets, copies, momentum)


def test_chunks_cover_every_element_once():
    targets, sources, _ = tensors((0, 1, 64, 65, 1009), torch.float32, None)
    chunks = cuda_code_on_host(targets, sources, 0.5, chunk_elements=64)
    covered = {k: [] for k in range(len(targets))}
    for chunk in chunks:
        assert 0 < chunk.end - chunk.begin <= 64
        covered[chunk.tensor] += range(chunk.begin, chunk.end)
    assert covered == {k: list(range(target.numel())) for k, target in enumerate(targets)}


def test_misaligned_tensors_are_not_packed():
    targets, sources, copies = tensors((64, 64), torch.bfloat16, torch.bfloat16)
    storage = torch.zeros(65, dtype=torch.bfloat16)
    chunks = cuda_code_on_host(targets, [sources[0], storage[1:]], 0.5, copies)
    assert [chunk.packed for chunk in chunks] == [1, 0]


def test_nothing_to_do():
    _native.ema_update_cpu([], [], 0.5)
    assert len(cuda_code_on_host([], [], 0.5)) == 0


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"momentum": 1.5}, _native.NativeError, "momentum is not between 0 and 1"),
        ({"momentum": float("nan")}, _native.NativeError, "momentum is not between 0 and 1"),
        ({"threads": 0}, _native.NativeError, "number of threads is less than 1"),
        ({"sources": []}, ValueError, "sources: expected 1 tensors, one for each target, got 0"),
        ({"copies": []}, ValueError, "copies: expected 1 tensors, one for each target, got 0"),
        ({"sources": [torch.zeros(3)]}, ValueError, r"sources\[0\]: expected shape \(4,\), got \(3,\)"),
        (
            {"sources": [torch.zeros(4, dtype=torch.int32)]},
            TypeError,
            r"sources\[0\]: expected dtype .* got torch.int32",
        ),
        ({"targets": [torch.zeros(4, dtype=torch.bfloat16)]}, TypeError, r"targets\[0\]: expected dtype torch.float32"),
        ({"copies": [torch.zeros(4)]}, TypeError, r"copies\[0\]: expected dtype .* got torch.float32"),
        (
            {"sources": [torch.zeros(8)[::2]]},
            ValueError,
            r"sources\[0\]: expected a contiguous tensor, got strides \(2,\)",
        ),
        ({"sources": [torch.zeros(4, device="meta")]}, ValueError, r"sources\[0\]: expected device cpu, got meta"),
    ],
)
def test_refusals_are_sentences(change, error, sentence):
    arguments = {"targets": [torch.zeros(4)], "sources": [torch.ones(4)], "momentum": 0.5, **change}
    with pytest.raises(error, match=sentence):
        _native.ema_update_cpu(**arguments)
    assert not any(target.float().any() for target in arguments["targets"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": None}, "a pointer to at least one element is null"),
        ({"copy_dtype": 2}, "a pointer to at least one element is null"),
        ({"numel": -1}, "a size is negative"),
        ({"source_dtype": 3}, "a dtype is none of those"),
        ({"copy_dtype": 0}, "a dtype is none of those"),
        ({"source": 2}, "a pointer is not aligned"),
    ],
)
def test_the_library_checks_the_table_itself(change, sentence):
    target, source = torch.zeros(4), torch.ones(4)
    table = _native._entries([target], [source], None, "cpu")
    for name, value in change.items():
        setattr(table[0], name, value)
    with pytest.raises(_native.NativeError, match=sentence):
        _native._check(_native._library().vjepa_ema_cpu(table, 1, 0.5, 1))
    assert not target.any()


def test_a_short_chunk_table_is_refused():
    table = _native._entries([torch.zeros(100)], [torch.zeros(100)], None, "cpu")
    chunks, count = (_native.Chunk * 1)(), ctypes.c_int64()
    status = _native._library().vjepa_ema_plan(table, 1, 64, chunks, 1, ctypes.byref(count))
    with pytest.raises(_native.NativeError, match="the chunk table is too small"):
        _native._check(status)


def test_every_status_has_its_own_sentence():
    library = _native._library()
    sentences = {library.vjepa_status_string(status) for status in range(10)}
    assert len(sentences) == 10
    assert b"unknown status" not in sentences


def test_cuda_without_a_gpu_or_without_the_part_is_refused():
    if _native.cuda_available()[0]:
        pytest.skip("there is a GPU")
    assert _native.cuda_available()[1]
    with pytest.raises(_native.NativeError):
        _native._check(_native._library().vjepa_ema_cuda(ctypes.c_void_p(16), ctypes.c_void_p(16), 1, 0.5, 0, None))


def test_build_info_says_what_was_built_and_no_date():
    info = _native.build_info()
    assert set(info) == {"version", "compiler", "instruction_sets", "cuda", "cuda_archs"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert bool(info["cuda"]) == bool(info["cuda_archs"]) == (_native._record()["cuda"] is None)
    assert "20" not in json.dumps(info["instruction_sets"])


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
def test_gpu_gives_the_bits_of_the_cpu(source_dtype, copy_dtype):
    for shift in (0, 1):
        targets, sources, copies = tensors(SIZES, source_dtype, copy_dtype, shift)
        on_gpu = [None if part is None else [t.cuda()[:] for t in part] for part in (targets, sources, copies)]
        _native.ema_update_cpu(targets, sources, MOMENTUM, copies)
        _native.ema_update_cuda(on_gpu[0], on_gpu[1], MOMENTUM, on_gpu[2])
        assert all(torch.equal(a, b.cpu()) for a, b in zip(targets, on_gpu[0], strict=True))
        if copies is not None:
            assert all(torch.equal(a, b.cpu()) for a, b in zip(copies, on_gpu[2], strict=True))
