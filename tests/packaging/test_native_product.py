"""The native products of float32 by tiles of bfloat16: accuracy, what is read and written, what is refused."""

from __future__ import annotations

import ctypes
import mmap
from itertools import product as every

import pytest
import torch

from vjepa.kernels import _cpu_tiles, _native
from vjepa.kernels._cpu_tiles import TILES, TILES_IN_SOFTWARE

THERE = _cpu_tiles.instructions()
pytestmark = pytest.mark.skipif(not THERE, reason=_native.available()[1] or "the processor has no AVX-512")
without_tiles = pytest.mark.skipif(not THERE & TILES, reason="the processor, or the system, has no tiles of AMX")
KINDS = [pytest.param(TILES_IN_SOFTWARE, id="software"), pytest.param(TILES, id="tiles", marks=without_tiles)]
# Rows, columns, summands: around a tile, two of them, a step of 32 and a block of 384 summands; and none.
SIZES = [(1, 1, 1), (16, 16, 32), (15, 17, 31), (33, 47, 65), (32, 64, 96), (70, 20, 400), (3, 40, 0), (0, 5, 7)]
LARGE = [(300, 270, 1000), (129, 4130, 40)]  # several blocks of rows for each thread, of summands and of columns
GUARD = 7.0
INF, NAN = float("inf"), float("nan")


def by_columns(matrix):
    return matrix.T.contiguous().T


def with_gaps(matrix):
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 5), NAN)
    wide[:, 2:-3] = matrix
    return wide[:, 2:-3]


LAYOUTS = [lambda matrix: matrix, by_columns, with_gaps, lambda matrix: with_gaps(matrix.T).T]


def run(a, b, bias=None, added_to=None, kind=TILES_IN_SOFTWARE, threads=2):
    """The product, written into a matrix with gaps whose surroundings must stay."""
    rows, columns = a.shape[0], b.shape[1]
    storage = torch.full((rows + 2, columns + 7), GUARD)
    out = storage[1:-1, 3:-4]
    out.copy_(added_to) if added_to is not None else out.fill_(NAN)
    given = describe(a, b, bias, out, added_to is not None, kind)
    _native.check(_cpu_tiles._library().vjepa_product_cpu(given, threads))
    found = out.clone()
    out.fill_(GUARD)
    assert torch.equal(storage, torch.full_like(storage, GUARD))
    return found


def describe(a, b, bias, out, accumulate, kind):
    operands = (_cpu_tiles.Operand(x.data_ptr(), *x.stride()) for x in (a, b))
    address = None if bias is None else bias.data_ptr()
    return _cpu_tiles.Product(
        *operands, address, out.data_ptr(), out.stride(0), *out.shape, a.shape[1], accumulate, kind
    )


def draw(size):
    rows, columns, depth = size
    return torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns), torch.randn(rows, columns)


