"""What comes before the CUDA kernels, executed on the host: tables that are written, grids, and an optimizer step's groups,
windows and counts."""

from __future__ import annotations

import ctypes
from array import array
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from vjepa.kernels import _native, _native_ema, _native_launch
from vjepa.kernels._adamw import Lists, Numbers
from vjepa.kernels._native_adamw import MAXIMUM_GROUPS, CPUStep, CUDAStep

AVAILABLE, REASON = _native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)


@pytest.fixture
def launches(monkeypatch):
    """Executes launches on the host, where the tensors are; collects how many tensors each was for."""
    counts = []
    library = _native.library()

    def launch(self, words, function, *arguments):
        counts.append(len(self.chunks) - 1)
        chunks = self.chunks
        grid = _native.Grid(chunks.buffer_info()[0], len(chunks) - 1, chunks[-1], self._elements)
        assert function is library.vjepa_adamw_cuda
        _native.check(library.vjepa_adamw_cuda_on_host(words.buffer_info()[0], grid, *arguments))

    monkeypatch.setattr(_native_launch.DeviceTable, "launch", launch)
    return counts


def make_lists(sizes, counts, lacking=()):
    """Parameters of these sizes that have done so many steps; those `lacking` have no gradient."""
    generator = torch.Generator().manual_seed(len(sizes))
    params, grads, exp_avgs, exp_avg_sqs, shadows = (
        [torch.rand(size, generator=generator) for size in sizes] for _ in range(5)
    )
    steps = [torch.tensor(float(count)) for count in counts]
    for tensors in (grads, exp_avgs, exp_avg_sqs, steps):
        for place in lacking:
            tensors[place] = torch.empty(0)
    return Lists(params, grads, exp_avgs, exp_avg_sqs, steps, shadows, [], [])


def make_numbers(sizes, factor=None, found_inf=None):
    hyper = [number for group in range(len(sizes)) for number in (0.01 * (group + 1), 0.9, 0.95, 1e-8, 0.1)]
    factors = [torch.tensor(factor * (group + 1)) for group in range(len(sizes))] if factor else []
    return Numbers(list(sizes), hyper, 0.9, [], factors, found_inf)


def both(lists, numbers, on_host, times=2):
    """The same steps by the CPU's code and by the kernel's."""
    twin = Lists(*([tensor.clone() for tensor in tensors] for tensors in lists))
    cpu, cuda = CPUStep(lists), CUDAStep(twin)
    assert not cuda.on_host  # the counts lie with the parameters
    cuda.on_host = on_host
    if on_host:
        cuda.set_column("step", [0] * len(lists.params))
    for _ in range(times):
        for step, its in ((cpu, lists), (cuda, twin)):
            step.load(its.grads)
            step.run(numbers)
    for ours, others in zip(lists, twin, strict=True):
        assert all(map(torch.equal, ours, others))


@pytest.mark.parametrize("on_host", [True, False], ids=["counts on the host", "counts on the device"])
def test_one_launch_for_all_groups(launches, on_host):
    lists = make_lists((5, 70_000, 0, 3, 64), (4, 4, 4, 4, 4), lacking=(3,))
    both(lists, make_numbers((2, 0, 3), factor=0.5), on_host)
    assert launches == [5, 5]
    assert [step.item() for step in lists.steps if step.numel()] == [6.0] * 4


@pytest.mark.parametrize("on_host", [True, False], ids=["counts on the host", "counts on the device"])
def test_unlike_counts_in_one_group(launches, on_host):
    both(make_lists((5, 9, 3, 64), (4, 0, 1000, 4)), make_numbers((3, 1)), on_host)
    assert launches == [4, 4]


@pytest.mark.parametrize("on_host", [True, False], ids=["counts on the host", "counts on the device"])
def test_more_groups_than_a_launch_takes(launches, on_host):
    sizes = [1 + place % 3 for place in range(2 * MAXIMUM_GROUPS + 7)]
    total = sum(sizes)
    both(make_lists([7] * total, [3] * total), make_numbers(sizes), on_host)
    first, second = (sum(sizes[start : start + MAXIMUM_GROUPS]) for start in (0, MAXIMUM_GROUPS))
    assert launches == [first, second, total - first - second] * 2


