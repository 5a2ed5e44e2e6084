"""The native gradient norms: one result, bit for bit, for all threads, instruction sets and the CUDA kernels' code.

The loops of a CPU are cloned for each instruction set; the CUDA kernels executed on the host are compiled for the oldest.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import pytest
import torch

from vjepa.kernels import _native, _native_launch
from vjepa.kernels import _native_gradient_norm as native

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

SIZES = (0, 1, 7, 31, 33, 127, 1009, 2048, 2049, 4096, 20_011, 65_536, 65_537, 2**20 + 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = 2.0**-24 * (1 + 1e-6)  # relative, of one float64 number to float32


def draw(sizes, dtype=torch.float32, shift=0):
    """Views that begin `shift` elements into their storage; magnitudes over six decades, to tell orders of sums apart."""
    generator = torch.Generator().manual_seed(sum(sizes) + shift)

    def values(n):
        return torch.randn(n, generator=generator) * 10 ** (6 * torch.rand(n, generator=generator) - 4)

    return [torch.cat((torch.full((shift,), torch.nan), values(n))).to(dtype)[shift:] for n in sizes]


def exact(gradients):
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in gradients))


def assert_rounded_once(norms, *groups):
    for norm, group in zip(norms.tolist(), groups, strict=True):
        assert abs(norm - exact(group)) <= exact(group) * ROUNDING


def grid_of(gradients, elements):
    """And what must stay in memory for it."""
    chunks = _native_launch.first_chunks(map(torch.Tensor.numel, gradients), elements)
    return _native.Grid(chunks.buffer_info()[0], len(chunks) - 1, chunks[-1], elements), chunks


def cuda_code_on_host(gradients, sizes, chunk_elements=native.CHUNK_ELEMENTS):
    """What the CUDA kernels do with these tensors: the same tables, the same blocks and threads, on the host."""
    words, (grid, chunks) = native.words(gradients, sizes), grid_of(gradients, chunk_elements)
    partials = torch.full((chunks[-1],), torch.nan, dtype=torch.float64)
    norms = torch.full((len(sizes),), torch.nan)
    function = _native.library().vjepa_norms_cuda_on_host
    written = partials.data_ptr(), norms.data_ptr()
    _native.check(function(words.buffer_info()[0], grid, native.offsets_of(chunks, sizes), len(sizes), *written))
    return norms


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_in_the_same_bits_everywhere(dtype, shift):
    """Each size alone, too: a group of many would hide what a small one has wrong."""
    gradients = draw(SIZES, dtype, shift)
    sizes = [1] * len(gradients)
    norms = native.norms_cpu(gradients, sizes)
    assert_rounded_once(norms, *([gradient] for gradient in gradients))
    assert torch.equal(norms, cuda_code_on_host(gradients, sizes))
    assert torch.equal(norms, native.norms_cpu([gradient.clone() for gradient in gradients], sizes))  # aligned
    together = native.norms_cpu(gradients, [5, len(gradients) - 5])
    assert_rounded_once(together, gradients[:5], gradients[5:])
    assert torch.equal(together, cuda_code_on_host(gradients, [5, len(gradients) - 5]))


RUN, ROW, SMALL = 2048, 32, 2.0**-12


def order_shown(dtype, shift, runs=1024):
    """The sum of each run's first lane is just half-way between two float32, as the square of a norm, and small squares
    that follow there, one at a time, are lost. Shifted to other lanes they are summed first, and turn the scale."""
    table = torch.zeros(runs, RUN // ROW, ROW)
    table[:, :4, 0] = torch.tensor([2.0**15, 2.0**3, 2.0**3, 2.0**-9])  # squares: (2^24 + 1)^2 / 2^18
    table[:, 4:, shift] = SMALL
    return table.flatten().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_the_sum_is_the_same_for_all_threads_and_on_cuda(team, dtype):
    half_way = 2.0**15 * 32
    for shift, expected in ((0, half_way), (1, half_way * (1 + 2.0**-23)), (16, half_way * (1 + 2.0**-23))):
        gradient = order_shown(dtype, shift)
        for threads in (1, 2, 3, 5, 64):
            assert native.norms_cpu([gradient], [1], threads=threads).item() == expected
        assert cuda_code_on_host([gradient], [1]).item() == expected
        assert cuda_code_on_host([torch.cat((gradient[:1], gradient))[1:]], [1]).item() == expected  # misaligned


def test_many_tensors_in_many_groups(team):
    """More groups than fit into one launch, some of them empty."""
    gradients = draw([(n * 7919) % 2003 for n in range(1000)])
    sizes = [(n * 31) % 13 for n in range(500)]
    sizes = sizes[: next(k for k in range(500) if sum(sizes[:k]) > 980)]
    sizes[-1] += 1000 - sum(sizes)
    norms = native.norms_cpu(gradients, sizes, threads=3)
    parts = torch.arange(1000).split(sizes)
    assert len(parts) > 64
    assert_rounded_once(norms, *([gradients[k] for k in part] for part in parts))
    assert torch.equal(norms, cuda_code_on_host(gradients, sizes))


def test_chunks_of_another_size_are_summed_too():
    gradients = draw((0, 1, 64, 65, 20_011))
    for chunk_elements in (4, 64, 100, 2**20):
        norms = cuda_code_on_host(gradients, [2, 1, 2], chunk_elements)
        assert_rounded_once(norms, gradients[:2], gradients[2:3], gradients[3:])


def test_what_is_not_finite_is_found_at_every_place():
    gradient = torch.zeros(RUN + 67)
    for place in (*range(0, RUN + 67, 37), RUN + 66):
        for value in (torch.nan, torch.inf):
            gradient[place] = value
            for norm in (native.norms_cpu([gradient], [1]), cuda_code_on_host([gradient], [1])):
                assert not norm.isfinite()
        gradient[place] = 0


def unwritten(numel):
    """bfloat16 zeros that take no memory until they are written: pages that are only read are one page."""
    room = mmap.mmap(-1, 2 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_beyond_two_to_the_31_elements():
    gradient = unwritten(2**31 + 67)
    gradient[0], gradient[2**31 - 1], gradient[2**31], gradient[-1] = 1.0, 2.0, 4.0, 10.0
    assert native.norms_cpu([gradient], [1], threads=2).item() == 11.0
    words, (grid, chunks) = native.words([gradient], [1]), grid_of([gradient], 2**31)
    assert list(chunks) == [0, 2]
    chunks[0], grid.num_chunks = -1, 1  # so that the only block does the second chunk
    offsets, partials, norms = (ctypes.c_int64 * 2)(0, 1), torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    function = _native.library().vjepa_norms_cuda_on_host
    _native.check(function(words.buffer_info()[0], grid, offsets, 1, partials.data_ptr(), norms.data_ptr()))
    assert partials.item() == 4.0**2 + 10.0**2


def test_nothing_to_do():
    assert native.norms_cpu([], []).shape == (0,)
    assert torch.equal(native.norms_cpu([], [0, 0]), torch.zeros(2))
    assert torch.equal(cuda_code_on_host([], [0, 0]), torch.zeros(2))
    assert torch.equal(native.norms_cpu([torch.zeros(0)], [1, 0]), torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"values": None}, "a pointer to at least one element is null"),
        ({"numel": -1}, "a size is negative"),
        ({"numel": 2**61}, "a size is negative, too large"),
        ({"dtype": 3}, "a dtype is none of those"),
        ({"dtype": -1}, "a dtype is none of those"),
        ({"values": 2}, "a pointer is not aligned"),
        ({"group": 2}, "a tensor names no group that is there"),
        ({"group": -1}, "a tensor names no group that is there"),
        ({"group": 0}, "a tensor names no group that is there"),  # after one of group 1
    ],
)
def test_the_library_checks_the_table_itself(change, sentence):
    gradients = draw((3, 4, 5))
    table = _native.table_of(_native.NormEntry, native.words(gradients, [1, 2]))
    norms, library = torch.full((2,), 7.0), _native.library()
    for name, value in change.items():
        setattr(table[2], name, value)
    with pytest.raises(_native.NativeError, match=sentence):
        _native.check(library.vjepa_norms_cpu(table, 3, 2, norms.data_ptr(), 1))
    with pytest.raises(_native.NativeError, match=sentence):
        _native.check(library.vjepa_norms_check(table, 3, 2))
    assert torch.equal(norms, torch.full((2,), 7.0))


def test_the_library_checks_the_rest():
    gradients = draw((3, 4))
    table = _native.table_of(_native.NormEntry, native.words(gradients, [1, 1]))
    norms, library, partials = torch.zeros(2), _native.library(), torch.zeros(2, dtype=torch.float64)
    address, (grid, chunks) = norms.data_ptr(), grid_of(gradients, 64)
    right, wrong = native.offsets_of(chunks, [1, 1]), (ctypes.c_int64 * 3)(0, 3, 2)
    short = _native.Grid(grid.first_chunks, 2, 1, 64)
    assert list(right) == [0, 1, 2]
    refused = [
        (library.vjepa_norms_cpu(table, 2, 2, address, 0), "the number of threads is less than 1"),
        (library.vjepa_norms_cpu(table, 2, 2, None, 1), "is null"),
        (library.vjepa_norms_cpu(None, 2, 2, address, 1), "is null"),
        (library.vjepa_norms_cpu(table, -1, 2, address, 1), "a size is negative"),
        (library.vjepa_norms_cpu(table, 2, -1, address, 1), "a size is negative"),
    ]
    for name, rest in (("vjepa_norms_cuda_on_host", ()), ("vjepa_norms_cuda", (0, None))):
        if rest and not _native.build_info()["cuda"]:
            continue
        function, addresses = getattr(library, name), (partials.data_ptr(), address)
        refused += [
            (function(table, grid, wrong, 2, *addresses, *rest), "a tensor names no group"),
            (function(table, short, right, 2, *addresses, *rest), "a tensor names no group"),
            (function(table, grid, right, -1, *addresses, *rest), "a size is negative"),
            (function(table, grid, None, 2, *addresses, *rest), "is null"),
            (function(table, grid, right, 2, None, address, *rest), "is null"),
            (function(table, grid, right, 2, partials.data_ptr(), None, *rest), "is null"),
            (function(None, grid, right, 2, *addresses, *rest), "is null"),
            (function(table, None, right, 2, *addresses, *rest), "is null"),
        ]
    for status, sentence in refused:
        with pytest.raises(_native.NativeError, match=sentence):
            _native.check(status)
    assert not norms.any()


def test_cuda_without_a_gpu_or_without_the_part_is_refused():
    if _native.cuda_available()[0]:
        pytest.skip("there is a GPU")
    offsets = (ctypes.c_int64 * 2)(0, 1)
    with pytest.raises(_native.NativeError):
        _native.check(_native.library().vjepa_norms_cuda(16, _native.Grid(16, 1, 1, 64), offsets, 1, 16, 16, 0, None))


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_gives_the_bits_of_the_cpu(dtype):
    for shift in (0, 1):
        gradients = [*draw(SIZES, dtype, shift), order_shown(dtype, 0), order_shown(dtype, 1)]
        on_gpu = [torch.cat((t.new_zeros(shift), t)).cuda()[shift:] for t in gradients]
        for sizes in ([1] * len(gradients), [5, 0, len(gradients) - 5]):
            assert torch.equal(native.norms_cuda(on_gpu, sizes).cpu(), native.norms_cpu(gradients, sizes))


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
def test_a_cuda_graph_reads_the_gradients_anew():
    gradients = [gradient.cuda() for gradient in draw((1009, 3, 70_000))]
    native.norms_cuda(gradients, [1, 2])  # the table goes to the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norms = native.norms_cuda(gradients, [1, 2])
    for gradient in gradients:
        gradient.mul_(2)
    graph.replay()
    assert torch.equal(norms, native.norms_cuda(gradients, [1, 2]))