def assert_accurate(ours, same_dtype, exact):
    """The rule of tests/kernels: at most twice PyTorch's own error in the same dtype, or two roundings."""
    if not exact.numel():
        return
    rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, same_dtype))
    assert error <= 2 * max(allowed, rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_accuracy_for_all_layouts(size, kind):
    a, b, bias, before = draw(size)
    exact, plain = a.double() @ b.double(), a @ b
    found = run(a, b, kind=kind)
    assert_accurate(found, plain, exact)
    for change_a, change_b in every(LAYOUTS, LAYOUTS):
        assert torch.equal(run(change_a(a), change_b(b), kind=kind), found)
    assert_accurate(run(a, b, bias, kind=kind), plain + bias, exact + bias)
    added = run(a, b, bias, before, kind)
    assert_accurate(added, before + plain + bias, before.double() + exact + bias)


@pytest.mark.parametrize(
    "size", [pytest.param(x, marks=without_tiles) for x in (*LARGE, (40, 24, 6272), (24, 1536, 1536))]
)
def test_accuracy_of_long_sums_and_many_columns(size):
    a, b, bias, before = draw(size)
    exact, plain = a.double() @ b.double() + bias, torch.addmm(bias, a, b)
    assert_accurate(run(a, b, bias, kind=TILES), plain, exact)
    added = run(by_columns(a), b, bias, before, TILES)
    assert_accurate(added, torch.addmm(before, a, b) + bias, exact + before)


@without_tiles
@pytest.mark.parametrize("size", [*SIZES, (70, 300, 420)], ids=str)
def test_tiles_have_the_bits_of_those_in_software(size):
    a, b, bias, before = draw(size)
    a *= torch.exp(20 * torch.randn(size[0], 1))  # from 1e-26 to 1e26
    b *= torch.exp(3 * torch.randn(size[1]))
    a.view(-1)[::17], b.view(-1)[::19] = 0, -0.0
    for arguments in ((a, b), (by_columns(a), by_columns(b), bias, before)):
        hard, soft = (run(*arguments, kind=kind) if len(arguments) == 2 else run(*arguments, kind) for kind in (1, 2))
        assert torch.equal(hard.view(torch.int32), soft.view(torch.int32))


@pytest.mark.parametrize(
    ("kind", "size"),
    [(TILES_IN_SOFTWARE, (70, 90, 100)), *(pytest.param(TILES, size, marks=without_tiles) for size in LARGE)],
)
def test_the_same_bits_for_any_number_of_threads_and_any_time(team, kind, size):
    a, b, bias, before = draw(size)
    found = run(a, b, bias, before, kind, 1)
    for threads in (1, 2, 3, 5):
        assert torch.equal(run(a, b, bias, before, kind, threads), found)
    rows = run(a[16:50].contiguous(), b, bias, before[16:50], kind, 2)  # nor do they on the rows around them
    assert torch.equal(rows, found[16:50])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_infinities_and_none(kind, value):
    a, b, bias, before = draw((40, 50, 420))
    a[3, 7] = a[20, 400] = value
    b[7, 30] = 0.0  # NaN times infinity
    b[9, 40], b[11, 40], b[400, 41] = 1.0, value, 1.0
    a[35, 11] = -value
    for arguments in ((a, b), (by_columns(a), by_columns(b), bias, before)):
        found = run(*arguments, kind=kind) if len(arguments) == 2 else run(*arguments, kind)
        plain = a @ b if len(arguments) == 2 else a @ b + bias + before
        finite = plain.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert torch.equal(found[~finite].nan_to_num(5.0), plain[~finite].nan_to_num(5.0))
        torch.testing.assert_close(found[finite], plain[finite], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [3, 20, 37])
def test_one_infinity_in_either_operand(kind, place):
    """In the first, the second and the last, single one of the panels that are multiplied in pairs."""
    for which in range(2):
        a, b, *_ = draw((40, 40, 50))
        (a if which == 0 else b.T)[place, 9] = INF
        found, plain = run(a, b, kind=kind), a @ b
        finite = plain.isfinite()
        assert torch.equal(found[~finite], plain[~finite])
        torch.testing.assert_close(found[finite], plain[finite], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_beyond_the_largest_number_are_never_finite(kind):
    """Of finite numbers: infinite as in PyTorch, or NaN where products of parts overflow in both directions."""
    a, b, *_ = draw((40, 50, 100))
    assert (a @ b != 0).all()
    assert not run(a * 1e25, b * 1e25, kind=kind).isfinite().any()
    assert not run(torch.full((1, 1), 1.9e30), torch.full((1, 1), 1.7e30), kind=kind).isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_of_one_product_is_below_its_24th_bit(kind):
    """Of each; as much again comes from the rounding of the largest sum, a hundredth of that from all others."""
    a, b, *_ = draw((300, 300, 1))
    a[0], b[0, 0] = 1 + 2**-8 - 2**-17, 1 + 2**-8 - 2**-17  # as far from a bfloat16, and its rest from one, as can be
    exact = a.double() @ b.double()
    assert float(((run(a, b, kind=kind) - exact) / exact).abs().max()) <= 1.01 * 2.0**-23


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_none_stays_none(kind):
    bits = [0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF]
    a = torch.tensor(bits, dtype=torch.int32).view(torch.float32)[:, None].repeat(1, 3)
    assert run(a, torch.ones(3, 2), kind=kind).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-60, 60, 126])
