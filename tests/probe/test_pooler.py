"""The attentive pooler against its formula written out, and the classifier against the released one's numbers."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vjepa.probe import AttentiveClassifier, AttentivePooler

GOLDEN = json.loads((Path(__file__).parent / "golden" / "released_classifier.json").read_text())
CROSS = ["q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias"]
NORMS_AND_MLP = [f"{part}.{kind}" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
BLOCK = [*NORMS_AND_MLP, "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]


def formula(name, shape):
    """Numbers that anybody can compute again: around 1 for norms' scales, around 0 for all others, float64."""
    count = math.prod(shape)
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + zlib.crc32(name.encode()) % 1000)
    noise = (wave * 43758.5453).remainder(1.0) - 0.5
    return (1 + noise if "norm" in name and name.endswith("weight") else noise).reshape(shape)


def filled(module):
    module = module.double()
    with torch.no_grad():
        for name, values in module.named_parameters():
            values.copy_(formula(name, tuple(values.shape)))
    return module


def layer_norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bqhd,blhd->bhql", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhql,blhd->bqhd", scores.softmax(-1), v).flatten(2)


def mlp(x, weights, name):
    return linear(F.gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def textbook(weights, x, heads, depth, complete_block):
    """Queries, keys and values made for every token and clip, then softmax attention: no product reordered."""
    query = weights["query_tokens"].expand(len(x), -1, -1)
    own = {name.removeprefix("cross_attention_block."): values for name, values in weights.items()}
    prefix = "xattn." if complete_block else ""
    tokens = layer_norm(x, own, "norm1") if complete_block else x
    key, value = linear(tokens, own, f"{prefix}kv").chunk(2, -1)
    out = attention(linear(query, own, f"{prefix}q"), key, value, heads)
    if complete_block:
        out = query + out
        out = out + mlp(layer_norm(out, own, "norm2"), own, "mlp")
    for number in range(depth - 1):
        block = f"blocks.{number}"
        q, k, v = linear(layer_norm(out, weights, f"{block}.norm1"), weights, f"{block}.attn.qkv").chunk(3, -1)
        out = out + linear(attention(q, k, v, heads), weights, f"{block}.attn.proj")
        out = out + mlp(layer_norm(out, weights, f"{block}.norm2"), weights, f"{block}.mlp")
    return out


@pytest.mark.parametrize("complete_block", [True, False])
@pytest.mark.parametrize(("queries", "depth"), [(1, 1), (1, 3), (4, 1), (4, 2)])
def test_equals_the_formula_written_out(queries, depth, complete_block):
    pooler = filled(AttentivePooler(queries, 24, 3, 2.0, depth, complete_block))
    x = 4 * formula("tokens", (3, 7, 24))
    out = pooler(x)
    assert out.shape == (3, queries, 24)
    expected = textbook(dict(pooler.named_parameters()), x, 3, depth, complete_block)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = formula("grad", tuple(out.shape))
    for name, values in pooler.named_parameters():
        if name.split(".")[-2:-1] == ["proj"] and name.startswith("cross_attention_block"):
            continue
        ours, plain = (torch.autograd.grad(y, values, grad, retain_graph=True)[0] for y in (out, expected))
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["arguments"].values())))
def test_keys_shapes_and_logits_of_the_released_classifier(case):
    classifier = filled(AttentiveClassifier(**case["arguments"]))
    assert {name: list(values.shape) for name, values in classifier.state_dict().items()} == case["shapes"]
    logits = classifier(4 * formula("tokens", (3, 7, 24)))
    torch.testing.assert_close(logits, torch.tensor(case["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("complete_block", [True, False])
def test_state_dict_keys(depth, complete_block):
    if complete_block:
        cross = [*(f"xattn.{name}" for name in CROSS), *NORMS_AND_MLP]
    else:
        cross = CROSS
    expected = {"pooler.query_tokens", "linear.weight", "linear.bias"}
    expected |= {f"pooler.cross_attention_block.{name}" for name in cross}
    expected |= {f"pooler.blocks.{number}.{name}" for number in range(depth - 1) for name in BLOCK}
    classifier = AttentiveClassifier(16, 2, depth=depth, num_classes=3, complete_block=complete_block)
    assert set(classifier.state_dict()) == expected


@pytest.mark.parametrize("complete_block", [True, False])
def test_the_output_projection_is_stored_and_never_applied(complete_block):
    classifier = AttentiveClassifier(16, 2, num_classes=3, complete_block=complete_block)
    block = classifier.pooler.cross_attention_block
    proj = (block.xattn if complete_block else block).proj
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before = classifier(x)
    with torch.no_grad():
        proj.weight.fill_(float("nan"))
        proj.bias.fill_(float("nan"))
    assert torch.equal(classifier(x), before)
    assert not any(values.requires_grad for values in proj.parameters())


def test_initialisation_is_truncated_and_shrinks_with_depth():
    torch.manual_seed(0)
    pooler = AttentivePooler(4, 192, 3, depth=2).requires_grad_(False)
    std = 0.02 * 0.87962566  # of a normal truncated at 2 std
    assert float(pooler.query_tokens.abs().max()) <= 0.04
    assert float(pooler.cross_attention_block.xattn.kv.weight.std()) == pytest.approx(std, rel=0.03)
    layers = (pooler.cross_attention_block.mlp.fc2, 1), (pooler.blocks[0].mlp.fc2, 2), (pooler.blocks[0].attn.proj, 2)
    for linear_map, layer in layers:
        expected = std / math.sqrt(2 * layer)
        assert float(linear_map.weight.std()) == pytest.approx(expected, rel=0.03)
        assert not linear_map.bias.any()


def test_bfloat16_autocast_is_close():
    torch.manual_seed(0)
    classifier = AttentiveClassifier(16, 2, depth=2, num_classes=3)
    x = torch.randn(4, 9, 16)
    expected = classifier(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = classifier(x)
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"num_queries": 0}, ValueError, "num_queries must be at least 1, got 0"),
        ({"embed_dim": 10, "num_heads": 4}, ValueError, "embed_dim must be a multiple of num_heads=4, got 10"),
        ({"num_heads": 2.0}, TypeError, r"num_heads must be an int, got 2\.0"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"mlp_ratio": -1}, ValueError, "mlp_ratio must be a positive number, .*got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        AttentivePooler(**arguments)


def test_a_classifier_needs_two_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        AttentiveClassifier(8, 2, num_classes=1)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        ([1.0], TypeError, r"x must be a floating-point tensor \[B, L, 8\], got list"),
        (torch.zeros(2, 3, 8).long(), TypeError, "x must be a floating-point tensor .*, got torch.int64"),
        (torch.zeros(3, 8), ValueError, r"x must have shape \[B, L, 8\] with L at least 1, got \[3, 8\]"),
        (torch.zeros(2, 0, 8), ValueError, r"got \[2, 0, 8\]"),
        (torch.zeros(2, 3, 9), ValueError, r"got \[2, 3, 9\]"),
    ],
)
def test_bad_tokens_are_named(x, error, sentence):
    with pytest.raises(error, match=sentence):
        AttentivePooler(1, 8, 2)(x)
