import pytest
import torch

from vjepa.kernels import TokenIndices
from vjepa.model.predictor import target_rows

CONTEXT = [[0, 5, 9], [1], [2, 3, 4, 40, 41], [7, 8]]
TARGET = [[1, 2], [0, 6, 30, 47], [5], [9, 10, 11]]
CLIP, KIND = [0, 1, 0, 1], [0, 0, 1, 1]


def pack(sets, order=(0, 1, 2, 3)):
    return TokenIndices.from_sets([torch.tensor(sets[s]) for s in order], clip=[CLIP[s] for s in order])


@pytest.fixture(scope="module")
def model(tools):
    return tools.filled_model(tools.small_config()).requires_grad_(False)


@pytest.fixture(scope="module")
def context(tools):
    return tools.formula("context", (sum(map(len, CONTEXT)), 24), torch.float32)


def test_target_rows():
    rows = target_rows(pack(CONTEXT), pack(TARGET))
    assert rows.tolist() == [3, 4, 6, 7, 8, 9, 15, 18, 19, 20]


def test_packed_sets_equal_one_set_at_a_time(model, context):
    packed = model.predictor(context, pack(CONTEXT), pack(TARGET), torch.tensor(KIND))
    assert packed.shape == (10, 24)
    parts = context.split([len(ids) for ids in CONTEXT])
    alone = [
        model.predictor(part, pack(CONTEXT, [s]), pack(TARGET, [s]), torch.tensor([KIND[s]]))
        for s, part in enumerate(parts)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_set_order_does_not_matter(model, context):
    order = [2, 0, 3, 1]
    parts = context.split([len(ids) for ids in CONTEXT])
    packed = model.predictor(context, pack(CONTEXT), pack(TARGET), torch.tensor(KIND))
    shuffled = model.predictor(
        torch.cat([parts[s] for s in order]), pack(CONTEXT, order), pack(TARGET, order), torch.tensor(KIND)[order]
    )
    expected = packed.split([len(ids) for ids in TARGET])
    torch.testing.assert_close(shuffled, torch.cat([expected[s] for s in order]), rtol=1e-5, atol=1e-5)


def test_kind_selects_the_mask_token_modulo_their_number(model, context):
    def predict(kinds):
        return model.predictor(context, pack(CONTEXT), pack(TARGET), torch.tensor(kinds))

    assert torch.equal(predict([2, 2, 3, 3]), predict(KIND))
    assert not torch.allclose(predict([1, 1, 0, 0]), predict(KIND), atol=1e-3)


def test_prediction_depends_on_the_target_position(model, context):
    moved = [ids[:] for ids in TARGET]
    moved[2] = [6]
    before = model.predictor(context, pack(CONTEXT), pack(TARGET), torch.tensor(KIND))
    after = model.predictor(context, pack(CONTEXT), pack(moved), torch.tensor(KIND))
    assert not torch.allclose(before[6], after[6], atol=1e-3)
    torch.testing.assert_close(before[:6], after[:6], rtol=1e-5, atol=1e-5)


def test_positions_of_another_grid(model, context):
    sets = pack(CONTEXT), pack(TARGET)
    usual = model.predictor(context, *sets, torch.tensor(KIND))
    other = model.predictor(context, *sets, torch.tensor(KIND), grid=(6, 4, 4))
    assert other.shape == usual.shape
    assert not torch.allclose(other, usual, atol=1e-3)
    with pytest.raises(ValueError, match="between 0 and 23"):  # ids up to 47 do not fit 24 tokens
        model.predictor(context, *sets, torch.tensor(KIND), grid=(2, 3, 4))


def test_wrong_arguments_are_named(model, context):
    kind = torch.tensor(KIND)
    with pytest.raises(ValueError, match=r"context must have shape \(Nc, 24\), got \(11, 23\)"):
        model.predictor(context[:, 1:], pack(CONTEXT), pack(TARGET), kind)
    with pytest.raises(ValueError, match="context"):
        model.predictor(context[1:], pack(CONTEXT), pack(TARGET), kind)
    with pytest.raises(TypeError, match=r"context must be a floating-point tensor, got torch\.int64"):
        model.predictor(context.long(), pack(CONTEXT), pack(TARGET), kind)
    with pytest.raises(ValueError, match=r"new_grid must be \(t, h, w\)"):
        model.predictor(context, pack(CONTEXT), pack(TARGET), kind, grid=(2, 3))
    with pytest.raises(ValueError, match="kind"):
        model.predictor(context, pack(CONTEXT), pack(TARGET), kind[:3])
    with pytest.raises(ValueError, match="target"):
        model.predictor(context, pack(CONTEXT), pack(TARGET, [0, 1, 2]), kind)
    empty = TokenIndices.from_sets([torch.arange(3), torch.arange(1), torch.arange(5), torch.arange(0)], clip=CLIP)
    with pytest.raises(ValueError, match="no empty set"):
        model.predictor(context, pack(CONTEXT), empty, kind)