def test_tiny_and_huge_numbers(kind, exponent):
    a, b, *_ = draw((20, 20, 40))
    a, b = a.clamp(-1.99, 1.99) * 2.0**exponent, b * 2.0 ** -min(exponent, 100)
    assert_accurate(run(a, b, kind=kind), a @ b, a.double() @ b.double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers_and_the_24_bits_of_all(kind):
    largest = torch.finfo(torch.float32).max
    numbers = torch.cat(
        (torch.tensor([largest, -largest, *map(float.fromhex, ("0x1.fefffep127", "0x1.ffp127"))]), torch.randn(300))
    )
    for a in (torch.diag(numbers), numbers[:, None]):
        b = torch.eye(len(numbers)) if a.shape[1] > 1 else torch.ones(1, 1)
        assert torch.equal(run(a, b, kind=kind), a @ b)
        assert torch.equal(run(b.T, a.T, kind=kind), b.T @ a.T)


def test_what_is_below_the_smallest_normal_number_counts_as_nothing():
    a = torch.tensor([[2.0**-127, 1.0]])
    assert run(a, torch.tensor([[2.0**20], [0.0]])) == 0


@without_tiles
def test_tiles_are_given_back():
    """Else the system would save 8 KiB more each time it suspends the thread, and others would find them configured."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b901000000 0f01d0 c3"))  # mov ecx, 1; xgetbv; ret: which registers are in use
    in_use = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    run(*draw((40, 40, 40))[:2], kind=TILES, threads=1)
    assert not in_use() >> 17 & 3


BAD = {
    "threads": ({}, "threads is less than 1"),
    "no instructions": ({"instructions": 0}, "lacks the instructions"),
    "both": ({"instructions": 3}, "lacks the instructions"),
    "unknown instructions": ({"instructions": 4}, "lacks the instructions"),
    "rows": ({"rows": -1}, "a size is negative"),
    "columns": ({"columns": -1}, "a size is negative"),
    "depth": ({"depth": -1}, "a size is negative"),
    "too many rows": ({"rows": 2**62}, "a size is negative, too large"),
    "null out": ({"out": None}, "is null"),
    "misaligned out": ({"out": 2}, "is not aligned"),
    "misaligned bias": ({"bias": 2}, "is not aligned"),
    "overlapping rows": ({"out_stride": 4}, "rows that are written overlap"),
    "null a": ({"a.data": None}, "is null"),
    "null b": ({"b.data": None}, "is null"),
    "misaligned a": ({"a.data": 2}, "is not aligned"),
    "misaligned b": ({"b.data": 2}, "is not aligned"),
    "strides of a": ({"a.column_stride": 2}, "neither rows nor columns of a matrix are side by side"),
    "strides of b": ({"b.column_stride": -1}, "neither rows nor columns of a matrix are side by side"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_before_anything_is_written(case):
    changes, sentence = BAD[case]
    a, b, bias, out = draw((9, 5, 7))
    before = out.clone()
    given = describe(a, b, bias, out, False, TILES_IN_SOFTWARE)
    for name, value in changes.items():
        *parents, field = name.split(".")
        parent = getattr(given, parents[0]) if parents else given
        moved = field in ("out", "bias", "data") and value is not None
        setattr(parent, field, getattr(parent, field) + value if moved else value)
    with pytest.raises(_native.NativeError, match=sentence):
        _native.check(_cpu_tiles._library().vjepa_product_cpu(given, 0 if case == "threads" else 2))
    assert torch.equal(out, before)


def test_without_a_description_nothing_is_done():
    with pytest.raises(_native.NativeError, match="null"):
        _native.check(_cpu_tiles._library().vjepa_product_cpu(None, 1))


@without_tiles
def test_large_products_of_float32_are_served_and_no_others(monkeypatch):
    x, weight = torch.randn(512, 384), torch.randn(384, 384)
    assert _cpu_tiles.serve(x, weight)
    assert not _cpu_tiles.serve(x.bfloat16(), weight.bfloat16())
    assert not _cpu_tiles.serve(x[:5], weight)
    monkeypatch.setenv("VJEPA_KERNELS", "reference")
    assert not _cpu_tiles.serve(x, weight)
