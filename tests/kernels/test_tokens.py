"""TokenIndices: packing, what it knows on the host, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from vjepa.kernels import TokenIndices

SETS = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 0, 7])]


def test_from_sets_packs_in_order():
    packed = TokenIndices.from_sets(SETS)
    assert packed.indices.tolist() == [3, 1, 0, 0, 7]
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed.clip.tolist() == [0, 1, 2]
    assert packed.lengths == (2, 0, 3)
    assert (packed.indices.dtype, packed.cu_seqlens.dtype, packed.clip.dtype) == (torch.int64, torch.int32, torch.int64)
    assert (packed.max_seqlen, packed.num_sets, packed.total, packed.num_clips) == (3, 3, 5, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_from_sets_takes_any_int_dtype_and_a_clip_for_each_set(dtype):
    packed = TokenIndices.from_sets([ids.to(dtype) for ids in SETS], clip=[4, 0, 4])
    assert packed.indices.tolist() == [3, 1, 0, 0, 7]
    assert packed.clip.tolist() == [4, 0, 4]
    assert packed.num_clips == 5
    assert TokenIndices.from_sets(SETS, clip=torch.tensor([1, 1, 0])).clip.tolist() == [1, 1, 0]


def test_lengths_may_be_a_host_tensor():
    packed = TokenIndices.from_sets(SETS)
    same = TokenIndices(packed.indices, packed.cu_seqlens, packed.clip, torch.tensor(packed.lengths))
    assert same.max_seqlen == 3
    assert isinstance(same.lengths, torch.Tensor)
    listed = TokenIndices(packed.indices, packed.cu_seqlens, packed.clip, [2, 0, 3])
    assert listed.lengths == (2, 0, 3)


def test_to_moves_the_tensors_and_keeps_the_host_facts():
    packed = TokenIndices.from_sets(SETS, clip=[0, 3, 1])
    moved = packed.to("meta")
    assert {moved.indices.device.type, moved.cu_seqlens.device.type, moved.clip.device.type} == {"meta"}
    assert moved.lengths == packed.lengths
    assert moved.num_clips == 4
    assert TokenIndices.from_sets(SETS, device="meta").indices.device.type == "meta"


def test_to_the_cpu_waits_for_the_values_it_checks(monkeypatch):
    """From a GPU a copy that does not wait would be checked before it has arrived."""
    asked, plain = [], torch.Tensor.to
    packed = TokenIndices.from_sets(SETS[:1])
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *where, **how: asked.append(how["non_blocking"]) or plain(x, *where, **how)
    )
    for device, waits in (("cpu", False), (torch.device("cpu"), False), ("meta", True)):
        asked.clear()
        packed.to(device, non_blocking=True)
        assert asked == [waits] * 3


def test_is_frozen_copied_and_pickled_for_loader_workers():
    packed = TokenIndices.from_sets(SETS)
    with pytest.raises(AttributeError):
        packed.lengths = (1,)
    for twin in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed)):
        assert twin.lengths == packed.lengths
        assert torch.equal(twin.indices, packed.indices)


def test_pin_memory_asks_for_pinned_tensors(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    packed = TokenIndices.from_sets(SETS)
    assert packed.pin_memory().lengths == packed.lengths
    assert {id(tensor) for tensor in pinned} == {id(packed.indices), id(packed.cu_seqlens), id(packed.clip)}


def test_clips_given_on_the_host_are_counted_for_sets_on_a_device():
    sets = [ids.to("meta") for ids in SETS]  # a meta tensor has no values: reading one raises
    assert TokenIndices.from_sets(sets).num_clips == len(SETS)
    assert TokenIndices.from_sets(sets, clip=[4] + [0] * (len(SETS) - 1)).num_clips == 5


IDS, OFFSETS, CLIP = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (([1, 2, 3], OFFSETS, CLIP, (1, 2)), TypeError, r"indices must be a tensor \[N\], got list"),
        ((IDS.int(), OFFSETS, CLIP, (1, 2)), TypeError, r"indices must be one of int64, got \(3,\) int32"),
        ((IDS[None], OFFSETS, CLIP, (1, 2)), ValueError, r"indices must have the shape \[N\]"),
        ((IDS, OFFSETS.long(), CLIP, (1, 2)), TypeError, "cu_seqlens must be one of int32"),
        ((IDS, OFFSETS, CLIP.int(), (1, 2)), TypeError, "clip must be one of int64"),
        ((IDS, OFFSETS, CLIP[:1], (1, 2)), ValueError, r"one entry more than clip \(1\), got 3"),
        ((IDS, OFFSETS, CLIP.to("meta"), (1, 2)), ValueError, "clip must be on the device of indices"),
        (
            (IDS, OFFSETS, CLIP, 3),
            TypeError,
            "lengths must be a tuple of ints or a 1-D int tensor on the CPU, got int 3",
        ),
        ((IDS, OFFSETS, CLIP, torch.tensor([1.0, 2.0])), TypeError, "lengths must be ints"),
        ((IDS, OFFSETS, CLIP, torch.tensor([1, 2], device="meta")), TypeError, "on the CPU"),
        ((IDS, OFFSETS, CLIP, (1, 2.5)), TypeError, r"lengths must be ints, got float 2\.5 in entry 1"),
        ((IDS, OFFSETS, CLIP, (1, 1)), ValueError, "lengths must sum to the 3 tokens given, got a sum of 2"),
        ((IDS, OFFSETS, CLIP, (4, -1)), ValueError, "lengths must not be negative, got -1"),
        ((IDS, OFFSETS, CLIP, (2, 1)), ValueError, "cu_seqlens must be the running sum of lengths"),
        ((IDS, OFFSETS, CLIP, (1, 1, 1)), ValueError, "cu_seqlens must have 4 entries"),
        ((-IDS, OFFSETS, CLIP, (1, 2)), ValueError, "indices must not be negative, got -3"),
        ((IDS, OFFSETS, CLIP - 1, (1, 2)), ValueError, "clip must not be negative, got -1"),
        ((IDS, OFFSETS, CLIP, (1, 2), 1), ValueError, r"clip must be below num_clips \(1\), got 1"),
        ((IDS, OFFSETS, CLIP, (1, 2), 2.5), TypeError, r"num_clips must be an int or None, got float 2\.5"),
    ],
)
def test_refuses(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        TokenIndices(*arguments)


@pytest.mark.parametrize(
    ("sets", "clip", "error", "sentence"),
    [
        ([], None, ValueError, "sets must have at least one set"),
        (IDS, None, TypeError, "sets must be a list of 1-D int tensors"),
        ([IDS, IDS.float()], None, TypeError, r"sets\[1\] must be one of int64"),
        ([IDS[None]], None, ValueError, r"sets\[0\] must have the shape \[n\]"),
        ([IDS, IDS.to("meta")], None, ValueError, r"sets\[1\] must be on the device of sets\[0\]"),
        ([IDS], [0, 1], ValueError, "clip must have one entry for each of the 1 sets, got 2"),
        ([IDS], [0.5], TypeError, "clip must be one of int64"),
        ([-IDS], None, ValueError, "indices must not be negative"),
    ],
)
def test_from_sets_refuses(sets, clip, error, sentence):
    with pytest.raises(error, match=sentence):
        TokenIndices.from_sets(sets, clip=clip)
