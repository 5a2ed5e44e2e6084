"""csrc behind ctypes: the EMA against its float64 formula, on the CPU and through the CUDA kernel's host execution."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vjepa.kernels import _native, _native_ema, _native_launch

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


def update_on_cpu(targets, sources, momentum, copies=None, threads=None):
    update = _native_ema.CPUUpdate(targets, sources, copies or ())
    update.threads = threads
    update(momentum)


def grid_of(chunks, elements):
    return _native.Grid(chunks.buffer_info()[0], len(chunks) - 1, chunks[-1], elements)


def cuda_code_on_host(targets, sources, momentum, copies=None, elements=_native_ema.CHUNK_ELEMENTS, scalar=None):
    """What the CUDA kernel does with these tensors: the same tables, the same blocks and threads, on the host."""
    words = _native_ema.words(targets, sources, copies or ())
    chunks = _native_launch.first_chunks(map(torch.Tensor.numel, targets), elements)
    function = _native.library().vjepa_ema_cuda_on_host
    _native.check(function(words.buffer_info()[0], grid_of(chunks, elements), momentum, scalar))


def assert_formula(before, sources, after, copies, momentum=MOMENTUM):
    """Within the rounding of weight, difference, product and sum; copies are the targets rounded once."""
    for k, (old, source, new) in enumerate(zip(before, sources, after, strict=True)):
        exact = momentum * old.double() + (1 - momentum) * source.double()
        step = min(momentum, 1 - momentum) * (source.double() - old.double()).abs()
        bound = UNIT * (3 * step + exact.abs()) * (1 + 1e-6)
        assert torch.all((new.double() - exact).abs() <= bound)
        if copies is not None:
            assert torch.equal(copies[k], new.to(copies[k].dtype))


@pytest.mark.parametrize("shift", [0, 1, 2], ids=["aligned", "misaligned", "aligned to 8 bytes"])
@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("update", [update_on_cpu, cuda_code_on_host], ids=["cpu", "cuda on host"])
def test_ema_is_its_formula(update, source_dtype, copy_dtype, shift):
    sizes = SIZES if update is update_on_cpu else SIZES[:-1]
    targets, sources, copies = tensors(sizes, source_dtype, copy_dtype, shift)
    before = [t.clone() for t in targets]
    update(targets, sources, MOMENTUM, copies)
    assert_formula(before, sources, targets, copies)


@pytest.mark.parametrize("place", range(3), ids=["target", "source", "copy"])
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
def test_a_single_misaligned_tensor(source_dtype, place):
    """Sixteen bytes at a time where all three are aligned to them: `make sanitize` and a GPU see any other access."""
    for shift in (1, 2):
        aligned, shifted = (tensors((67,), source_dtype, torch.bfloat16, by) for by in (0, shift))
        lists = [shifted[k] if k == place else aligned[k] for k in range(3)]
        before = [t.clone() for t in lists[0]]
        cuda_code_on_host(lists[0], lists[1], MOMENTUM, lists[2])
        assert_formula(before, lists[1], lists[0], lists[2])


@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
def test_cuda_code_gives_the_bits_of_the_cpu(source_dtype):
    sizes = (5, 300_007, 0, 65_536)
    results = []
    for update in (update_on_cpu, cuda_code_on_host):
        targets, sources, copies = tensors(sizes, source_dtype, torch.bfloat16)
        update(targets, sources, MOMENTUM, copies)
        results.append((targets, copies))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def updated(threads):
    targets, sources, copies = tensors((2**20 + 3, 1, 2**19 + 1), torch.float32, torch.bfloat16)
    update_on_cpu(targets, sources, MOMENTUM, copies, threads=threads)
    return [*targets, *copies]


@pytest.mark.parametrize("shift", [0, 3], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("copy_dtype", COPIES[1:], ids=str)
def test_copies_that_are_written_past_the_caches(copy_dtype, shift):
    """From 2^22 elements on."""
    targets, sources, copies = tensors((2**22 + 5, 7), torch.bfloat16, copy_dtype, shift)
    before = [t.clone() for t in targets]
    update_on_cpu(targets, sources, MOMENTUM, copies, threads=3)
    assert_formula(before, sources, targets, copies)


def test_neither_the_threads_nor_their_number_change_a_bit(team):
    alone = updated(1)
    for threads in (2, 3, 64):
        assert all(torch.equal(a, b) for a, b in zip(alone, updated(threads), strict=True))


def test_many_tensors_at_once(team):
    sizes = [(n * 7919) % 2003 for n in range(1000)]
    targets, sources, _ = tensors(sizes, torch.float32, None)
    before = [t.clone() for t in targets]
    update_on_cpu(targets, sources, MOMENTUM, threads=3)
    assert_formula(before, sources, targets, None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_computes_with_threads_of_its_own():
    """In an interpreter of its own, because forking one with threads is only right for a moment."""
    code = """
