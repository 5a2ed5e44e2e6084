"""The native optimizer step against its equations in float64, on the CPU and as the CUDA kernel's code on the host."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from vjepa.kernels import _native, _native_adamw, _native_launch
from vjepa.kernels._adamw import Lists, Numbers

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

SIZES = (0, 1, 7, 127, 1009, 4096, 20_011)
LARGE = (2**20 + 3, 1, 2**22 - 2**20)  # together so many that copies go past the caches
GRADS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (None, torch.bfloat16, torch.float16)
NUMBERS = (1e-2, 0.9, 0.95, 1e-8, 0.1, 0.99)  # lr, beta1, beta2, eps, weight decay, momentum
DONE = 6  # steps before this one


def make_lists(sizes, grad_dtype=torch.float32, copy_dtype=None, shadows=True, shift=0, done=DONE):
    """What a step takes, in its order; views that begin `shift` elements into their storage, copies full of NaN."""
    generator = torch.Generator().manual_seed(sum(sizes) + shift)

    def draw(make=torch.randn):
        return [make(n + shift, generator=generator)[shift:] for n in sizes]

    params, grads = draw(), [(g + 0).to(grad_dtype) for g in draw()]
    grads = [torch.cat((grad.new_zeros(shift), grad))[shift:] for grad in grads]
    lists = [params, grads, draw(), draw(torch.rand), [torch.tensor(float(done)) for _ in sizes]]
    lists.append(draw() if shadows else [])
    for there in (copy_dtype is not None, shadows and copy_dtype is not None):
        blank = [torch.full((n + shift,), torch.nan, dtype=copy_dtype)[shift:] for n in sizes]
        lists.append(blank if there else [])
    return lists


def words_of(lists):
    """The table, in one group, and that group."""
    step = _native_adamw.CPUStep(Lists(*lists))
    step.load(lists[1])
    return step.words, (_native.AdamWGroup * 1)(_native.AdamWGroup(*NUMBERS[:5], 0, None, None))


def grid_of(lists, elements=_native_adamw.CHUNK_ELEMENTS):
    """And what must stay in memory for it."""
    chunks = _native_launch.first_chunks(map(torch.Tensor.numel, lists[0]), elements)
    return _native.Grid(chunks.buffer_info()[0], len(chunks) - 1, chunks[-1], elements), chunks


def cuda_code_on_host(lists, factor=None, scalars=None, momentum=NUMBERS[-1]):
    """What the CUDA kernel does with these tensors: the same tables, the same blocks and threads, on the host."""
    words, rows = words_of(lists)
    rows[0].grad_factor = factor
    grid, _chunks = grid_of(lists)
    function = _native.library().vjepa_adamw_cuda_on_host
    _native.check(function(words.buffer_info()[0], grid, rows, len(rows), scalars, momentum))
    for step in lists[4]:
        step += 1  # the kernel does not count


def on_cpu(lists, factor=None, scalars=None, momentum=NUMBERS[-1], threads=2):
    words, rows = words_of(lists)
    rows[0].grad_factor = factor
    table = _native.table_of(_native.AdamWEntry, words)
    _native.check(_native.library().vjepa_adamw_cpu(table, len(table), rows, len(rows), scalars, momentum, threads))


def public(lists, numbers=NUMBERS):
    step = _native_adamw.CPUStep(Lists(*lists)._replace(grads=[]))
    step.load(lists[1])
    step.run(Numbers([len(lists[0])], list(numbers[:5]), numbers[5], [], [], None))


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def same(first, second):
    """Bit for bit, NaN included."""
    pairs = [pair for ours, others in zip(first, second, strict=True) for pair in zip(ours, others, strict=True)]
    return all(torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4)) for a, b in pairs)


def assert_equations(before, after, factor=1.0):
    """Within a few roundings of the terms that are added; shadow and copies of the parameter as it came out."""
    lr, beta1, beta2, eps, weight_decay, momentum = NUMBERS
    unit = 2.0**-23
    for k, (param, grad, first, second, step) in enumerate(zip(*before[:5], strict=True)):
        p, g, a, q = (tensor.double() for tensor in (param, grad, first, second))
        g, number = g * factor, float(step) + 1
        moved = beta1 * a + (1 - beta1) * g, beta2 * q + (1 - beta2) * g**2
        root = (moved[1] / (1 - beta2**number)).sqrt() + eps
        change = lr / (1 - beta1**number) * moved[0] / root
        expected = p * (1 - lr * weight_decay) - change
        new_param, _, new_first, new_second = (tensors[k].double() for tensors in after[:4])
        assert torch.all((new_first - moved[0]).abs() <= unit * (a.abs() + 4 * g.abs()))
        assert torch.all((new_second - moved[1]).abs() <= 4 * unit * (moved[1] + 1e-37))
        slack = lr * 4 * unit * (a.abs() + 4 * g.abs()) / root  # of the numerator, whose terms may cancel
        assert torch.all((new_param - expected).abs() <= unit * (2 * p.abs() + 8 * change.abs()) + slack)
        assert float(after[4][k]) == number
        if before[5]:
            mean = momentum * before[5][k].double() + (1 - momentum) * new_param
            assert torch.all((after[5][k].double() - mean).abs() <= unit * (mean.abs() + before[5][k].abs() + p.abs()))
        for copies, tensors in zip(after[6:], (after[0], after[5]), strict=True):
            assert not copies or torch.equal(copies[k], tensors[k].to(copies[k].dtype))


@pytest.mark.parametrize("shift", [0, 1, 2], ids=["aligned", "misaligned", "aligned to 8 bytes"])
@pytest.mark.parametrize("shadows", [True, False], ids=["followed", "alone"])
@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
@pytest.mark.parametrize("grad_dtype", GRADS, ids=str)
def test_step_is_its_equations_in_the_same_bits_everywhere(grad_dtype, copy_dtype, shadows, shift):
    before = make_lists(SIZES, grad_dtype, copy_dtype, shadows, shift)
    after, of_cuda, alone = clone(before), make_lists(SIZES, grad_dtype, copy_dtype, shadows, shift), clone(before)
    public(after)
    cuda_code_on_host(of_cuda)
    on_cpu(alone, threads=1)
    assert_equations(before, after)
    assert same(after, of_cuda)
    assert same(after, alone)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5, 6, 7], ids=[name for name in Lists._fields if name != "steps"])
@pytest.mark.parametrize("grad_dtype", GRADS, ids=str)
def test_a_single_misaligned_tensor(grad_dtype, place):
    """Sixteen bytes at a time where all are aligned to them: `make sanitize` and a GPU see any other access."""
    for shift in (1, 2):
        before = make_lists((67,), grad_dtype, torch.bfloat16)
        before[place] = make_lists((67,), grad_dtype, torch.bfloat16, shift=shift)[place]
        after = [tensors if k == place else clone([tensors])[0] for k, tensors in enumerate(before)]
        before = clone(before)
        cuda_code_on_host(after)
        assert_equations(before, after)


def test_gradients_may_change_their_dtype():
    lists = make_lists((65, 3))
    twin = clone(lists)
    step, numbers = _native_adamw.CPUStep(Lists(*lists)), Numbers([2], list(NUMBERS[:5]), NUMBERS[5], [], [], None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        grads = [grad.to(dtype) for grad in lists[1]]
        step.load(grads)
        step.run(numbers)
        public([twin[0], grads, *twin[2:]])
    assert same(lists, twin)


@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
def test_large_tensors_and_any_number_of_threads(copy_dtype):
    before = make_lists(LARGE, copy_dtype=copy_dtype)
    results = []
    address = _native.openmp_team()
    for team, threads in ((None, 1), (None, 3), (address, 2), (address, 3)):
        _native.library().vjepa_set_team(team)
        results.append(clone(before))
        on_cpu(results[-1], threads=threads)
    _native.library().vjepa_set_team(address)
    assert_equations(before, results[0])
    for other in results[1:]:
        assert same(results[0], other)
    cuda_code_on_host(before)
    assert same(results[0], before)


def test_a_thousand_tensors():
    before = make_lists([(n * 7919) % 503 for n in range(1000)], copy_dtype=torch.bfloat16)
    after = clone(before)
    public(after)
    assert_equations(before, after)


def test_tensors_may_have_done_different_numbers_of_steps():
    before = make_lists((100, 50, 70))
    for step, done in zip(before[4], (0.0, 1e6, 3.0), strict=True):
        step.fill_(done)
    after, of_cuda = clone(before), clone(before)
    public(after)
    cuda_code_on_host(of_cuda)
    assert_equations(before, after)
    assert same(after, of_cuda)


@pytest.mark.parametrize("step", [on_cpu, cuda_code_on_host], ids=["cpu", "cuda on host"])
def test_gradients_are_multiplied_by_a_factor_read_late(step):
    factor = ctypes.c_float(0.125)
    before = make_lists(SIZES, torch.bfloat16)
    after = clone(before)
    step(after, ctypes.addressof(factor))
    assert_equations(before, after, 0.125)


@pytest.mark.parametrize("step", [on_cpu, cuda_code_on_host], ids=["cpu", "cuda on host"])
def test_an_infinite_gradient_leaves_all_but_the_averages(step):
    found, none = ctypes.c_float(1), ctypes.c_float(0)
    before = make_lists(SIZES, copy_dtype=torch.bfloat16)
    after, plain, not_found = clone(before), clone(before), clone(before)
    step(after, None, _native.AdamWScalars(ctypes.addressof(found), None))
    for kept in (0, 2, 3, 6):
        assert same(before[kept : kept + 1], after[kept : kept + 1])
    for k, shadow in enumerate(before[5]):
        expected = NUMBERS[-1] * shadow.double() + (1 - NUMBERS[-1]) * before[0][k].double()
        torch.testing.assert_close(after[5][k].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(after[7][k], after[5][k].bfloat16())
    step(plain)
    step(not_found, None, _native.AdamWScalars(ctypes.addressof(none), None))
    assert same(plain, not_found)


def test_lr_step_and_momentum_may_be_read_late():
    """What a CUDA graph needs: the numbers lie beside the tensors."""
    before = make_lists((65, 4096))
    plain = clone(before)
    on_cpu(plain)
    lr, number, momentum = ctypes.c_float(NUMBERS[0]), ctypes.c_float(DONE), ctypes.c_double(NUMBERS[-1])
    words, rows = words_of(before)
    table = _native.table_of(_native.AdamWEntry, words)
    for row in table:
        row.step = ctypes.addressof(number)
    rows[0].step, rows[0].lr, rows[0].lr_address = 0, 5.0, ctypes.addressof(lr)
    scalars = _native.AdamWScalars(None, ctypes.addressof(momentum))
    grid, _chunks = grid_of(before)
    function = _native.library().vjepa_adamw_cuda_on_host
    _native.check(function(table, grid, rows, len(rows), scalars, math.nan))
    for ours, others in zip(before[:4], plain[:4], strict=True):
        for one, other in zip(ours, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # lr is float32 there


def test_beyond_two_to_the_31_elements():
    """Only the last chunk of tensors whose other pages no one touches."""
    numel = 2**31 + 4096 + 3
    lists = [[torch.empty(numel)] for _ in range(4)]
    tails = make_lists((4096 + 3,))
    for whole, tail in zip(lists, tails[:4], strict=True):
        whole[0][2**31 :] = tail[0]
    words, rows = words_of([*lists, tails[4], [], [], []])
    chunks = _native_launch.first_chunks([numel], 2**31)
    assert list(chunks) == [0, 2]
    chunks[0] = -1  # so that the only block does the second chunk
    grid = _native.Grid(chunks.buffer_info()[0], 1, 1, 2**31)
    function = _native.library().vjepa_adamw_cuda_on_host
    _native.check(function(words.buffer_info()[0], grid, rows, len(rows), None, 0.5))
    on_cpu(tails)
    for whole, tail in zip(lists, tails[:4], strict=True):
        assert torch.equal(whole[0][2**31 :], tail[0])


def test_parameters_without_gradient_stay_and_their_shadows_follow():
    before = make_lists((65, 4096, 3), copy_dtype=torch.bfloat16)
    for tensors in before[1:5]:
        tensors[1] = torch.empty(0)
    after, of_cuda = clone(before), clone(before)
    public(after)
    cuda_code_on_host(of_cuda)
    assert same(after, of_cuda)
    assert torch.equal(after[0][1], before[0][1])
    mean = NUMBERS[-1] * before[5][1].double() + (1 - NUMBERS[-1]) * before[0][1].double()
    torch.testing.assert_close(after[5][1].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[7][1], after[5][1].bfloat16())
    rest = [[tensors[k] for k in (0, 2)] for tensors in before]
    assert_equations(rest, [[tensors[k] for k in (0, 2)] for tensors in after])


@pytest.mark.parametrize(
    ("place", "value"), [(0, -1.0), (0, math.nan), (1, 1.0), (2, -0.1), (3, math.nan), (4, -1.0), (5, 1.5)]
)
def test_refuses_numbers_and_changes_nothing(place, value):
    lists = make_lists((4,))
    before, numbers = clone(lists), list(NUMBERS)
    numbers[place] = value
    with pytest.raises(_native.NativeError, match=r"out of range|momentum is not between 0 and 1"):
        public(lists, numbers)
    assert same(before, lists)


@pytest.mark.parametrize("done", [-1.0, math.nan, math.inf])
def test_refuses_a_count_of_steps_and_changes_nothing(done):
    lists = make_lists((4,), done=done)
    before = clone(lists)
    with pytest.raises(_native.NativeError, match="step of a group is out of range"):
        public(lists)
    assert same(before[:4], lists[:4])


def test_refuses_tensors_that_share_memory():
    lists = make_lists((4,), copy_dtype=torch.bfloat16)
    before = clone(lists)
    for place, other in ((1, 0), (2, 0), (3, 0), (3, 2), (5, 0), (5, 3), (7, 6), (6, 7)):
        shared = [*lists]
        shared[place] = lists[other]
        with pytest.raises(ValueError, match=r"\[0\] must have memory of its own, got a tensor that shares it with"):
            public(shared)
    assert same(before, lists)


@pytest.mark.parametrize("place", range(8), ids=Lists._fields)
def test_refuses_a_storage_that_was_freed(place):
    """Its address is that of what a parameter lacks, which would not be updated."""
    lists = make_lists((4, 5), copy_dtype=torch.bfloat16)
    lists[place][1].untyped_storage().resize_(0)
    others = [tensors for number, tensors in enumerate(lists) if number != place]
    before = clone(others)
    with pytest.raises(ValueError, match=rf"{Lists._fields[place]}\[1\] must have memory for its elements"):
        public(lists)
    assert same(before, others)


def test_refuses_a_group_that_is_not_there():
    lists = make_lists((4,))
    words, rows = words_of(lists)
    table = _native.table_of(_native.AdamWEntry, words)
    for group in (1, -1):
        table[0].group = group
        with pytest.raises(_native.NativeError, match="a tensor names no group that is there"):
            _native.check(_native.library().vjepa_adamw_cpu(table, 1, rows, 1, None, 0.5, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not _native.cuda_available()[0], reason=_native.cuda_available()[1] or "CUDA is there")
@pytest.mark.parametrize("copy_dtype", COPIES, ids=str)
@pytest.mark.parametrize("grad_dtype", GRADS, ids=str)
def test_gpu_gives_the_bits_of_the_cpu(grad_dtype, copy_dtype):
    for shift in (0, 1):
        lists = make_lists(SIZES, grad_dtype, copy_dtype, shift=shift)
        on_gpu = [[t.cuda()[:] if place != 4 else t.clone() for t in tensors] for place, tensors in enumerate(lists)]
        numbers = [[len(lists[0])], list(NUMBERS[:5]), NUMBERS[5], []]
        steps = _native_adamw.CPUStep(Lists(*lists)), _native_adamw.CUDAStep(Lists(*on_gpu))
        for _ in range(3):
            for step, its, device in zip(steps, (lists, on_gpu), ("cpu", "cuda"), strict=True):
                step.load(its[1])
                step.run(Numbers(*numbers, [torch.tensor(0.5, device=device)], None))
        assert same(lists, [[t.cpu() for t in tensors] for tensors in on_gpu])
