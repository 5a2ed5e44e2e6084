"""`Masks`: counts, moves between devices, splits, validation."""

import pickle

import pytest
import torch

from vjepa.kernels import TokenIndices
from vjepa.masks import Masks, MultiBlock


@pytest.fixture
def masks() -> Masks:
    return MultiBlock((2, 6, 6), kinds=((2, 0.2), (1, 0.5)))(5, torch.Generator().manual_seed(0))


def _sets(tokens: TokenIndices) -> list[list[int]]:
    return [ids.tolist() for ids in tokens.indices.split(list(tokens.lengths))]


def test_counts_are_read_off_when_not_given(masks: Masks) -> None:
    rebuilt = Masks(masks.context, masks.target, masks.kind)
    assert (rebuilt.num_clips, rebuilt.num_kinds, rebuilt.num_sets) == (5, 2, 10)


def test_repr_tells_clips_kinds_and_lengths(masks: Masks) -> None:
    text = repr(masks)
    assert text.startswith("Masks(clips=5, kinds=2, tokens per set: context ")
    assert f"{min(masks.target.lengths)}..{max(masks.target.lengths)}" in text


def test_to_moves_everything_without_reading_the_device(masks: Masks) -> None:
    moved = masks.to("meta", non_blocking=True)  # a meta tensor has no values: reading one raises
    for tensor in (moved.context.indices, moved.target.cu_seqlens, moved.target.clip, moved.kind):
        assert tensor.device.type == "meta"
    assert (moved.num_clips, moved.num_kinds) == (5, 2)
    assert moved.context.lengths == masks.context.lengths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pin_memory(masks: Masks) -> None:
    pinned = masks.pin_memory()
    assert pinned.context.indices.is_pinned()
    assert pinned.target.indices.is_pinned()
    assert pinned.kind.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).context.indices.cpu(), masks.context.indices)


def test_pickle_round_trip(masks: Masks) -> None:
    again = pickle.loads(pickle.dumps(masks))
    assert _sets(again.context) == _sets(masks.context)
    assert torch.equal(again.kind, masks.kind)
    assert again.num_clips == 5


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_split_by_clip(masks: Masks, parts: int) -> None:
    pieces = masks.split(parts)
    sizes = [len(chunk) for chunk in torch.arange(5).tensor_split(parts)]
    assert [piece.num_clips for piece in pieces] == sizes
    first = 0
    for piece, size in zip(pieces, sizes, strict=True):
        assert piece.num_kinds == 2
        wanted = [s for s in range(10) if first <= s % 5 < first + size]
        for name in ("context", "target"):
            part, whole = getattr(piece, name), getattr(masks, name)
            assert _sets(part) == [_sets(whole)[s] for s in wanted]
            assert part.clip.tolist() == [s % 5 - first for s in wanted]
            assert part.cu_seqlens.tolist()[-1] == part.total == sum(part.lengths)
            assert part.cu_seqlens.dtype == torch.int32
        assert piece.kind.tolist() == masks.kind[wanted].tolist()
        first += size


def test_split_accepts_lengths_kept_in_a_tensor(masks: Masks) -> None:
    def with_tensor(tokens: TokenIndices) -> TokenIndices:
        return TokenIndices(tokens.indices, tokens.cu_seqlens, tokens.clip, torch.tensor(tokens.lengths))

    tensors = Masks(with_tensor(masks.context), with_tensor(masks.target), masks.kind)
    for ours, theirs in zip(tensors.split(2), masks.split(2), strict=True):
        assert _sets(ours.context) == _sets(theirs.context)
        assert ours.target.lengths == theirs.target.lengths


@pytest.mark.parametrize("parts", [0, 6])
def test_split_into_impossible_parts(masks: Masks, parts: int) -> None:
    with pytest.raises(ValueError, match=rf"parts must be within 1..5 .*, got {parts}"):
        masks.split(parts)


def test_empty_sets_are_named() -> None:
    full = TokenIndices.from_sets([torch.tensor([0]), torch.tensor([1])])
    empty = TokenIndices.from_sets([torch.tensor([2]), torch.tensor([], dtype=torch.int64)])
    kind = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="target must have no empty set, got no token in set 1"):
        Masks(full, empty, kind)
    with pytest.raises(ValueError, match="context must have no empty set, got no token in set 1"):
        Masks(empty, full, kind)


def test_mismatched_parts_are_named() -> None:
    one = TokenIndices.from_sets([torch.tensor([0])])
    two = TokenIndices.from_sets([torch.tensor([0]), torch.tensor([1])])
    other = TokenIndices.from_sets([torch.tensor([0]), torch.tensor([1])], clip=[1, 0])
    kind = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target must have as many sets as context \(2\), got 1"):
        Masks(two, one, kind)
    with pytest.raises(ValueError, match=r"kind must have shape \[2\]"):
        Masks(two, two, kind[:1])
    with pytest.raises(TypeError, match=r"kind must be an int tensor, got torch.float32"):
        Masks(two, two, kind.float())
    with pytest.raises(TypeError, match=r"kind must be an int tensor, got torch.bool"):
        Masks(two, two, kind.bool())
    with pytest.raises(ValueError, match="kind must not be negative, got -1"):
        Masks(two, two, kind - 1)
    with pytest.raises(ValueError, match=r"kind must be on the device of context \(cpu\), got meta"):
        Masks(two, two, kind.to("meta"))
    with pytest.raises(ValueError, match=r"target must be on the device of context \(cpu\), got meta"):
        Masks(two, two.to("meta"), kind)
    with pytest.raises(ValueError, match="num_clips must be at least 2, got 1"):
        Masks(two, two, kind, num_clips=1)
    with pytest.raises(TypeError, match="context must be a TokenIndices, got list"):
        Masks([0], two, kind)
    with pytest.raises(ValueError, match=r"target.clip must equal context.clip"):
        Masks(two, other, kind)
