import pytest
import torch

from vjepa.kernels import TokenIndices, gather_tokens
from vjepa.model import Encoder

L = 48  # tokens of the small config: 4 x 3 x 4


@pytest.fixture(scope="module")
def model(tools):
    return tools.filled_model(tools.small_config()).requires_grad_(False)


@pytest.fixture(scope="module")
def video(tools):
    return tools.formula("video", (2, 3, 8, 24, 32), torch.float32)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_sets_of_all_tokens_equal_the_whole_clip(model, video):
    whole = model.encoder(video)
    assert whole.shape == (2, L, 24)
    everything = TokenIndices.from_sets([torch.arange(L)] * 2)
    close(model.encoder(video, everything), whole.flatten(0, 1))


def test_ragged_sets_equal_one_set_at_a_time(model, video):
    sets = [torch.tensor([5]), torch.arange(0, L, 3), torch.tensor([47, 2, 11]), torch.arange(40)]
    clip = [1, 0, 0, 1]
    packed = model.encoder(video, TokenIndices.from_sets(sets, clip=clip))
    alone = [model.encoder(video[c : c + 1], TokenIndices.from_sets([ids])) for ids, c in zip(sets, clip, strict=True)]
    close(packed, torch.cat(alone))


def test_a_token_does_not_see_hidden_ones(model, video):
    kept = TokenIndices.from_sets([torch.arange(12), torch.arange(12, 20)])  # of the first two of four time steps
    changed = video.clone()
    changed[:, :, 4:] += 100
    assert torch.equal(model.encoder(changed, kept), model.encoder(video, kept))
    assert not torch.allclose(model.encoder(changed)[:, 0], model.encoder(video)[:, 0])


def test_uint8_is_normalised(model):
    pixels = (torch.arange(2 * 3 * 8 * 24 * 32) * 37 % 256).to(torch.uint8).view(2, 3, 8, 24, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in model.config.normalisation)
    close(model.encoder(pixels), model.encoder((pixels / 255 - mean) / std))


def test_strided_video(model, video):
    frames_first = video.transpose(1, 2).contiguous().transpose(1, 2)
    close(model.encoder(frames_first), model.encoder(video))


def test_single_frame_and_image_fill_one_tubelet(model, video):
    frame = video[:, :, :1]
    expected = model.encoder(frame.repeat(1, 1, 2, 1, 1))
    assert expected.shape == (2, 12, 24)
    close(model.encoder(frame), expected)
    close(model.encoder(frame[:, :, 0]), expected)


@pytest.mark.parametrize(
    ("changes", "shape", "tokens"),
    [
        ({"tubelet_size": 1, "num_frames": 3}, (1, 3, 3, 24, 32), 36),
        ({"tubelet_size": 1, "num_frames": 1}, (2, 3, 24, 32), 12),
        ({"in_channels": 12}, (1, 12, 8, 24, 32), 48),
        ({"in_channels": 1}, (1, 1, 8, 24, 32), 48),
        ({}, (1, 3, 2, 64, 8), 8),  # other sizes than the config's, smaller and larger
        ({}, (1, 3, 20, 24, 32), 120),
    ],
)
def test_other_channels_tubelets_and_sizes(changes, shape, tokens, tools):
    encoder = tools.filled_model(tools.small_config(**changes)).encoder
    features = encoder(tools.formula("video", shape, torch.float32))
    assert features.shape == (shape[0], tokens, 24)
    assert features.isfinite().all()


def test_other_sizes_after_serving_still_train(tools):
    model = tools.filled_model(tools.small_config())
    clip = tools.formula("video", (1, 3, 4, 16, 16), torch.float32)
    with torch.inference_mode():
        model.encoder(clip)  # fills the cache of interpolated positions
    model.encoder(clip).sum().backward()
    assert model.encoder.patch_embed.proj.weight.grad.isfinite().all()


def test_tables_of_other_sizes_are_kept_up_to_a_bound(tools):
    positions = tools.filled_model(tools.small_config()).encoder.positions
    first = positions((1, 1, 1))
    assert positions((1, 1, 1)) is first
    for width in range(2, 20):
        positions((1, 1, width))
    again = positions((1, 1, 1))
    assert again is not first
    assert torch.equal(again, first)


def test_bfloat16_autocast_keeps_residual_and_norms_in_float32(model, video):
    sets = TokenIndices.from_sets([torch.arange(20), torch.arange(5, 48)])
    expected = model.encoder(video, sets)
    dtypes = []
    watched = (*model.encoder.blocks, model.encoder.blocks[0].mlp)

    def note(_module, _arguments, output):
        dtypes.extend(x.dtype for x in (output if isinstance(output, tuple) else (output,)))

    hooks = [part.register_forward_hook(note) for part in watched]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.encoder(video, sets)
    for hook in hooks:
        hook.remove()
    bf16, fp32 = torch.bfloat16, torch.float32
    assert dtypes == [bf16, fp32, bf16, fp32, bf16]  # the MLP, and of each block the residual and the branch
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        ([1], TypeError, "video must be a tensor, got list"),
        (torch.zeros(1, 3, 8, 24, 32).int(), TypeError, "video must be uint8 or floating point, got torch.int32"),
        (torch.zeros(3, 24, 32), ValueError, r"video must have shape \(B, 3, T, H, W\).*got \(3, 24, 32\)"),
        (torch.zeros(1, 8, 3, 24, 32), ValueError, r"video must have shape \(B, 3, T, H, W\)"),
        (torch.zeros(1, 3, 7, 24, 32), ValueError, r"whole 2 x 8 x 8 tubelets.*got shape \(1, 3, 7, 24, 32\)"),
        (torch.zeros(1, 3, 8, 20, 32), ValueError, "whole 2 x 8 x 8 tubelets"),
        (torch.zeros(0, 3, 8, 24, 32), ValueError, "whole 2 x 8 x 8 tubelets"),
    ],
)
def test_wrong_video_is_named(model, video, error, message):
    with pytest.raises(error, match=message):
        model.encoder(video)


def test_wrong_indices_are_named(model, video):
    with pytest.raises(ValueError, match=r"indices.*between 0 and 47"):
        model.encoder(video, TokenIndices.from_sets([torch.tensor([0, 48])]))
    with pytest.raises(ValueError, match=r"clip.*between 0 and 1"):
        model.encoder(video, TokenIndices.from_sets([torch.tensor([0])], clip=[2]))
    with pytest.raises(TypeError, match="indices must be a TokenIndices"):
        model.encoder(video, torch.arange(5))


def test_gather_of_whole_clip_differs_from_masked_pass(model, video):
    """Masking at the input (context) is not masking at the output (targets)."""
    sets = TokenIndices.from_sets([torch.arange(20), torch.arange(20)])
    assert not torch.allclose(model.encoder(video, sets), gather_tokens(model.encoder(video), sets), atol=1e-3)


def test_encoder_alone_can_be_built(tools):
    assert not any("target" in name or "positions" in name for name in Encoder(tools.small_config()).state_dict())
