"""ema_update_ and EMA against the formula, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.library import opcheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from vjepa.kernels import EMA, _dispatch, backend, ema_update_
from vjepa.kernels import _reference_optimizer as reference
from vjepa.kernels.ema import _update

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("ema_update_", CPU).items() if why.startswith("can run")]
SHAPES = ((3, 5), (1,), (0,), (4, 1, 7), ())


@pytest.fixture(params=BACKENDS)
def _each_backend(request):
    with backend(request.param):
        yield


def pairs(dtype=torch.float32):
    return [torch.randn(shape) for shape in SHAPES], [torch.randn(shape).to(dtype) for shape in SHAPES]


def mean_of(targets, sources, momentum):
    return [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources, strict=True)]


@pytest.mark.usefixtures("_each_backend")
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 0.99996, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(check_accuracy, momentum, dtype):
    targets, sources = pairs(dtype)
    exact = mean_of(targets, sources, momentum)
    plain = [
        t.clone().mul_(momentum).add_(s.float(), alpha=1 - momentum) for t, s in zip(targets, sources, strict=True)
    ]
    before = [s.clone() for s in sources]
    assert ema_update_(targets, sources, momentum) is None
    for ours, same, truth in zip(targets, plain, exact, strict=True):
        if truth.numel():
            check_accuracy(ours, same, truth)
    assert all(map(torch.equal, sources, before))


@pytest.mark.usefixtures("_each_backend")
def test_small_steps_add_up():
    """A thousand updates of 1e-5 each move a target by 1 %; in bfloat16 they would move it by nothing."""
    target, source = torch.ones(1000), torch.full((1000,), 2.0)
    for _ in range(1000):
        ema_update_([target], [source], 0.99999)
    torch.testing.assert_close(target, torch.full_like(target, 2 - 0.99999**1000), rtol=2e-5, atol=0)


def test_views_and_float64_are_updated_in_place():
    base = torch.randn(6, 4, dtype=torch.float64)
    view, source = base[::2, 1:3], torch.randn(3, 2, dtype=torch.float64)
    expected = mean_of([view], [source], 0.9)[0]
    untouched = base[1::2].clone()
    ema_update_([view], [source], 0.9)
    torch.testing.assert_close(view, expected)
    assert torch.equal(base[1::2], untouched)


def test_parameters_of_modules_are_taken_as_they_come():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    ema_update_(target.parameters(), source.parameters(), 0.0)
    assert all(map(torch.equal, target.parameters(), source.parameters()))


def test_no_tensors_no_graph_and_versions():
    ema_update_([], [], 0.5)
    target, source = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    loss, version = (target**2).sum(), target._version
    ema_update_([target], [source], 0.5)
    assert target.is_leaf
    assert target._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "error", "sentence"),
    [
        (
            [torch.zeros(2).bfloat16()],
            [torch.zeros(2)],
            0.5,
            TypeError,
            r"targets\[0\] must be float32 or float64, got",
        ),
        (torch.zeros(2), [torch.zeros(2)], 0.5, TypeError, r"targets must be a list of tensors, got \(2,\) float32"),
        ([torch.zeros(2)], None, 0.5, TypeError, "sources must be a list of tensors, got NoneType"),
        ([torch.zeros(2)], [], 0.5, ValueError, "sources must have 1 tensors like targets, got 0"),
        (
            [torch.zeros(2)],
            [torch.zeros(3)],
            0.5,
            ValueError,
            r"sources\[0\] must be \(2,\) float32 on cpu like targets",
        ),
        ([torch.zeros(2)], [torch.zeros(2).long()], 0.5, TypeError, r"sources\[0\] must be a floating tensor"),
        ([torch.zeros(2)], [None], 0.5, TypeError, r"sources\[0\] must be a tensor, got NoneType"),
        (
            [torch.zeros(2)],
            [torch.zeros(2).to_sparse()],
            0.5,
            TypeError,
            r"sources\[0\] must be dense, got \(2,\) float32",
        ),
        (
            [torch.zeros(2).to_sparse()],
            [torch.zeros(2)],
            0.5,
            TypeError,
            r"targets\[0\] must be dense, got .*sparse_coo",
        ),
        (
            [torch.zeros(2)],
            [torch.zeros(2, device="meta")],
            0.5,
            ValueError,
            r"sources\[0\] must be \(2,\) float32 on cpu like targets, got \(2,\) float32 on meta",
        ),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, ValueError, "momentum must be between 0 and 1, got 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), ValueError, "momentum must be between 0 and 1, got nan"),
        ([torch.zeros(2)], [torch.zeros(2)], "0.5", TypeError, "momentum must be a number"),
        (
            [torch.zeros(2)],
            [torch.zeros(2)],
            torch.tensor(-1.0),
            ValueError,
            "momentum must be between 0 and 1, got -1",
        ),
        ([torch.zeros(2)], [torch.zeros(2)], torch.zeros(2), ValueError, "momentum must be a number, a 0-d tensor"),
    ],
)
def test_refuses(targets, sources, momentum, error, sentence):
    with pytest.raises(error, match=sentence):
        ema_update_(targets, sources, momentum)


def test_a_momentum_on_a_device_belongs_to_the_targets():
    pairs = [torch.zeros(2)], [torch.ones(2)]
    with pytest.raises(
        ValueError, match=r"momentum must be .* a 0-d float64 tensor on a device, got \(\) float32 on meta"
    ):
        ema_update_(*pairs, torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match="momentum must be on the device of all targets or on the CPU, got"):
        _update(*pairs, [], torch.zeros((), dtype=torch.float64, device="meta"))
    assert not pairs[0][0].any()


def test_the_reference_takes_a_momentum_that_nobody_reads():
    read, sources = [torch.randn(5)], [torch.randn(5)]
    unread = [read[0].clone()]
    reference.ema_update_(read, sources, [], 0.99)
    reference.ema_update_(unread, sources, [], torch.tensor(0.99, dtype=torch.float64))
    assert torch.equal(read[0], unread[0])


def test_nothing_is_written_if_any_pair_is_bad():
    target = torch.zeros(2)
    with pytest.raises(ValueError, match=r"sources\[1\]"):
        ema_update_([target, torch.zeros(2)], [torch.ones(2), torch.ones(3)], 0.5)
    assert not target.any()


@pytest.mark.usefixtures("_each_backend")
def test_opcheck():
    targets, sources = [torch.randn(3, 2), torch.randn(5)], [torch.randn(3, 2), torch.randn(5)]
    momentum = torch.tensor(0.9)
    opcheck(torch.ops.vjepa.ema_update_.default, (targets, sources, [], momentum))
    copies = [target.bfloat16() for target in targets]
    opcheck(torch.ops.vjepa.ema_update_.default, (targets, sources, copies, momentum))


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        if tied:
            self.b.weight = self.a.weight


@pytest.mark.usefixtures("_each_backend")
@pytest.mark.parametrize("copies", [None, torch.bfloat16, torch.float16])
def test_module_and_copies(copies):
    target, source = Net(), Net()
    with torch.no_grad():
        source.norm.running_mean.fill_(7)
    ema = EMA(target, source, copies=copies)
    expected = mean_of(target.parameters(), source.parameters(), 0.9)
    ema.update(0.9)
    for parameter, truth in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), truth, rtol=1e-6, atol=1e-7)
    assert not target.norm.running_mean.any()  # buffers are constants
    assert list(ema.copies) == ([] if copies is None else [name for name, _ in target.named_parameters()])
    for name, copied in ema.copies.items():
        assert torch.equal(copied, target.get_parameter(name).to(copies))


def test_the_table_is_built_once_and_follows_the_parameters(monkeypatch):
    target, source = Net(), Net()
    ema = EMA(target, source)
    monkeypatch.setattr(nn.Module, "named_parameters", lambda self: pytest.fail("looked for parameters again"))
    ema.update(1.0)
    with torch.no_grad():
        source.a.weight.data = torch.ones(4, 3)  # as an optimizer that swaps storages does
    ema.update(0.0)
    assert torch.equal(target.a.weight, torch.ones(4, 3))


def test_tied_parameters_are_updated_once():
    target, source = Net(tied=True), Net(tied=True)
    expected = mean_of([target.a.weight], [source.a.weight], 0.5)[0]
    EMA(target, source).update(0.5)
    torch.testing.assert_close(target.b.weight.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("target", "source", "copies", "error", "sentence"),
    [
        (
            Net,
            lambda: nn.Linear(3, 4),
            None,
            ValueError,
            "must have the parameter names of target_module, got .*a.weight",
        ),
        (lambda: Net().bfloat16(), Net, None, TypeError, r"target_module\[0\] must be float32 or float64"),
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(4, 4), None, ValueError, r"source_module\[0\] must be \(4, 3\)"),
        (Net, Net, torch.float32, TypeError, "copies must be torch.bfloat16, torch.float16 or None"),
        (
            lambda: Net(tied=True),
            Net,
            None,
            ValueError,
            "source_module must tie parameters .* got b.weight apart from a",
        ),
        (lambda: [torch.zeros(1)], Net, None, TypeError, "target_module must be a torch.nn.Module, got list"),
    ],
)
def test_module_refuses(target, source, copies, error, sentence):
    with pytest.raises(error, match=sentence):
        EMA(target(), source(), copies=copies)


@pytest.fixture
def mesh():
    """A mesh of two processes of which only this one exists: whatever communicates goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_shards_are_updated_without_communication(mesh):
    modules = []
    for _ in range(2):
        module = nn.Linear(3, 4, bias=False)
        module.weight = nn.Parameter(DTensor.from_local(torch.randn(2, 3), mesh, [Shard(0)]))
        modules.append(module)
    target, source = modules
    assert target.weight.shape == (4, 3)
    expected = mean_of([target.weight.to_local()], [source.weight.to_local()], 0.9)[0]
    with CommDebugMode() as communication:
        ema = EMA(target, source, copies=torch.bfloat16)
        ema.update(0.9)
    assert communication.get_total_counts() == 0
    torch.testing.assert_close(target.weight.to_local().double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(ema.copies["weight"], target.weight.to_local().bfloat16())
    source.weight = nn.Parameter(DTensor.from_local(torch.randn(4, 2), mesh, [Shard(1)], shape=(4, 3), stride=(3, 1)))
    with pytest.raises(ValueError, match="must be sharded like target_module, got another placement of weight"):
        EMA(target, source)