import os, torch
from vjepa.kernels import _native_ema
targets, sources = [torch.zeros(2**21)], [torch.ones(2**21)]
update = _native_ema.CPUUpdate(targets, sources)
update.threads = 2
update(0.5)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # PyTorch's own threads stay behind in the parent, and it would wait for them
    update(0.5)
    os._exit(0 if bool((targets[0] == 0.75).all()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def folded(numel, first, last, folder):
    """`numel` float32 elements that take little memory: the first 4 MiB again and again, and then a last page.

    Returns the tensor, its first piece and its last page; they hold `first` and `last`.
    """
    fold, page, readable, shared, fixed = 1 << 22, 1 << 12, 3, 1, 16
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    room = mmap.mmap(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(fold)
        for offset in range(0, 4 * numel - page, fold):
            size = min(fold, 4 * numel - page - offset)
            assert libc.mmap(start + offset, size, readable, shared | fixed, file.fileno(), 0) == start + offset
    whole = torch.frombuffer(room, dtype=torch.float32)
    piece, end = whole[: fold // 4], whole[-page // 4 :]
    piece.fill_(first)
    end.fill_(last)
    return whole, piece, end


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_beyond_two_to_the_31_elements(tmp_path):
    """All elements of 8 GiB targets; only the last page, beyond 2^31, tells how often it was updated: once."""
    numel = 2**31 + 2**20
    target, piece, end = folded(numel, 1.0, 8.0, tmp_path)
    source, _, _ = folded(numel, 1.0, 0.0, tmp_path)
    update_on_cpu([target], [source], 0.5, threads=2)
    assert torch.equal(end, torch.full_like(end, 4.0))
    assert torch.equal(piece, torch.ones_like(piece))  # equal to its source, it stays, however often it is updated


def test_the_cuda_code_reaches_beyond_two_to_the_31_elements():
    """Only the last chunk of tensors whose other pages no one touches."""
    target, source = torch.empty(2**31 + 67), torch.empty(2**31 + 67)
    target[-67:], source[-67:] = 1.0, 2.0
    words = _native_ema.words([target], [source], ())
    chunks = _native_launch.first_chunks([target.numel()], 2**31)
    assert list(chunks) == [0, 2]
    chunks[0] = -1  # so that the only block does the second chunk
    grid = _native.Grid(chunks.buffer_info()[0], 1, 1, 2**31)
    _native.check(_native.library().vjepa_ema_cuda_on_host(words.buffer_info()[0], grid, 0.5, None))
    assert torch.equal(target[-67:], torch.full((67,), 1.5))


def test_from_several_threads_at_once():
    def work(number):
        return all(torch.equal(a, b) for a, b in zip(alone, updated(2), strict=True))

    alone = updated(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


def test_the_momentum_may_be_read_from_the_device():
    results = []
    for momentum, scalar in ((MOMENTUM, None), (0.5, ctypes.c_double(MOMENTUM)), (7.0, ctypes.c_double(MOMENTUM))):
        targets, sources, copies = tensors((65, 3), torch.float32, torch.bfloat16)
        cuda_code_on_host(targets, sources, momentum, copies, scalar=scalar and ctypes.addressof(scalar))
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
    update_on_cpu([target], [torch.zeros_like(values)], 1.0, [copy])
    expected = target.to(copy_dtype)
    number = ~expected.isnan()
    assert torch.equal(copy.isnan(), ~number)
    assert torch.equal(copy[number].view(torch.int16), expected[number].view(torch.int16))


def test_every_finite_float16_is_read_exactly_and_no_other_passes_for_finite():
    source = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    target = torch.zeros(2**16)
    update_on_cpu([target], [source], 0.0)
    finite = source.isfinite()
    assert torch.equal(target.isfinite(), finite)
    assert torch.equal(target[finite], source[finite].float())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ends_of_the_momentum(momentum):
    targets, sources, _ = tensors((1009,), torch.float32, None)
    expected = targets[0].clone() if momentum else sources[0].clone()
    update_on_cpu(targets, sources, momentum)
    assert torch.equal(targets[0], expected)


@pytest.mark.parametrize("momentum", [0.3, 0.5, 0.9999])
def test_a_target_equal_to_its_source_does_not_drift(momentum):
    targets, _, _ = tensors((1009,), torch.float32, None)
    before = targets[0].clone()
    for _ in range(100):
        update_on_cpu(targets, [before], momentum)
    assert torch.equal(targets[0], before)


@pytest.mark.parametrize("momentum", [0.1, 0.499, 0.5, 0.75])
def test_both_ends_of_the_step_keep_the_formula(momentum):
    targets, sources, copies = tensors((1009,), torch.float32, torch.float16)
    before = [t.clone() for t in targets]
    update_on_cpu(targets, sources, momentum, copies)
    assert_formula(before, sources, targets, copies, momentum)


def test_chunks_cover_every_element_once():
    """Of tensors of all sorts, also empty ones at the ends: an element done twice would go further than once."""
    for sizes in ((0, 1, 64, 65, 1009), (0, 0, 63, 0, 128, 0), (1,) * 100, (640,)):
        targets, sources = [torch.zeros(size) for size in sizes], [torch.ones(size) for size in sizes]
        cuda_code_on_host(targets, sources, 0.75, elements=64)
        assert all(torch.equal(target, torch.full_like(target, 0.25)) for target in targets)


def test_nothing_to_do():
    update_on_cpu([], [], 0.5)
    cuda_code_on_host([], [], 0.5)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"momentum": 1.5}, _native.NativeError, "momentum is not between 0 and 1"),
        ({"momentum": float("nan")}, _native.NativeError, "momentum is not between 0 and 1"),
        ({"threads": 0}, _native.NativeError, "number of threads is less than 1"),
    ],
)
def test_refusals_are_sentences(change, error, sentence):
    target = torch.zeros(4)
    with pytest.raises(error, match=sentence):
        update_on_cpu(**{"targets": [target], "sources": [torch.ones(4)], "momentum": 0.5, **change})
    assert not target.any()


def test_memory_that_is_written_belongs_to_one_tensor():
    storage, other = torch.zeros(64), torch.zeros(64)
    pairs = {
        "two targets": ([storage[:40], storage[39:]], [other[:40], other[:25]]),
        "a target and a source": ([storage[:40]], [storage[24:]]),
        "a source and a target": ([storage[24:]], [storage[:40]]),
        "a target in the first of two sources": ([storage[50:60], other[:2]], [storage[48:58], storage[:2]]),
        "twice the same": ([storage, storage], [other, other]),
    }
    for name, (targets, sources) in pairs.items():
        with pytest.raises(ValueError, match=r"\] must have memory of its own, got a tensor that shares it with"):
            update_on_cpu(targets, [source + 0 if "two targets" in name else source for source in sources], 0.5)
        assert not storage.any()
    with pytest.raises(ValueError, match=r"must have memory of its own"):  # beyond a source that lies in another
        update_on_cpu([storage[50:60], other[:4], other[4:64]], [other[:10] + 1, storage[10:14], storage[:60]], 0.5)
    assert not storage.any()
    update_on_cpu([storage[:32], storage[32:]], [other[:32] + 1] * 2, 0.5)  # neighbours, one source
    assert torch.equal(storage, torch.full((64,), 0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": None}, "a pointer to at least one element is null"),
        ({"copy_dtype": 2}, "a pointer to at least one element is null"),
        ({"numel": -1}, "a size is negative"),
        ({"numel": 2**61}, "a size is negative, too large"),
        ({"source_dtype": 3}, "a dtype is none of those"),
        ({"copy_dtype": 0}, "a dtype is none of those"),
        ({"source": 2}, "a pointer is not aligned"),
    ],
)
def test_the_library_checks_the_table_itself(change, sentence):
    target, source = torch.zeros(4), torch.ones(4)
    table = _native.table_of(_native.EMAEntry, _native_ema.words([target], [source], ()))
    for name, value in change.items():
        setattr(table[0], name, value)
    with pytest.raises(_native.NativeError, match=sentence):
        _native.check(_native.library().vjepa_ema_check(table, 1))


def test_every_status_has_its_own_sentence():
    library = _native.library()
    sentences = {library.vjepa_status_string(status) for status in range(12)}
    assert len(sentences) == 12
    assert b"unknown status" not in sentences


def test_cuda_without_a_gpu_or_without_the_part_is_refused():
    if _native.cuda_available()[0]:
        pytest.skip("there is a GPU")
    assert _native.cuda_available()[1]
    with pytest.raises(_native.NativeError):
        _native.check(_native.library().vjepa_ema_cuda(16, _native.Grid(16, 1, 1, 4), 0.5, None, 0, None))
    with pytest.raises(_native.NativeError):
        _native.check(_native.library().vjepa_write_cuda(16, (ctypes.c_int64 * 1)(), 1, 0, None))


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
        update_on_cpu(targets, sources, MOMENTUM, copies)
        _native_ema.CUDAUpdate(on_gpu[0], on_gpu[1], on_gpu[2] or ())(MOMENTUM)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(targets, on_gpu[0], strict=True))
        if copies is not None:
            assert all(torch.equal(a, b.cpu()) for a, b in zip(copies, on_gpu[2], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
def test_a_cuda_graph_reads_the_momentum_anew():
    targets, sources, _ = tensors((1009, 3), torch.float32, None)
    targets, sources = [t.cuda() for t in targets], [s.cuda() for s in sources]
    momentum = torch.ones((), dtype=torch.float64, device="cuda")
    update = _native_ema.CUDAUpdate(targets, sources)
    for warm in (False, True):  # whether the table is on the device already
        if warm:
            update(momentum)
        momentum.fill_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update(momentum)
        for value in (1.0, 0.0):
            momentum.fill_(value)
            expected = [value * t + (1 - value) * s for t, s in zip(targets, sources, strict=True)]
            graph.replay()
            assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))
        for target in targets:
            target.zero_()


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
def test_a_table_is_written_again_on_another_stream():
    targets, sources, _ = tensors((1009, 3), torch.float32, None)
    on_gpu, sources_there = [t.cuda() for t in targets], [s.cuda() for s in sources]
    update = _native_ema.CUDAUpdate(on_gpu, sources_there)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            update(MOMENTUM)
        torch.cuda.current_stream().wait_stream(stream)
        update_on_cpu(targets, sources, MOMENTUM)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(targets, on_gpu, strict=True))