def test_more_counts_in_a_group_than_a_launch_takes(launches):
    counts = list(range(MAXIMUM_GROUPS + 3))
    both(make_lists([7] * len(counts), counts), make_numbers((len(counts),)), on_host=True)
    assert launches == [MAXIMUM_GROUPS, 3] * 2


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
def test_an_infinite_gradient_is_not_counted(launches, found):
    lists = make_lists((5, 70), (4, 4))
    params, shadows = ([tensor.clone() for tensor in tensors] for tensors in (lists.params, lists.shadows))
    both(lists, make_numbers((1, 1), found_inf=torch.tensor(found)), on_host=False)
    assert [step.item() for step in lists.steps] == [4.0 if found else 6.0] * 2
    assert all(map(torch.equal, lists.params, params)) == bool(found)
    assert not any(map(torch.equal, lists.shadows, shadows))


def test_counts_that_become_alike_and_unlike_again(launches):
    """Other windows than before, of which one ends where another did."""
    counts = list(range(MAXIMUM_GROUPS + 3))
    lists = make_lists([7] * len(counts), counts)
    twin = Lists(*([tensor.clone() for tensor in tensors] for tensors in lists))
    cpu, cuda = CPUStep(lists), CUDAStep(twin)
    cuda.on_host = True
    cuda.set_column("step", [0] * len(counts))
    for done in (counts, [9] * len(counts), counts):
        for step, its in ((cpu, lists), (cuda, twin)):
            for count, before in zip(its.steps, done, strict=True):
                count.fill_(before)
            step.load(its.grads)
            step.run(make_numbers((len(counts),)))
    assert launches == [MAXIMUM_GROUPS, 3, len(counts), MAXIMUM_GROUPS, 3]
    for ours, others in zip(lists, twin, strict=True):
        assert all(map(torch.equal, ours, others))


class Device:
    """A CUDA device's part in a launch, played by the host."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.written, self.seen = 1, False, 0, []
        self.library = _native.library()
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(_native_launch, "library", lambda: self)

    def vjepa_write_cuda(self, to, words, count, device, stream):
        assert stream == self.stream
        self.written += 1
        return self.library.vjepa_write_cuda_on_host(to, words, count)

    def kernel(self, tensors, grid, *rest):
        """Reads the table as a kernel would."""
        words = (ctypes.c_int64 * WORDS).from_address(tensors)
        chunks = (ctypes.c_int64 * (grid.count + 1)).from_address(grid.first_chunks)
        assert rest == ("an argument", None, self.stream)
        self.seen.append((tensors, list(words), list(chunks), grid.num_chunks, grid.elements))
        return 0


WORDS = 1200  # more than one piece


def test_a_table_goes_to_the_device_again_only_if_it_or_the_stream_is_another(monkeypatch):
    device = Device(monkeypatch)
    table = _native_launch.DeviceTable([5, 0, 9], 4, torch.device("cpu"))

    def launch(first):
        words = array("q", [first, *range(1, WORDS)])
        table.launch(words, device.kernel, "an argument")
        place, *seen = device.seen[-1]
        assert seen == [list(words), [0, 2, 2, 5], 5, 4]
        return place

    launch(7)
    launch(7)
    assert device.written == 1
    launch(8)
    assert device.written == 2
    device.stream = 2
    kept = launch(8)
    assert device.written == 3
    device.capturing = True  # a graph has a table of its own, whose writing it replays
    for written in (4, 5):
        assert launch(8) != kept
        assert device.written == written
    device.capturing = False
    assert launch(8) == kept
    assert device.written == 5
    _native_launch.DeviceTable([0, 0], 4, torch.device("cpu")).launch(array("q"), device.kernel)  # nothing to do
    assert device.written == 5


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1003])
def test_words_are_written_in_pieces(count):
    words = torch.arange(1, count + 1)
    written = torch.zeros(count + 2, dtype=torch.int64)
    _native.check(_native.library().vjepa_write_cuda_on_host(written.data_ptr(), words.data_ptr(), count))
    assert torch.equal(written[:count], words)
    assert not written[count:].any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"elements": 6}, "not a multiple"),
        ({"elements": 0}, "a size is negative"),
        ({"count": -1}, "a size is negative"),
        ({"num_chunks": 2**31}, "too large"),
        ({"first_chunks": None}, "a pointer to at least one element is null"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(change, sentence):
    words, chunks = _native_ema.words([torch.zeros(8)], [torch.ones(8)], ()), _native_launch.first_chunks([8], 4)
    grid = _native.Grid(chunks.buffer_info()[0], 1, chunks[-1], 4)
    for name, value in change.items():
        setattr(grid, name, value)
    with pytest.raises(_native.NativeError, match=sentence):
        _native.check(_native.library().vjepa_ema_cuda_on_host(words.buffer_info()[0], grid, 0.5, None))
