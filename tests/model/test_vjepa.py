import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from vjepa.kernels import gather_tokens
from vjepa.masks import MultiBlock
from vjepa.model import VJEPA

SIZES = [[(20, 15), (7, 30)], [(9, 39), (1, 1)]]  # context and target tokens of each kind and clip, out of 48


@pytest.fixture
def model(tools):
    return tools.filled_model(tools.small_config())


@pytest.fixture(scope="module")
def video(tools):
    return tools.formula("video", (2, 3, 8, 24, 32), torch.float32)


@pytest.fixture(scope="module")
def masks(tools):
    return tools.make_masks(48, 2, SIZES)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, rtol=1e-4):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=rtol, atol=1e-6), name


def test_loss_is_the_mean_over_sets_of_the_mean_error(model, video, masks):
    outputs = model.outputs(video, masks)
    target = gather_tokens(F.layer_norm(outputs.target_features, (24,)), masks.target)
    error = (outputs.prediction - target).abs().mean(1)
    expected = torch.stack([part.mean() for part in error.split(list(masks.target.lengths))]).mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert torch.equal(model(video, masks), outputs.loss)


def test_outputs_shapes_and_gradients(model, video, masks):
    outputs = model.outputs(video, masks)
    assert (outputs.loss.shape, outputs.loss.dtype) == ((), torch.float32)
    assert outputs.prediction.shape == (15 + 30 + 39 + 1, 24)
    assert outputs.target_features.shape == (2, 48, 24)
    assert not outputs.target_features.requires_grad
    torch.testing.assert_close(outputs.target_features, model.target_encoder(video))


def test_packed_pass_equals_one_set_at_a_time(model, video, masks):
    model(video, masks).backward()
    packed = gradients(model)
    model.zero_grad()
    losses = []
    for kind, sizes in enumerate(SIZES):
        for clip in range(2):
            one = masks.split(2)[clip]
            alone = type(one)(*(_only(part, kind) for part in (one.context, one.target)), one.kind[kind : kind + 1])
            assert alone.context.lengths == (sizes[clip][0],)
            losses.append(model(video[clip : clip + 1], alone))
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.testing.assert_close(model(video, masks), loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(packed, gradients(model))


def _only(tokens, number):
    ids = tokens.indices.split(list(tokens.lengths))[number]
    return type(tokens).from_sets([ids])


def test_gradient_reaches_every_trained_parameter_and_no_other(model, video, masks):
    model(video, masks).backward()
    for name, values in model.named_parameters():
        if name.startswith("target_encoder."):
            assert not values.requires_grad, name
            assert values.grad is None, name
        else:
            assert values.grad.isfinite().all(), name
            assert values.grad.any(), name


def test_both_mask_tokens_learn_from_their_own_kind(model, video, tools):
    only_first = tools.make_masks(48, 2, SIZES[:1])
    model(video, only_first).backward()
    gradient = model.predictor.mask_tokens.grad
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


def test_target_encoder_starts_as_a_copy(tools):
    model = VJEPA(tools.small_config())
    encoder, target = model.encoder.state_dict(), model.target_encoder.state_dict()
    assert encoder.keys() == target.keys()
    assert all(torch.equal(encoder[name], target[name]) for name in encoder)
    pointers = [{p.data_ptr() for p in part.parameters()} for part in (model.encoder, model.target_encoder)]
    assert pointers[0].isdisjoint(pointers[1])


def test_activation_checkpointing_gives_the_same_gradients(model, video, masks):
    model(video, masks).backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_activation_checkpointing(True)
    calls = []
    for block in (*model.encoder.blocks, *model.predictor.predictor_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(video, masks).backward()
    assert len(calls) == 2 * 4  # each of the 2 + 2 blocks again in the backward pass
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_clips_of_another_size(model, tools):
    clips = tools.formula("video", (2, 3, 4, 32, 16), torch.float32)
    masks = MultiBlock(grid=(2, 4, 2))(2, torch.Generator().manual_seed(0))
    model(clips, masks).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_images(model, tools):
    masks = tools.make_masks(12, 2, [(5, 7)])
    loss = model(tools.formula("image", (2, 3, 24, 32), torch.float32), masks)
    assert loss.isfinite()


def test_compiled_equals_eager_and_new_lengths_compile_nothing(tools):
    model = tools.filled_model(tools.small_config(depth=1, predictor_depth=1))
    pixels = (torch.arange(2 * 3 * 8 * 24 * 32) * 37 % 256).to(torch.uint8).view(2, 3, 8, 24, 32)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        masks = tools.make_masks(48, 2, [[(20 + step, 15), (7, 30 + step)], [(9, 39 - step), (1, 1 + step)]])
        expected_loss = model(pixels, masks)
        expected_loss.backward()
        expected = gradients(model)
        model.zero_grad()
        loss = compiled(pixels, masks)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
        assert_same_gradients(gradients(model), expected)
        model.zero_grad()
        assert counter.frame_count <= 2  # once for the first shapes, once with sizes that vary, and never again


@pytest.mark.parametrize("frames", [8, 16])
def test_no_value_is_read_back_from_the_device(frames, masks, tools):
    """Meta tensors have no values, so that reading one (what would make a GPU wait) raises."""
    with torch.device("meta"):
        model = VJEPA(tools.small_config())
    outputs = model.outputs(torch.empty(2, 3, frames, 24, 32, device="meta"), masks.to("meta"))
    outputs.loss.backward()
    assert outputs.prediction.shape == (85, 24)


def test_bfloat16_autocast_is_close(model, video, masks):
    expected = float(model(video, masks).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(video, masks)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(expected, rel=0.02)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_same_input_gives_the_same_bits(model, video, masks):
    model(video, masks).backward()
    expected = gradients(model)
    model.zero_grad()
    model(video, masks).backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_wrong_arguments_are_named(model, video, tools):
    with pytest.raises(ValueError, match="between 0 and 47"):
        model(video, tools.make_masks(60, 2, [(30, 30)]))
    for clips in (1, 3):  # fewer masked clips than there are would be trained on in silence
        with pytest.raises(ValueError, match=f"masks must be for the 2 clips of video, got masks for {clips}"):
            model(video, tools.make_masks(48, clips, [(20, 20)]))
    with pytest.raises(TypeError, match=r"masks must be a vjepa\.Masks, got list"):
        model(video, [torch.arange(5)])
    with pytest.raises(TypeError, match="config must be a VJEPAConfig, got dict"):
        VJEPA({})
