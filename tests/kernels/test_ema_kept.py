"""EMA prepares its update once, and again when anything about its tensors has changed; what overlaps is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa.kernels import EMA, _dispatch, backend, ema, ema_update_

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("ema_update_", CPU).items() if why in _dispatch.RUNS]


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


@pytest.fixture
def prepared(monkeypatch):
    """One entry for each time that an update was prepared."""
    times, prepare = [], ema.prepare
    monkeypatch.setattr(ema, "prepare", lambda *lists: times.append(lists) or prepare(*lists))
    return times


def networks():
    return nn.Linear(3, 4), nn.Linear(3, 4)


def check(update, target, source, momentum=0.75):
    pairs = zip(target.parameters(), source.parameters(), strict=True)
    expected = [t.detach().lerp(s.detach().float(), 1 - momentum) for t, s in pairs]
    update.update(momentum)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-7)
    for name, copied in update.copies.items():
        assert torch.equal(copied, target.get_parameter(name).detach().to(copied.dtype))


def test_once_for_many_updates(prepared):
    target, source = networks()
    update = EMA(target, source, copies=torch.bfloat16)
    for _ in range(3):
        check(update, target, source)
    assert len(prepared) == 1


def test_again_when_memory_layout_dtype_or_backend_changes(prepared, each_backend):
    target, source = networks()
    update = EMA(target, source)
    check(update, target, source)
    target.weight.data = target.weight.data.clone()
    check(update, target, source)
    source.weight.data = source.weight.data.t().contiguous().t()  # no longer in the order of the target
    with backend("auto"):
        check(update, target, source)
        check(update, target, source)
    target.weight.data = target.weight.data.t().contiguous().t()
    check(update, target, source)
    source.to(torch.bfloat16)
    check(update, target, source)
    assert len(prepared) == 5


def test_a_part_of_the_same_memory(prepared):
    """The address stays, the size does not."""
    target, source = networks()
    update = EMA(target, source)
    check(update, target, source)
    end = target.weight.data[2:].clone()
    whole = target.weight.data
    for module in (target, source):
        module.weight.data = module.weight.data[:2]
    check(update, target, source)
    assert torch.equal(whole[2:], end)
    target.weight.data = whole
    with pytest.raises(ValueError, match=r"source_module\[0\] must be \(4, 3\) float32 on cpu like target_module"):
        update.update(0.5)


def test_where_operators_are_traced():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    target, source = networks()
    update = EMA(target, source)
    with Watch():
        update.update(0.5)
    assert seen.count("vjepa.ema_update_.default") == 1
    check(update, target, source)


def test_copies_and_pickles_whole():
    target, source = networks()
    update = EMA(target, source, copies=torch.float16)
    update.update(0.5)
    for twin in (copy.deepcopy(update), pickle.loads(pickle.dumps(update))):
        before = [tensor.clone() for tensor in twin._targets]
        twin.update(0.5)
        assert not any(map(torch.equal, before, twin._targets))
    check(update, target, source)


def test_momentum_as_a_tensor_and_wrong_ones():
    target, source = networks()
    update = EMA(target, source)
    update.update(torch.tensor(0.0))
    assert torch.equal(target.weight, source.weight)
    before = target.weight.detach().clone()
    source.weight.data.add_(1)
    for momentum, error, sentence in (
        (float("nan"), ValueError, "momentum must be between 0 and 1, got nan"),
        (1.5, ValueError, "momentum must be between 0 and 1, got 1.5"),
        ("0.5", TypeError, "momentum must be a number, got str '0.5'"),
        (torch.tensor(2.0), ValueError, "momentum must be between 0 and 1, got 2"),
        (
            torch.zeros((), dtype=torch.float64, device="meta"),
            ValueError,
            "momentum must be on the device of all targets",
        ),
    ):
        with pytest.raises(error, match=sentence):
            update.update(momentum)
    assert torch.equal(target.weight, before)


SHARING = r"must have memory of its own, got a tensor that shares it with"


def test_what_overlaps_is_refused_and_nothing_is_written():
    storage = torch.arange(12.0)
    other = torch.ones(12)
    cases = {
        "the same target twice": ([storage, storage], [other, other]),
        "overlapping targets": ([storage[:8], storage[7:]], [other[:8], other[:5]]),
        "a target as its own source": ([other[:2].clone(), storage], [other[:2], storage]),
        "a source inside of another target": ([other[:2].clone(), storage], [storage[3:5], other]),
    }
    for targets, sources in cases.values():
        with pytest.raises(ValueError, match=SHARING):
            ema_update_(targets, sources, 0.5)
        assert torch.equal(storage, torch.arange(12.0))
    target = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=SHARING):
        EMA(target, target).update(0.5)
    ema_update_([storage[:6], storage[6:]], [other[:6], other[:6]], 0.0)  # neighbours, and one source for both
    assert torch.equal(storage, other)


def test_targets_without_memory_of_their_own_elements():
    with backend("auto"), pytest.raises(ValueError, match=r"targets\[0\] must have memory for each .* strides \(0,\)"):
        ema_update_([torch.zeros(1).expand(3)], [torch.ones(3)], 0.5)


def test_views_between_each_other(each_backend):
    """Interleaved views share no element."""
    whole = torch.zeros(8)
    with backend("auto"):
        ema_update_([whole[::2], whole[1::2]], [torch.ones(4), torch.full((4,), 2.0)], 0.0)
    assert whole.tolist() == [1.0, 2.0] * 4


def test_dense_tensors_of_any_layout(each_backend):
    target, source = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    expected = target.lerp(source, 0.25)
    ema_update_([target], [source], 0.75)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-7)
    with backend("auto"):
        ema_update_([target], [source.contiguous()], 0.0)
    assert torch.equal(target, source)
    if each_backend != "reference":
        with pytest.raises(RuntimeError, match=r"it walks tensors as one run of memory, .* got sources\[0\]"):
            ema_update_([target], [source.contiguous()], 0.0)


@pytest.mark.parametrize(
    ("copies", "error", "sentence"),
    [
        ([torch.zeros(3).bfloat16()], ValueError, r"copies\[0\] must be \(2,\) float32 on cpu like targets"),
        ([torch.zeros(2).bfloat16()] * 2, ValueError, "copies must have 1 tensors like targets, got 2"),
        ([torch.zeros(2).long()], TypeError, r"copies\[0\] must be a floating tensor"),
    ],
)
def test_the_operator_checks_copies(copies, error, sentence):
    target = torch.zeros(2)
    with pytest.raises(error, match=sentence):
        torch.ops.vjepa.ema_update_([target], [torch.ones(2)], copies, torch.tensor(0.5))
    assert not target.any()


def test_a_view_with_gaps_at_the_same_address():
    """As many elements, neither before nor after contiguous: what lies between them is not the target's."""
    target, source = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    whole = torch.randn(4, 8)
    target.weight.data, source.weight.data = whole.view(-1)[:16].view(4, 4).t(), torch.randn(4, 4).t()
    update = EMA(target, source)
    with backend("auto"):
        check(update, target, source)
        target.weight.data = whole[:, ::2]
        between = whole[:, 1::2].clone()
        check(update, target, source)
    assert torch.equal(whole[:, 1::2], between)


def test_copies_that_others_replaced():
    target, source = networks()
    update = EMA(target, source, copies=torch.bfloat16)
    check(update, target, source)
    update.copies["weight"] = torch.zeros(4, 3, dtype=torch.float16)
    with backend("auto"):
        check(update, target, source)
    update.copies["weight"] = torch.zeros(2, dtype=torch.float16)
    before = [parameter.detach().clone() for parameter in target.parameters()]
    with pytest.raises(ValueError, match=r"copies\[0\] must be \(4, 3\) float32 on cpu like target_module"):
        update.update(0.5)
    del update.copies["weight"]
    with pytest.raises(ValueError, match="copies must have 2 tensors like target_module, got 1"):
        update.update(0.5)
    assert all(map(torch.equal, target.parameters(), before))


def test_a_target_made_in_inference_mode():
    target, source = networks()
    with torch.inference_mode():
        target = copy.deepcopy(target)
        update = EMA(target, source, copies=torch.bfloat16)
    check(update, target, source)
    with torch.inference_mode():
        check(update, target, source)


def test_versions_of_what_is_written_go_up():
    target, source = networks()
    update = EMA(target, source, copies=torch.bfloat16)
    written = [*target.parameters(), *update.copies.values()]
    for _ in range(2):
        versions = [tensor._version for tensor in written]
        update.update(0.5)
        assert all(tensor._version > version for tensor, version in zip(written, versions, strict=True))


def test_a_backend_asked_for_meanwhile_serves(prepared, each_backend):
    target, source = networks()
    update = EMA(target, source)
    check(update, target, source)
    with backend("auto"):
        check(update, target, source)
        check(update, target, source)
    check(update, target, source)
    assert len(prepared) == 2
